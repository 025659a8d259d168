"""Checkpoints of a plain Trainer: whole or absent, newest good one first, clean stops."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import fingerprint, make_trainer
from transformers import Trainer, TrainerCallback

from compact_fast import atomic
from compact_fast.atomic import DamagedError, DiskFullError, atomic_directory
from compact_fast.trainer.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    rotate_checkpoints,
    verify_checkpoint,
)
from compact_fast.trainer.interrupts import TrainingInterrupted


def fake_checkpoint(run_dir: Path, step: int, resumable: bool = True) -> Path:
    path = run_dir / f"checkpoint-{step}"
    with atomic_directory(path, record={"step": step, "resumable": resumable}) as folder:
        (folder / "model.safetensors").write_bytes(b"w" * 99)
    return path


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def spoil(trainer: Trainer) -> None:
    for weight in trainer.model.parameters():
        weight.data.mul_(9)


def names(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir))


class AtStep(TrainerCallback):
    """Calls `action` in the middle of a step, or (where="save") after a save."""

    def __init__(self, step: int, action: Callable[[], object], where: str = "step") -> None:
        self.step, self.action, self.where = step, action, where

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.where == "step" and state.global_step + 1 == self.step:
            self.action()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.where == "save" and state.global_step == self.step:
            self.action()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 10 steps with checkpoints 6, 8 and 10. Copy it, don't write there."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(run_dir, max_steps=10).train()
    assert names(run_dir) == ["checkpoint-10", "checkpoint-6", "checkpoint-8"]
    return run_dir


# ---- Choosing and rotating, without training ----


def test_newest_is_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200-copy").mkdir()
    (tmp_path / "checkpoint-300").touch()
    assert list(list_checkpoints(tmp_path)) == [9, 10, 100]
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path / "absent") is None


def test_damaged_ones_are_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4, 6, 8):
        fake_checkpoint(tmp_path, step)
    flip_bit(tmp_path / "checkpoint-8" / "model.safetensors")
    os.truncate(tmp_path / "checkpoint-6" / "model.safetensors", 5)
    fake_checkpoint(tmp_path, 4, resumable=False)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    said = [record.getMessage() for record in caplog.records]
    assert "checkpoint-8: model.safetensors: sha256 differs" in said[0]
    assert "checkpoint-6: model.safetensors: 5 bytes instead of 99" in said[1]
    assert "checkpoint-4 holds no optimizer state" in said[2]
    flip_bit(tmp_path / "checkpoint-2" / "manifest.json")
    caplog.clear()
    assert find_checkpoint(tmp_path) is None
    assert "no good checkpoint, starting afresh" in caplog.messages[-1]


def test_renamed_checkpoint_is_noticed(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoint-5")
    with pytest.raises(DamagedError, match="its manifest is of step 2"):
        verify_checkpoint(tmp_path / "checkpoint-5")


def test_rotation_spares_the_kept_and_drops_the_unfinished_first(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-8" / "manifest.json").unlink()
    rotate_checkpoints(tmp_path, None, [])
    rotate_checkpoints(tmp_path, 4, [])
    assert list(list_checkpoints(tmp_path)) == [2, 4, 6, 8]
    rotate_checkpoints(tmp_path, 3, [])
    assert list(list_checkpoints(tmp_path)) == [2, 4, 6]
    rotate_checkpoints(tmp_path, 1, [tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]


# ---- Resuming ----


@pytest.mark.parametrize("step", [6, 8])
def test_resumed_run_ends_with_the_same_bits(finished: Path, tmp_path: Path, step: int) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for newer in range(step + 2, 12, 2):
        shutil.rmtree(run_dir / f"checkpoint-{newer}")
    make_trainer(run_dir, max_steps=10).train("auto")
    assert fingerprint(run_dir, 10)["state"] == fingerprint(finished, 10)["state"]
    expected = fingerprint(finished, 10)
    expected["checkpoints"] = fingerprint(run_dir, 10)["checkpoints"]
    assert fingerprint(run_dir, 10) == expected


def test_log_row_across_a_resume_is_that_of_the_whole_window(
    finished: Path, tmp_path: Path
) -> None:
    """Step 9 logs the mean of steps 7-9; the checkpoint at 8 lies inside that window."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-8", run_dir / "checkpoint-8")
    trainer = make_trainer(run_dir, max_steps=10)
    result = trainer.train("auto")
    expected = fingerprint(finished, 10)["state"]["log_history"][-1]
    row = fingerprint(run_dir, 10)["state"]["log_history"][-1]
    assert row["step"] == 9
    assert row["loss"] == expected["loss"]
    # The mean over this process is of its own two steps, and so not far from the others.
    assert result.training_loss == pytest.approx(row["loss"], rel=0.2)


