"""Runs that are killed, in processes forked from one that has already imported torch.

    python survival.py kills ROOT COUNT [TOKENS]   prints a JSON summary of COUNT SIGKILLs,
                                                   of runs with TOKENS a step where given
    python survival.py ranks ROOT                  prints what two gloo processes saw

It is a program of its own because a fork of a test process would inherit its threads' locks.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from toy import make_student, make_trainer
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from compact_fast import atomic
from compact_fast.atomic import atomic_directory, verify_directory
from compact_fast.trainer.checkpoints import list_checkpoints, verify_checkpoint
from compact_fast.trainer.interrupts import TrainingInterrupted

STEPS = 12
SLOW_FLUSH = 0.006  # seconds added to each flush, so that a good part of the run is spent saving
CLOCK = ("time", "tokens_per_second", "questions_per_second", "data_wait_share", "eval_runtime")


def train(run_dir: Path, callback: TrainerCallback | None = None, **changes: Any) -> None:
    """The whole of a run: resume by itself, train, write the model."""
    student = make_student(attention_dropout=0.2)  # so that the random state matters
    settings = {
        "num_train_epochs": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 3,  # checkpoints fall between log rows
        "lr_scheduler_type": "cosine",
        **changes,
    }
    trainer = make_trainer(run_dir, student, **settings)
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train("auto")
    if trainer.is_world_process_zero():
        with atomic_directory(run_dir / "model") as folder:
            trainer.save_model(str(folder))


def fork(work: Callable[[], None], errors: Path) -> int:
    """Start `work` in a forked process; its exit code is 0 unless it raised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        errors.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fingerprint(run_dir: Path) -> dict[str, Any]:
    """Everything that two equal runs agree on: files bit by bit, rows without the clock."""
    last = run_dir / f"checkpoint-{max(list_checkpoints(run_dir))}"
    verify_checkpoint(last)
    verify_directory(run_dir / "model")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    folders = (last, run_dir / "model")
    files = {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for folder in folders
        for path in folder.iterdir()
        if path.name not in ("training_args.bin", "manifest.json")  # they hold the run's path
    }
    window = json.loads(files.pop(f"{last.name}/log_window_0.json"))
    del window["window"]["seconds"], window["window"]["waited"]
    return {
        **files,
        "window": window,
        "metrics.jsonl": [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics],
        "names": sorted(os.listdir(run_dir)),
        "status": json.loads((run_dir / "run.json").read_text())["status"],
    }


def slow_flushes() -> None:
    flush = atomic._fsync

    def slow(path: Path) -> None:
        time.sleep(SLOW_FLUSH)
        flush(path)

    atomic._fsync = slow


def kills(root: Path, count: int, budget: int | None = None) -> dict[str, Any]:
    slow_flushes()
    errors = root / "errors"

    def start(run_dir: Path) -> int:
        return fork(lambda: train(run_dir, max_tokens_per_step=budget), errors)

    began = time.monotonic()
    assert wait(start(root / "whole")) == 0, errors.read_text()
    duration = time.monotonic() - began
    expected = fingerprint(root / "whole")

    rng = random.Random(0)
    where: Counter[str] = Counter()
    wrong: list[str] = []
    too_late = 0
    while (n := where.total()) < count:
        run_dir = root / f"run-{n}"
        pid = start(run_dir)
        # Stratified over the run, so that its start, its saves and its end all get their share.
        time.sleep(duration * (n + rng.random()) / count)
        os.kill(pid, signal.SIGKILL)
        if wait(pid) != -signal.SIGKILL:
            too_late += 1
            duration *= 0.9
            shutil.rmtree(run_dir)
            continue
        # A kill may come before there is a folder.
        stems = {path.name.split("-")[0].removesuffix(".tmp") for path in run_dir.glob(".*")}
        if ".checkpoint" in stems:
            where["inside a save"] += 1
        elif stems:
            where["inside another write"] += 1
        elif not list_checkpoints(run_dir):
            where["before the first checkpoint"] += 1
        else:
            where["between saves"] += 1
        newest = max(list_checkpoints(run_dir), default=0)
        if wait(start(run_dir)) != 0:
            wrong.append(f"kill {n}: could not resume: {errors.read_text()}")
            continue
        run = json.loads((run_dir / "run.json").read_text())
        if [resumed["step"] for resumed in run.get("resumed", [])] != [newest][: bool(newest)]:
            wrong.append(f"kill {n}: resumed at {run.get('resumed')}, not at {newest}")
        found = fingerprint(run_dir)
        differing = [name for name in expected if found.get(name) != expected[name]]
        if differing or found.keys() != expected.keys():
            wrong.append(f"kill {n}: differs in {differing}")
        shutil.rmtree(run_dir)
    return {
        "kills": count,
        "steps": max(list_checkpoints(root / "whole")),
        "where": dict(where),
        "wrong": wrong,
        "too_late": too_late,
        "seconds_of_the_whole_run": round(duration, 2),
        "seconds": round(time.monotonic() - began, 1),
    }


class _OnRank(TrainerCallback):
    """Calls `action` on one of the processes, in the middle of a step."""

    def __init__(self, rank: int, step: int, action: Callable[[], object]) -> None:
        self.rank, self.step, self.action = rank, step, action

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index == self.rank and state.global_step + 1 == self.step:
            self.action()


def together(root: Path, name: str, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` returned, or the error it raised, in two processes of one group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank: int) -> None:
        os.environ.update(
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        )
        try:
            result = work(rank)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        (root / f"{name}-{rank}.json").write_text(json.dumps(result))

    pids = [fork(lambda rank=rank: one(rank), root / f"errors-{rank}") for rank in (0, 1)]
    for rank, pid in enumerate(pids):
        assert wait(pid) == 0, (root / f"errors-{rank}").read_text()
    return [json.loads((root / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def ranks(root: Path) -> dict[str, Any]:
    settings = {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}

    def whole(rank: int) -> Any:
        train(root / "whole", **settings)
        return verify_checkpoint(root / "whole" / f"checkpoint-{STEPS}")["files"]

    def interrupted(rank: int) -> Any:
        stop = _OnRank(1, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            train(root / "run", stop, **settings)
        except TrainingInterrupted as error:
            return str(error)
        return "not interrupted"

    def resumed(rank: int) -> Any:
        train(root / "run", **settings)
        return verify_checkpoint(root / "run" / f"checkpoint-{STEPS}")["files"]

    def failing(rank: int) -> Any:
        original = torch.save

        def save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if rank == 1 and "checkpoint-4" in str(path):
                raise OSError(5, "Input/output error")
            original(obj, path, *args, **kwargs)

        torch.save = save
        train(root / "failing", **settings)

    def damaged(rank: int) -> Any:
        (root / "failing" / "checkpoint-2" / "extra").touch()
        make_trainer(root / "failing", **settings).train(root / "failing" / "checkpoint-2")

    return {
        "whole": together(root, "whole", whole),
        "interrupted": together(root, "interrupted", interrupted),
        "resumed": together(root, "resumed", resumed),
        "failing": together(root, "failing", failing),
        "left": sorted(os.listdir(root / "failing")),
        "damaged": together(root, "damaged", damaged),
    }


def main() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    root = Path(sys.argv[2])
    root.mkdir(parents=True, exist_ok=True)
    # A bar's lock is shared with the processes forked later: one killed in it stops them all.
    disable_progress_bar()
    if sys.argv[1] == "kills":
        summary = kills(root, *map(int, sys.argv[3:]))
    else:
        summary = ranks(root)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
