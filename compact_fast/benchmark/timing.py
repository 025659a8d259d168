"""Time and memory of several ways to compute one thing, taken in turns.

Machines are noisy: variants run one after another, round by round, and medians are compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from compact_fast.benchmark.memory import rise_mb

Run = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """Medians of one variant; an error instead of figures where it could not run."""

    milliseconds: float | None = None
    peak_mb: float | None = None  # beyond what was held before, gradients included; None: unknown
    error: str | None = None


def measure(
    variants: Mapping[str, Run],
    device: torch.device,
    *,
    clear: Callable[[], object],
    rounds: int = 5,
) -> dict[str, Measured]:
    """Every variant's time and peak memory. Its first run, which may compile, does not count.

    clear: drops what a run leaves behind, such as gradients, so that memory counts it again.
    A variant that raises is reported with its error and does not stop the others.
    """
    peaks: dict[str, float | None] = {}
    errors: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name, run in variants.items():
        try:
            run()
            clear()
            peaks[name] = rise_mb(run, device)
        except Exception as error:  # a peer may raise anything
            errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
    for _ in range(rounds):
        for name, run in variants.items():
            if name not in errors:
                times[name].append(_milliseconds(run, device))
    return {
        name: Measured(error=errors[name])
        if name in errors
        else Measured(statistics.median(times[name]), peaks[name])
        for name in variants
    }


def _milliseconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
