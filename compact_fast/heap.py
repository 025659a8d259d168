"""The C library's heap, kept from growing by several times what lies in it.

A tensor of a few megabytes that is freed leaves a hole. glibc asks for a little more than a tensor
takes, to align it, and small objects that last settle in what is left over: the next tensor of the
same size does not fit, and the heap grows. Where memory has grown so, pages of holes are given back
to the system; they come again when a tensor does lie there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from functools import cache

LEAST_GROWTH = 24 << 20  # bytes
MOST_IN_HEAP = 32 << 20  # bytes of a block; glibc allows no more
MOST_AT_TOP = 512 << 20  # bytes that are free at the heap's end
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Heap(threading.local):
    """Watches what memory takes; every thread for itself."""

    def __init__(self) -> None:
        self._floor: int | None = None
        self._bearable = LEAST_GROWTH
        self._most_beside = 0

    def tidy(self, beside: int, let_go: Callable[[int], int]) -> None:
        """Keep holes from raising the process's peak.

        `beside`: bytes of memory that is not the heap's. Where there is less of it than there was
        once, holes may take the rest. `let_go(n)` returns n bytes of it to the system, if in so
        many nothing lies, and says how many: colder memory than holes, which the next tensors
        fill. Only then holes are given back, less often the less that gives.
        """
        resident = resident_bytes()
        if not resident or not can_trim():
            return
        self._most_beside = max(self._most_beside, beside)
        now = resident - beside
        if self._floor is None or now < self._floor:
            self._floor = now
        grown = resident - self._most_beside - self._floor
        if grown < self._bearable:
            return
        gone = let_go(grown)
        if grown - gone < self._bearable:
            return
        trim()
        self._floor = resident_bytes() - (beside - gone)
        useful = now - self._floor > grown / 2
        self._bearable = LEAST_GROWTH if useful else 2 * self._bearable


def resident_bytes() -> int:
    """Physical memory of this process; 0 where the system does not tell."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)  # as often as this is read, not by `Path`
        try:
            return int(os.read(file, 128).split()[1]) * mmap.PAGESIZE
        finally:
            os.close(file)
    except (OSError, IndexError, ValueError):
        return 0


@cache
def can_trim() -> bool:
    """Whether the C library is glibc, which can."""
    try:
        return hasattr(ctypes.CDLL(None), "malloc_trim")
    except (OSError, TypeError):  # TypeError: Windows
        return False


def keep_top() -> None:
    """Let the heap keep what is freed at its end, for the whole process, until it is trimmed.

    glibc returns it to the system when it is twice the largest block so far, and a backward pass
    takes and frees some tens of megabytes for every layer: all its pages came anew every time, 2
    microseconds each on a virtual machine. Whoever has set glibc's MALLOC_ variables or tunables
    keeps what they chose.
    """
    if can_trim() and not any(v.startswith(("MALLOC_", "GLIBC_TUNABLES")) for v in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, MOST_IN_HEAP)  # what glibc would come to by itself
        libc.mallopt(_M_TRIM_THRESHOLD, MOST_AT_TOP)


def trim() -> None:
    """Give pages of the heap in which nothing lies back to the system."""
    if can_trim():
        ctypes.CDLL(None).malloc_trim(0)
