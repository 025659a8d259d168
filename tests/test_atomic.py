"""compact_fast.atomic: whole or absent, and no damage goes unnoticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compact_fast import atomic
from compact_fast.atomic import (
    DamagedError,
    DiskFullError,
    atomic_directory,
    atomic_file,
    atomic_write_text,
    read_manifest,
    remove_directory,
    remove_leftovers,
    verify_directory,
)


def write_sample(path: Path, text: str = "weights") -> Path:
    with atomic_directory(path, record={"step": 7, "versions": {"torch": "2"}}) as folder:
        (folder / "model.bin").write_bytes(text.encode() * 10)
        (folder / "empty").touch()
        (folder / "sub").mkdir()
        (folder / "sub" / "état.json").write_text("{}", encoding="utf-8")
    return path


def test_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "model", record={"step": 7}) as folder:
        (folder / "a").write_text("x")
        assert folder.name == "model"
        assert not (tmp_path / "deep" / "model").exists()
    manifest = verify_directory(tmp_path / "deep" / "model")
    assert manifest["step"] == 7
    assert list(manifest["files"]) == ["a"]
    assert os.listdir(tmp_path / "deep") == ["model"]


def test_error_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "new") as folder:
        (folder / "absent" / "a").write_text("x")
    assert os.listdir(tmp_path) == []
    write_sample(tmp_path / "old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "old") as folder:
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["old"]
    verify_directory(tmp_path / "old")


@pytest.mark.parametrize("can_swap", [True, False])
def test_existing_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_swap: bool
) -> None:
    if not can_swap:
        monkeypatch.setattr(atomic, "_swap", lambda first, second: False)
    write_sample(tmp_path / "model", "old")
    write_sample(tmp_path / "model", "new")
    assert (tmp_path / "model" / "model.bin").read_bytes() == b"new" * 10
    verify_directory(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is of Linux")
def test_swap_is_one_step_on_linux(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert atomic._swap(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(FileNotFoundError):
        atomic._swap(tmp_path / "a", tmp_path / "absent")


def test_manifest_comes_after_all_files_and_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("_write_manifest", "_fsync", "_move_into_place"):
        original = getattr(atomic, name)

        def spy(*args: object, name: str = name, original: object = original) -> object:
            events.append(f"{name} {Path(str(args[0])).name}")
            return original(*args)  # type: ignore[operator]

        monkeypatch.setattr(atomic, name, spy)
    write_sample(tmp_path / "model")
    assert events[0] == "_write_manifest model"
    flushed = {event.split()[1] for event in events[1:-2]}
    assert flushed == {"model.bin", "empty", "sub", "état.json", "manifest.json", "model"}
    assert events[-2:] == ["_move_into_place model", f"_fsync {tmp_path.name}"]


def test_links_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="link: only plain files"),
        atomic_directory(tmp_path / "model") as folder,
    ):
        (folder / "link").symlink_to("/etc/hostname")
    assert os.listdir(tmp_path) == []


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "model")
    flips = 0
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        intact = path.read_bytes()
        for bit in range(8 * len(intact)):
            damaged = bytearray(intact)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(DamagedError, match=path.name):
                verify_directory(folder)
            flips += 1
        path.write_bytes(intact)
    verify_directory(folder)
    assert flips > 4000  # the manifest's own bits among them


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_change_of_any_file_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = write_sample(tmp_path_factory.mktemp("any") / "model")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    content = data.draw(st.binary(max_size=300).filter(lambda new: new != path.read_bytes()))
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=path.name):
        verify_directory(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.bin").unlink(), "model.bin: missing"),
        (lambda f: os.truncate(f / "model.bin", 3), "model.bin: 3 bytes instead of 70"),
        (lambda f: (f / "sub" / "x").touch(), "sub/x: not in the manifest"),
        (lambda f: (f / "model.bin").write_bytes(b"W" * 70), "model.bin: sha256 differs"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"files"'), "manifest.json is damaged"),
        (lambda f: (f / "sub2").symlink_to(f / "sub"), "sub2: not in the manifest"),
        (lambda f: shutil.rmtree(f), "no such folder"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    folder = write_sample(tmp_path / "model")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(DamagedError) as caught:
        verify_directory(folder)
    assert str(folder) in str(caught.value)
    assert message in str(caught.value)


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "model")
    (folder / "model.bin").unlink()
    (folder / "extra").touch()
    with pytest.raises(DamagedError, match=r"model.bin: missing; extra: not in the manifest"):
        verify_directory(folder)


def test_edited_manifest_with_right_files_is_damage(tmp_path: Path) -> None:
    folder = write_sample(tmp_path / "model")
    body = json.loads((folder / "manifest.json").read_text())
    body["step"] = 8
    (folder / "manifest.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    with pytest.raises(DamagedError, match="its own sha256"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_told_from_other_errors(tmp_path: Path, error: Exception) -> None:
    for write in (atomic_directory, atomic_file):
        message = r"out: no space left on the disk \(.* MB free\)"
        with pytest.raises(DiskFullError, match=message), write(tmp_path / "out"):
            raise error
        assert os.listdir(tmp_path) == []


def test_full_disk_behind_a_bare_runtime_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="file write failed"), atomic_file(tmp_path / "a"):
        raise RuntimeError("PytorchStreamWriter: file write failed")
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 4096)
    with pytest.raises(DiskFullError), atomic_file(tmp_path / "a"):
        raise RuntimeError("PytorchStreamWriter: file write failed")


def test_text_is_replaced_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_text(tmp_path / "run.json", "één")
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == "één"

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic, "_fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        atomic_write_text(tmp_path / "run.json", "two")
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == "één"
    assert os.listdir(tmp_path) == ["run.json"]


def test_leftovers_are_removed_and_a_folder_set_aside_comes_back(tmp_path: Path) -> None:
    write_sample(tmp_path / "kept")
    write_sample(tmp_path / ".lost.old-123")
    write_sample(tmp_path / ".kept.old-123")
    (tmp_path / ".checkpoint-4.tmp-99").mkdir()
    (tmp_path / ".run.json.tmp-98").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".theirs.tmp-x").touch()
    removed = remove_leftovers(tmp_path)
    assert removed == [".checkpoint-4.tmp-99", ".kept.old-123", ".run.json.tmp-98"]
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".theirs.tmp-x", "kept", "lost"]
    assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path / "absent") == []


def test_killed_deletion_leaves_no_half_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path / "checkpoint-2")
    calls = []

    def die_on_second(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_remove", die_on_second)
    with pytest.raises(KeyboardInterrupt):
        remove_directory(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-2").exists()
    monkeypatch.undo()
    assert len(remove_leftovers(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_kill_at_every_system_call_leaves_old_or_new(tmp_path: Path) -> None:
    """SIGKILL just before each flush and each rename of a replacement: never anything between."""
    script = f"""
import os, signal, sys
from pathlib import Path
from compact_fast import atomic
left = int(sys.argv[1])
def dying(original):
    def call(*args):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return call
for name in ("_fsync", "_swap", "_write_manifest", "_move_into_place", "_sha256", "_remove"):
    setattr(atomic, name, dying(getattr(atomic, name)))
with atomic.atomic_directory(Path({str(tmp_path)!r}) / "model") as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
"""
    seen = set()
    for moment in range(100):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        with atomic_directory(tmp_path / "model") as folder:
            (folder / "a").write_text("old")
        code = subprocess.run([sys.executable, "-c", script, str(moment)]).returncode
        verify_directory(tmp_path / "model")
        seen.add((tmp_path / "model" / "a").read_text())
        remove_leftovers(tmp_path)
        assert os.listdir(tmp_path) == ["model"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert moment > 8
    assert seen == {"old", "new"}
