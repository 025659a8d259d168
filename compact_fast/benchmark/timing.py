"""Time and memory of several ways to compute one thing, taken in turns.

Machines are noisy: variants run one after another, round by round, and medians are compared.
"""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

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
            peaks[name] = peak_mb(run, device)
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


def peak_mb(run: Run, device: torch.device) -> float | None:
    """How far memory rises during `run`, in MB (10^6 bytes); None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = float(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device.type != "cpu" or not _reset_peak():
        run()
        return None
    before = _status_mb("VmRSS")
    run()
    return max(0.0, _status_mb("VmHWM") - before)


def _reset_peak() -> bool:
    """Linux lets a process forget its high-water mark; memory that was freed is given back first,
    or a run that takes it again would seem to need none."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_mb(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, name
    return int(found.group(1)) * 1024 / 1e6
