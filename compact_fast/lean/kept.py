"""Memory for what a forward pass keeps until the backward pass, on a CPU.

The C library gives tensors of a few megabytes from one heap. Where those that last lie among
those that are gone a moment later, holes remain that nothing fits, and a process comes to take
several times what it holds. What lasts is therefore copied into chunks of its own: a chunk is used
again once no tensor in it is left.
"""

from __future__ import annotations

import mmap
import sys
import threading
from itertools import accumulate
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor

LEAST_BYTES, MOST_BYTES = 4 << 20, 32 << 20  # of a chunk: as much again as there is already
ALIGNED = 64  # bytes; a cache line


class Kept(threading.local):
    """Chunks, filled from front to back, each used again when all that lay in it is gone.

    Every thread has its own.
    """

    def __init__(self) -> None:
        self._all: list[mmap.mmap] = []
        self._addresses: list[int] = []  # of the chunks
        self._now: torch.UntypedStorage | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that nothing has been written to."""
        size = dtype.itemsize
        for n in shape:
            size *= n
        if self._now is None or self._used + size > self._now.nbytes():
            self._now, self._used = None, 0  # let go of it, for it may be the one to use again
            self._now = self._chunk(size)
        # set_, not a view: views count each other's changes in place as their own
        made = torch.empty(0, dtype=dtype)
        made.set_(self._now, self._used // dtype.itemsize, shape, _strides(shape))
        self._used += -(-size // ALIGNED) * ALIGNED
        return made

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor lies in one of the chunks."""
        return t.device.type == "cpu" and t.untyped_storage().data_ptr() in self._addresses

    def give_back(self) -> None:
        """Return chunks in which nothing is left to the system."""
        self._now = None
        for i in reversed(range(len(self._all))):
            if _references(self._all, i) == _ALONE:
                del self._all[i], self._addresses[i]

    def _chunk(self, size: int) -> torch.UntypedStorage:
        for i in range(len(self._all)):
            if _references(self._all, i) == _ALONE and len(self._all[i]) >= size:
                return _storage(self._all[i])
        usual = min(max(LEAST_BYTES, sum(map(len, self._all))), MOST_BYTES)
        memory = _map(max(usual, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE))
        storage = _storage(memory)
        self._all.append(memory)
        self._addresses.append(storage.data_ptr())
        return storage


def _references(memories: list[mmap.mmap], i: int) -> int:
    """How many refer to a piece of memory; a storage over it, as long as it lives, is one."""
    return sys.getrefcount(memories[i])


_ALONE = _references([mmap.mmap(-1, mmap.PAGESIZE)], 0)  # the list alone, as this Python counts


def _storage(memory: mmap.mmap) -> torch.UntypedStorage:
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _map(size: int) -> mmap.mmap:
    """Memory of this process alone: a forked one has its own from then on."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_HUGEPAGE)  # one fault for 2 MiB, not 512
    return memory


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()


_LASTING = Kept()
# What lasts longer than the rest would hold its chunks back:
_GRADIENTS = Kept()  # until the optimizer's step
_RECOMPUTED_FROM = Kept()  # while all else of a layer goes and is made again
_EVERY = (_LASTING, _GRADIENTS, _RECOMPUTED_FROM)


def lasting(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for a tensor that will be kept."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    return _LASTING.empty(shape, like.dtype)


def settle(t: Tensor, *, recomputed: bool) -> Tensor:
    """What leads from one layer to the next, where it will be kept; with autograd.

    `recomputed`: it is all that is kept of its layer.
    """
    return cast(Tensor, _Settle.apply(t, _RECOMPUTED_FROM if recomputed else _LASTING))  # type: ignore[no-untyped-call]


class _Settle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, where: Kept) -> Tensor:
        return where.empty(tuple(t.shape), t.dtype).copy_(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def keep(t: Tensor) -> Tensor:
    """The tensor as it is to be kept: on a CPU a copy in memory that lasts, unless it lies there;
    else another name for the same memory."""
    if t.device.type != "cpu" or _LASTING.holds(t) or _RECOMPUTED_FROM.holds(t):
        same = t.new_empty(0)
        return same.set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())
    return lasting(tuple(t.shape), t).copy_(t)


def own_bytes(t: Tensor) -> tuple[int, int]:
    """(address, bytes) of the memory that goes when t goes and nothing else refers to it."""
    if any(kept.holds(t) for kept in _EVERY):
        return t.data_ptr(), t.nbytes
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def give_back() -> None:
    """Return memory that nothing is kept in any more to the system."""
    for kept in _EVERY:
        kept.give_back()


def keep_gradient(g: Tensor) -> Tensor:
    """A parameter's gradient, which lasts until the optimizer's step; contiguous."""
    if g.device.type != "cpu":
        return g
    return _GRADIENTS.empty(tuple(g.shape), g.dtype).copy_(g)
