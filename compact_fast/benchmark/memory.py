"""Peak memory of a GPU, or of this process on a CPU, in MB (10^6 bytes)."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

from compact_fast.heap import can_trim, trim


def rise_mb(run: Callable[[], object], device: torch.device) -> float | None:
    """How far memory rises at its peak during `run`; None where that cannot be told."""
    before = reset_peak(device)
    run()
    return None if before is None else max(0.0, peak_mb(device) - before)


def reset_peak(device: torch.device) -> float | None:
    """Memory in use now; the peak starts anew from it. None where the peak cannot be told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device)) / 1e6
    return _status_mb("VmRSS") if device.type == "cpu" and _forget_peak() else None


def peak_mb(device: torch.device) -> float:
    """The most memory that was in use since `reset_peak`, which must have told a number."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device)) / 1e6
    return _status_mb("VmHWM")


def _forget_peak() -> bool:
    """Linux lets a process forget its high-water mark; memory that was freed is given back first,
    or a run that takes it again would seem to need none."""
    gc.collect()
    if not can_trim():
        return False
    trim()
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
