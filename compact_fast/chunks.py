"""Memory of a process's own, used again once nothing lies in it, on a CPU.

What the C library takes from the system it gives back, if it is large: a gradient of a hundred
megabytes then comes anew in every step, page by page, and its pages cost more than what is written
to them.
"""

from __future__ import annotations

import mmap
import sys
import threading
from bisect import bisect_left, insort
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter, mul

import torch
from torch import Tensor

LONG = 4096  # times that others were taken: two to three steps of a model of 30 layers


class Chunk:
    """A piece of memory. `reach`: so many of its bytes were ever in use."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = _map(size)
        self.address = self.storage().data_ptr()
        self.reach = 0
        self.last = 0  # when it was taken, as its owner counts

    def storage(self) -> torch.UntypedStorage:
        """For tensors; each refers to `memory` as long as it lives."""
        return torch.frombuffer(self.memory, dtype=torch.uint8).untyped_storage()

    @property
    def empty(self) -> bool:
        """Whether nothing lies in it."""
        return sys.getrefcount(self.memory) == _ALONE


_SIZE = attrgetter("size")


class Chunks(threading.local):
    """Chunks, each used again when all that lay in it is gone; every thread has its own."""

    def __init__(self) -> None:
        self.all: list[Chunk] = []  # the smallest first
        self._addresses: set[int] = set()

    def __contains__(self, t: Tensor) -> bool:
        return t.device.type == "cpu" and t.untyped_storage().data_ptr() in self._addresses

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(c.size for c in self.all)

    @property
    def reach(self) -> int:
        """Bytes that were ever in use, of all."""
        return sum(c.reach for c in self.all)

    def take(self, size: int, usual: int) -> Chunk:
        """The smallest of at least `size` bytes in which nothing lies; a new one has `usual` if it
        can, and those that are too small go for it, or lengths that rise would leave them all.
        """
        found = self._find(size, sys.maxsize)
        if found is not None:
            return found
        wanted = max(usual, size)
        self.let_go(wanted)
        return self._make(wanted)

    def _find(self, least: int, most: int) -> Chunk | None:
        """The smallest of so many bytes in which nothing lies."""
        for i in range(bisect_left(self.all, least, key=_SIZE), len(self.all)):
            chunk = self.all[i]
            if chunk.size > most:
                break
            if chunk.empty:
                return chunk
        return None

    def _make(self, size: int) -> Chunk:
        new = Chunk(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        insort(self.all, new, key=_SIZE)
        self._addresses.add(new.address)
        return new

    def _drop(self, chunk: Chunk) -> None:
        self.all.remove(chunk)
        self._addresses.remove(chunk.address)

    def whole(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in a chunk of its own, to which nothing has been written."""
        size = bytes_of(shape, dtype)
        chunk = self.take(size, size)
        chunk.reach = max(chunk.reach, size)
        return tensor_in(chunk.storage(), 0, shape, dtype)

    def let_go(self, wanted: int) -> int:
        """Return chunks in which nothing lies to the system, the largest first, `wanted` bytes if
        there are; how many of them were ever in use."""
        free, before = [c for c in self.all if c.empty], self.reach
        while free and wanted > 0:
            chunk = free.pop()
            self._drop(chunk)
            wanted -= chunk.size
        return before - self.reach

    def give_back(self) -> None:
        """Return all those in which nothing lies."""
        self.let_go(self.size)


class Recycled(Chunks):
    """Chunks for tensors that are gone soon and come again: each of about its tensor's size."""

    def __init__(self) -> None:
        super().__init__()
        self._taken = 0

    def take(self, size: int, usual: int) -> Chunk:
        """One of at least `size` bytes and at most twice as many in which nothing lies; for a new
        one those go that were not taken for long."""
        self._taken += 1
        found = self._find(size, 2 * size)
        if found is None:
            for chunk in [c for c in self.all if self._taken - c.last > LONG and c.empty]:
                self._drop(chunk)
            found = self._make(usual)
        found.last = self._taken
        return found


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What a tensor takes."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def tensor_in(
    storage: torch.UntypedStorage, first: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A contiguous tensor that begins at a byte of some memory."""
    # set_, not a view: views count each other's changes in place as their own
    made = torch.empty(0, dtype=dtype)
    made.set_(storage, first // dtype.itemsize, shape, _strides(shape))
    return made


def _map(size: int) -> mmap.mmap:
    """Memory of this process alone: a forked one has its own from then on."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_HUGEPAGE)  # one fault for 2 MiB, not 512
    return memory


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()


def _alone() -> int:
    chunk = Chunk(mmap.PAGESIZE)
    return sys.getrefcount(chunk.memory)


_ALONE = _alone()  # references to memory in which nothing lies, as this Python counts
