"""The C library's heap, kept from growing by several times what lies in it.

A tensor of a few megabytes that is freed leaves a hole. glibc asks for a little more than a tensor
takes, to align it, and small objects that last settle in what is left over: the next tensor of the
same size does not fit, and the heap grows. Where memory has grown so, pages of holes are given back
to the system; they come again when a tensor does lie there.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from functools import cache
from pathlib import Path

LEAST_GROWTH = 24 << 20  # bytes


class Heap(threading.local):
    """Watches what memory takes beside `accounted` bytes; every thread for itself."""

    def __init__(self) -> None:
        self._floor: int | None = None
        self._bearable = LEAST_GROWTH

    def tidy(self, accounted: int) -> None:
        """Give holes back if memory has grown; less often the less that gives."""
        resident = resident_bytes()
        if not resident or not can_trim():
            return
        now = resident - accounted
        if self._floor is None or now < self._floor:
            self._floor = now
        grown = now - self._floor
        if grown < self._bearable:
            return
        trim()
        self._floor = resident_bytes() - accounted
        useful = now - self._floor > grown / 2
        self._bearable = LEAST_GROWTH if useful else 2 * self._bearable


def resident_bytes() -> int:
    """Physical memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return 0


@cache
def can_trim() -> bool:
    """Whether the C library is glibc, which can."""
    try:
        return hasattr(ctypes.CDLL(None), "malloc_trim")
    except (OSError, TypeError):  # TypeError: Windows
        return False


def trim() -> None:
    """Give pages of the heap in which nothing lies back to the system."""
    if can_trim():
        ctypes.CDLL(None).malloc_trim(0)
