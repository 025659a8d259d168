from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from compact_fast.trainer import callbacks
from compact_fast.trainer.callbacks import ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(display: ProgressDisplay, teachers: list[str], steps: int = 4, **state: Any) -> None:
    """The events of a run that logs every second step and evaluates at the end."""
    weights = {f"teacher/{name}/weight": 1 / len(teachers) for name in teachers}
    settings = {"max_steps": steps, "global_step": 0, "is_world_process_zero": True, **state}
    now = SimpleNamespace(**settings)
    display.on_train_begin(None, now, None)
    for step in range(1, steps + 1):
        now.global_step = step
        display.on_step_end(None, now, None)
        if step % 2 == 0:
            logs = {"loss": 2.0 + step, "tokens_per_second": 12345.6, **weights}
            display.on_log(None, now, None, logs=logs)
    display.on_log(None, now, None, logs={"eval_nll": 1.25})
    display.on_log(None, now, None, logs={"train_runtime": 3.0})
    display.on_train_end(None, now, None)


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "_LINE_EVERY", 0.0)
    stream = io.StringIO()
    run(ProgressDisplay("auto", ["ann", "bob"], stream), ["ann", "bob"])
    assert stream.getvalue().splitlines() == [
        "step 2/4  loss 4.0000  weights ann 0.50 bob 0.50  12,346 tokens/s",
        "step 4/4  loss 6.0000  weights ann 0.50 bob 0.50  12,346 tokens/s",
        "step 4/4  held-out NLL 1.2500",
    ]


def test_lines_come_now_and_then_and_the_last_always() -> None:
    stream = io.StringIO()
    run(ProgressDisplay("lines", ["ann"], stream), ["ann"], steps=40)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        "2/40",
        "40/40",
        "40/40",
    ]


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    teachers = ["a-teacher-with-a-very-long-name", *"bcdefgh"]
    run(ProgressDisplay("auto", teachers, stream), teachers)
    text = stream.getvalue()
    assert "4/4" in text
    assert "loss 6.0000" in text
    assert "a-teacher-with 0.12 b 0.12" in text
    assert "+2" in text  # of eight teachers six are shown
    assert "held-out NLL 1.2500" in text
    assert text.count("\n") == 1  # one line, drawn over itself


@pytest.mark.parametrize("kind", ["bar", "lines"])
def test_other_processes_and_none_stay_silent(kind: str) -> None:
    stream = Terminal()
    run(ProgressDisplay(kind, ["ann"], stream), ["ann"], is_world_process_zero=False)
    run(ProgressDisplay("none", ["ann"], stream), ["ann"])
    assert stream.getvalue() == ""