def test_damaged_newest_is_replaced_by_a_run_from_the_older(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    flip_bit(run_dir / "checkpoint-10" / "optimizer.pt")
    make_trainer(run_dir, max_steps=10).train("auto")
    assert "checkpoint-10: optimizer.pt: sha256 differs" in caplog.text
    assert fingerprint(run_dir, 10) == fingerprint(finished, 10)
    verify_checkpoint(run_dir / "checkpoint-10")


def test_none_good_starts_afresh(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-6", run_dir / "checkpoint-6")
    flip_bit(run_dir / "checkpoint-6" / "manifest.json")
    make_trainer(run_dir, max_steps=10).train("auto")
    assert "no good checkpoint, starting afresh" in caplog.text
    assert fingerprint(run_dir, 10) == fingerprint(finished, 10)


def test_finished_run_resumes_to_nothing(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    make_trainer(run_dir, max_steps=10).train("auto")
    assert fingerprint(run_dir, 10) == fingerprint(finished, 10)


def test_wishes_that_cannot_be_met_are_errors(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    trainer = make_trainer(run_dir, max_steps=10)
    with pytest.raises(ValueError, match=r"holds checkpoint-6, .*checkpoint-10 of an earlier run"):
        trainer.train()
    with pytest.raises(ValueError, match="holds checkpoint-10 of an earlier run"):
        trainer.train(run_dir / "checkpoint-8")
    with pytest.raises(ValueError, match="checkpoint-12: no such folder"):
        trainer.train(str(run_dir / "checkpoint-12"))
    flip_bit(run_dir / "checkpoint-10" / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-10: model.safetensors: sha256 differs"):
        trainer.train(str(run_dir / "checkpoint-10"))
    with pytest.raises(ValueError, match="no good checkpoint to resume from"):
        make_trainer(tmp_path / "new").train(True)
    fake_checkpoint(tmp_path, 2, resumable=False)
    with pytest.raises(ValueError, match="no optimizer state"):
        trainer.train(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="save_on_each_node"):
        make_trainer(tmp_path / "new", save_on_each_node=True).train()


def test_checkpoint_of_another_student_is_refused(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    trainer = make_trainer(run_dir, max_steps=12)
    trainer.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"another student: 2 weights .* first 'extra\.bias'"):
        trainer.train("auto")


def test_weights_only_checkpoints_say_that_they_cannot_be_resumed(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2, save_only_model=True).train()
    assert verify_checkpoint(tmp_path / "checkpoint-2")["resumable"] is False


def test_leftovers_of_a_killed_save_are_removed_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".checkpoint-4.tmp-1" / "checkpoint-4").mkdir(parents=True)
    make_trainer(tmp_path, max_steps=2).train("auto")
    said = [m for m in caplog.messages if ".checkpoint-4.tmp-1" in m]
    assert len(said) == 1
    assert names(tmp_path) == ["checkpoint-2"]


# ---- Saving ----


def test_manifest_covers_all_and_names_versions(finished: Path) -> None:
    manifest = verify_checkpoint(finished / "checkpoint-10")
    assert {*manifest["files"], "manifest.json"} == set(names(finished / "checkpoint-10"))
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < set(
        manifest["files"]
    )
    assert manifest["step"] == 10
    assert manifest["versions"]["torch"] == torch.__version__


def test_one_flipped_bit_in_any_file_of_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-10"
    shutil.copytree(finished / "checkpoint-10", folder)
    for path in folder.iterdir():
        flip_bit(path)
        with pytest.raises(DamagedError, match=path.name):
            verify_checkpoint(folder)
        flip_bit(path)
    verify_checkpoint(folder)


def test_old_checkpoints_stay_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = atomic._move_into_place

    def fail(folder: Path, final: Path) -> None:
        if final.name == "checkpoint-4":
            raise OSError(errno.EIO, "Input/output error")
        original(folder, final)

    monkeypatch.setattr(atomic, "_move_into_place", fail)
    with pytest.raises(OSError, match="Input/output"):
        make_trainer(tmp_path, max_steps=6, save_total_limit=1).train()
    assert names(tmp_path) == ["checkpoint-2"]
    verify_checkpoint(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("limit", [1, 2])
def test_best_checkpoint_is_tracked_kept_and_loaded(tmp_path: Path, limit: int) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=8,
        save_total_limit=limit,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.add_callback(AtStep(3, lambda: spoil(trainer)))
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    kept = ["checkpoint-2"] if limit == 1 else ["checkpoint-2", "checkpoint-8"]
    assert names(tmp_path) == kept
    verify_checkpoint(tmp_path / "checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    if limit == 2:
        state = fingerprint(tmp_path, 8)["state"]
        assert state["best_model_checkpoint"] == "checkpoint-2"
        assert state["best_global_step"] == 2
        flip_bit(tmp_path / "checkpoint-2" / "model.safetensors")
        with pytest.raises(ValueError, match=r"checkpoint-2: model\.safetensors"):
            trainer._load_best_model()


def test_push_comes_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []

    def push(self: Trainer, folder: str) -> None:
        verify_checkpoint(folder)
        pushed.append(folder)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [str(tmp_path / "checkpoint-2")]


# ---- Full disk ----


@pytest.mark.parametrize("where", ["optimizer", "manifest"])
def test_full_disk_stops_cleanly_and_resumes_after_cleaning_up(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        if where == "optimizer":
            # What torch.save raises on a full disk: a RuntimeError without an errno.
            original_save = torch.save

            def save(obj: Any, path: str, *args: Any, **kwargs: Any) -> None:
                if "checkpoint-6" in str(path) and "optimizer" in str(path):
                    patch.setattr(atomic, "free_bytes", lambda folder: 1000)
                    raise RuntimeError("PytorchStreamWriter failed writing file data/0")
                original_save(obj, path, *args, **kwargs)

            patch.setattr(torch, "save", save)
        else:
            original_manifest = atomic._write_manifest

            def manifest(folder: Path, record: Any) -> None:
                if folder.name == "checkpoint-6":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                original_manifest(folder, record)

            patch.setattr(atomic, "_write_manifest", manifest)
        with pytest.raises(DiskFullError) as caught:
            make_trainer(run_dir, max_steps=10).train()
    assert caught.value.errno == errno.ENOSPC
    message = str(caught.value)
    assert "\n" not in message
    for part in ("checkpoint-6: no space left", "MB free)", "step 6 (checkpoint-4 is whole"):
        assert part in message
    assert names(run_dir) == ["checkpoint-2", "checkpoint-4"]
    make_trainer(run_dir, max_steps=10).train("auto")
    assert fingerprint(run_dir, 10) == fingerprint(finished, 10)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 300 KB; skips where it may not be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_rotation_cut_short_is_finished_on_resume(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    fake_checkpoint(run_dir, 4)
    make_trainer(run_dir, max_steps=10).train("auto")
    assert names(run_dir) == names(finished)


def test_the_best_checkpoint_outlives_a_rotation_on_resume(tmp_path: Path) -> None:
    settings = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "loss",
    }
    trainer = make_trainer(tmp_path, save_total_limit=5, **settings)
    trainer.add_callback(AtStep(3, lambda: spoil(trainer)))
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    make_trainer(tmp_path, save_total_limit=2, **settings).train("auto")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]


def test_really_full_disk(finished: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    (small_disk / "ballast").write_bytes(b"0" * 60_000)
    with pytest.raises(DiskFullError, match=r"MB free\), training stopped at step \d+ \(check"):
        make_trainer(run_dir, max_steps=10, save_total_limit=5).train()
    left = list_checkpoints(run_dir)
    assert 1 <= len(left) < 5
    assert names(run_dir) == sorted(path.name for path in left.values())
    for path in left.values():
        verify_checkpoint(path)
    (small_disk / "ballast").unlink()
    for path in list(left.values())[:-1]:
        shutil.rmtree(path)
    make_trainer(run_dir, max_steps=10, save_total_limit=1).train("auto")
    got, expected = fingerprint(run_dir, 10), fingerprint(finished, 10)
    del got["checkpoints"], expected["checkpoints"]
    assert got == expected


# ---- Signals ----


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_resumes_to_the_same_bits(
    finished: Path, tmp_path: Path, signum: int, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signum)
    trainer = make_trainer(tmp_path, max_steps=10)
    trainer.add_callback(AtStep(5, lambda: os.kill(os.getpid(), signum)))
    with pytest.raises(TrainingInterrupted) as caught:
        trainer.train()
    assert signal.getsignal(signum) is before
    assert caught.value.exit_code == code
    assert "after step 5; checkpoint-5 is whole" in str(caught.value)
    assert signal.Signals(signum).name in capfd.readouterr().err
    assert list(list_checkpoints(tmp_path)) == [2, 4, 5]
    make_trainer(tmp_path, max_steps=10).train("auto")
    assert fingerprint(tmp_path, 10) == fingerprint(finished, 10)


def test_signal_where_a_checkpoint_is_due_saves_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=6)
    saved: list[int] = []
    trainer.add_callback(AtStep(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.add_callback(AtStep(4, lambda: saved.append(4), where="save"))
    with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        trainer.train()
    assert saved == [4]


def test_signal_saves_even_where_no_checkpoints_were_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=6, save_strategy="no")
    trainer.add_callback(AtStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(TrainingInterrupted, match="checkpoint-3 is whole"):
        trainer.train()
    verify_checkpoint(tmp_path / "checkpoint-3")
