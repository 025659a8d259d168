"""What a run leaves to read: run.json, metrics.jsonl, and a line or a bar for whoever watches."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from transformers import TrainerCallback

from compact_fast._version import __version__
from compact_fast.atomic import atomic_write_text

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
_LINE_EVERY = 5.0  # seconds between lines where there is no bar


class RunFiles(TrainerCallback):
    """Writes run.json (what ran and how it ended) and metrics.jsonl (one row a log event).

    A resumed run keeps the rows up to the step it resumes from and appends; a fresh one starts
    both files anew. The last step always ends in a row, whatever logging_steps is. `info` goes
    into run.json as it is. Only the main process writes.
    """

    first_step = 0
    """Steps that were done when this session began to train."""

    def __init__(self, info: Mapping[str, Any]) -> None:
        self._info = dict(info)
        self._run: dict[str, Any] = {}
        self._folder = Path()
        self._clock = 0.0  # time.monotonic() at the (virtual) start of the run
        self._evaluated = -1  # last step with an evaluation row

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step
        if not state.is_world_process_zero:
            return
        self._folder = Path(args.output_dir)
        kept = _rows(self._folder / METRICS_FILE) if state.global_step else []
        kept = [row for row in kept if row["step"] <= state.global_step]
        self._clock = time.monotonic() - (kept[-1]["time"] if kept else 0.0)
        self._evaluated = max((row["step"] for row in kept if "eval_nll" in row), default=-1)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        atomic_write_text(self._folder / METRICS_FILE, text)
        before = _read_run(self._folder / RUN_FILE) if state.global_step else {}
        now = _now()
        self._run = {
            "config": _configuration(args),
            "versions": _versions(),
            **self._info,
            "started": before.get("started", now),
            "steps": state.max_steps,
            "status": "running",
        }
        if state.global_step:
            resumed = {"step": state.global_step, "at": now}
            self._run["resumed"] = [*before.get("resumed", []), resumed]
        self._write()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # on every process, as all of them add up the row
        if control.should_training_stop and args.logging_strategy != "no":
            control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        training, evaluation = "loss" in logs, "eval_nll" in logs
        if not state.is_world_process_zero or not (training or evaluation) or not self._run:
            return
        if evaluation and not training:
            if state.global_step == self._evaluated:
                return
            self._evaluated = state.global_step
        row = {"step": state.global_step, "time": round(time.monotonic() - self._clock, 3), **logs}
        row = {k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
        with (self._folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end(state.is_world_process_zero, "finished", state.global_step)

    def stopped(self, step: int, error: BaseException) -> None:
        """Record that an error or a signal ended the run. Call it on the main process."""
        reason = str(error) or type(error).__name__
        with contextlib.suppress(OSError):  # the error that is on its way (a full disk) says more
            self._end(True, f"stopped: {reason}", step)

    def _end(self, main: bool, status: str, step: int) -> None:
        if main and self._run:
            self._run.update(status=status, finished=_now(), last_step=step)
            self._write()

    def _write(self) -> None:
        atomic_write_text(self._folder / RUN_FILE, json.dumps(self._run, indent=2) + "\n")


class ProgressDisplay(TrainerCallback):
    """Steps, loss and the teachers' weights: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, kind: str, teachers: list[str], stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        if kind == "auto":
            kind = "bar" if self._stream.isatty() else "lines"
        self._kind, self._teachers = kind, teachers
        self._bar: Any = None
        self._last_line = -math.inf

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_line = -math.inf
        if self._kind == "bar" and state.is_world_process_zero:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or self._kind == "none":
            return
        if "loss" in logs:
            text = self._training(logs)
            last = state.global_step >= state.max_steps
        elif "eval_nll" in logs:
            text, last = f"held-out NLL {logs['eval_nll']:.4f}", True
        else:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._kind == "lines" and (last or now - self._last_line >= _LINE_EVERY):
            self._last_line = now
            print(f"step {state.global_step}/{state.max_steps}  {text}", file=self._stream)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _training(self, logs: dict[str, Any]) -> str:
        weights = [
            f"{name[:14]} {logs[key]:.2f}"
            for name in self._teachers
            if (key := f"teacher/{name}/weight") in logs
        ]
        shown = weights if len(weights) <= 6 else [*weights[:6], f"+{len(weights) - 6}"]
        speed = f"{logs.get('tokens_per_second', 0):,.0f} tokens/s"
        return f"loss {logs['loss']:.4f}  weights {' '.join(shown)}  {speed}"


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _read_run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _configuration(args: Any) -> dict[str, Any]:
    """What a run that names no configuration of its own was set to."""
    names = (
        *("learning_rate", "lr_scheduler_type", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_grad_norm"),
        *("bf16", "gradient_checkpointing", "seed"),
    )
    values = args.to_dict()
    return {**asdict(args.compact), **{name: values[name] for name in names}}


def _versions() -> dict[str, str]:
    return {
        "compact_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
