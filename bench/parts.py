"""Where the seconds of a training step go, told by hooks: data, body, head and loss, scores.

A clock is always in one part. The body's forward hooks, a hook on the gradient of its hidden
states (there the head's backward pass ends and the body's begins) and the functions that make
scores switch it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

PARTS = ("data", "body_forward", "head_and_loss", "scores", "body_backward", "optimizer")

# Functions whose time is that of scores and weights, where they are looked up.
SCORES = (
    ("compact_fast.backends.torch_backend", "layout_weights"),
    ("compact_fast.backends.torch_backend", "adaptability"),
    ("compact_fast.backends.torch_backend", "difficulty"),
    ("bench.published", "adaptability"),
    ("bench.published", "attention_consensus"),
    ("bench.published", "z_score"),
)


class Clock:
    """Seconds by part, over rounds."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self.positions = 0  # that the body has read, padding included
        self._spent: dict[str, float] = defaultdict(float)
        self._part, self._since = "", 0.0

    def enter(self, part: str) -> str:
        """Switch to a part; returns the one before."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, before = time.perf_counter(), self._part
        if before:
            self._spent[before] += now - self._since
        self._part, self._since = part, now
        return before

    @contextmanager
    def round(self) -> Iterator[None]:
        """One step: its seconds by part, on the wall, and of all processors together."""
        self._spent.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.enter("")
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        self.rounds.append(spent | {part: self._spent.get(part, 0.0) for part in PARTS})

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Inside, the model's body and the scores switch the clock."""
        from compact_fast.students import causal_model

        body = causal_model(model).base_model

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
            self.positions += ids.numel()
            self.enter("body_forward")

        def end(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            hidden = output.last_hidden_state
            if hidden.requires_grad:
                hidden.register_hook(self._head_done)
            self.enter("head_and_loss")

        with ExitStack() as stack:
            for handle in (
                body.register_forward_pre_hook(begin, with_kwargs=True),
                body.register_forward_hook(end, with_kwargs=True),
            ):
                stack.callback(handle.remove)
            for module, name in SCORES:
                stack.enter_context(_timed(self, module, name))
            self.enter("data")
            yield

    def _head_done(self, gradient: Any) -> None:
        self.enter("body_backward")


def _timed(clock: Clock, module: str, name: str) -> Any:
    import importlib

    original: Callable[..., Any] = getattr(importlib.import_module(module), name)

    def run(*args: Any, **kwargs: Any) -> Any:
        before = clock.enter("scores")
        try:
            return original(*args, **kwargs)
        finally:
            clock.enter(before)

    return patch(f"{module}.{name}", run)
