"""Memory on a CPU for what a forward pass keeps until the backward pass, and what is gone soon.

The C library gives tensors of a few megabytes from one heap. Where those that last lie among
those that are gone a moment later, holes remain that nothing fits, and a process comes to take
several times what it holds. What lasts is therefore made in chunks of its own, or copied there: a
chunk is used again once no tensor in it is left. What does not last has chunks, too.

One tensor that somebody keeps for longer, a gradient or a hidden state, holds its whole chunk, and
torch.save writes all of it: clone what is to stay.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from compact_fast.chunks import Chunk, Chunks, Recycled, bytes_of, tensor_in
from compact_fast.heap import Heap

LEAST_BYTES, MOST_BYTES = 4 << 20, 32 << 20  # of a chunk
ALIGNED = 64  # bytes; a cache line
LEAST_PASSING = 64 << 10  # bytes; smaller ones leave holes that something fits


class Kept(threading.local):
    """Tensors that last about as long as each other, in chunks that they fill from front to back.

    `growing`: a new chunk has as much again as there is, up to MOST_BYTES; else LEAST_BYTES.
    """

    def __init__(self, chunks: Chunks, *, growing: bool = True) -> None:
        self._chunks, self._growing = chunks, growing
        self._now: tuple[Chunk, torch.UntypedStorage] | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that nothing has been written to."""
        size = bytes_of(shape, dtype)
        if self._now is None or self._used + size > self._now[1].nbytes():
            self.close()  # it may be the one to use again
            usual = min(max(LEAST_BYTES, self._chunks.size * self._growing), MOST_BYTES)
            chunk = self._chunks.take(size, usual)
            self._now = chunk, chunk.storage()
        chunk, storage = self._now
        made = tensor_in(storage, self._used, shape, dtype)
        self._used += -(-size // ALIGNED) * ALIGNED
        chunk.reach = max(chunk.reach, self._used)
        return made

    def rewind(self) -> None:
        """Begin the chunk at hand anew if nothing is left in it."""
        if self._now is None or not self._used:
            return
        chunk, self._now = self._now[0], None  # our own reference to it goes, too
        if chunk.empty:
            self._used = 0
        self._now = chunk, chunk.storage()

    def close(self) -> None:
        """Put nothing more into the chunk at hand."""
        self._now, self._used = None, 0


_HEAP = Heap()
_CHUNKS = Chunks()
_LASTING = Kept(_CHUNKS, growing=True)
# What lasts longer than the rest would hold its chunks back:
# until the optimizer's step; small chunks till a large one of the forward pass is free
_GRADIENTS = Kept(_CHUNKS, growing=False)
# while all else of a layer goes and is made again
_RECOMPUTED_FROM = Kept(_CHUNKS, growing=True)

# of a layer's tensors that are not kept
_PASSING = Recycled()


class _Outputs(threading.local):
    last = False


_OUTPUTS = _Outputs()


def passing(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for a tensor that will be gone soon: not in the heap, where it would leave a hole."""
    if like.device.type != "cpu" or bytes_of(shape, like.dtype) < LEAST_PASSING:
        return like.new_empty(shape)
    return _PASSING.whole(shape, like.dtype)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, projections put what they return where it will be kept."""
    _OUTPUTS.last, before = True, _OUTPUTS.last
    try:
        yield
    finally:
        _OUTPUTS.last = before


def output(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for what a projection returns."""
    return (lasting if _OUTPUTS.last else passing)(shape, like)


def lasting(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for a tensor that will be kept."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    return _LASTING.empty(shape, like.dtype)


def settle(t: Tensor, *, recomputed: bool = False) -> Tensor:
    """A tensor where it will be kept, on a CPU; with autograd.

    `recomputed`: it is all that is kept of its layer.
    """
    if t.device.type != "cpu" or t in _CHUNKS:
        return t
    return cast(Tensor, _Settle.apply(t, _RECOMPUTED_FROM if recomputed else _LASTING))  # type: ignore[no-untyped-call]


class _Settle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, where: Kept) -> Tensor:
        _tidy()
        return where.empty(tuple(t.shape), t.dtype).copy_(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _tidy()
        return grad, None


def added(a: Tensor, b: Tensor, *, recomputed: bool = False) -> Tensor:
    """a + b where it will be kept, on a CPU; with autograd. `recomputed` as of `settle`."""
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    if not alike or a.device.type != "cpu":
        return a + b
    if not torch.is_grad_enabled():
        return torch.add(a, b, out=passing(tuple(a.shape), a))
    return cast(Tensor, _Sum.apply(a, b, _RECOMPUTED_FROM if recomputed else _LASTING))  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, where: Kept) -> Tensor:
        _tidy()
        return torch.add(a, b, out=where.empty(tuple(a.shape), a.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        _tidy()
        return grad, grad, None


def begin_layer() -> None:
    """Layers that are made again one by one need the memory of one: nothing is left of the last."""
    _LASTING.rewind()


def _tidy() -> None:
    _HEAP.tidy(_CHUNKS.reach + _PASSING.reach, _CHUNKS.let_go)


def keep(t: Tensor) -> Tensor:
    """The tensor as it is to be kept: on a CPU a copy in memory that lasts, unless it lies there;
    else another name for the same memory, of which autograd notices changes."""
    if t.device.type != "cpu" or t in _CHUNKS:
        return t.detach()
    return lasting(tuple(t.shape), t).copy_(t)


def own_bytes(t: Tensor) -> tuple[int, int]:
    """(address, bytes) of the memory that goes when t goes and nothing else refers to it."""
    if t in _CHUNKS:
        return t.data_ptr(), t.nbytes
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def give_back() -> None:
    """Return memory that nothing is kept in any more to the system."""
    for kept in (_LASTING, _GRADIENTS, _RECOMPUTED_FROM):
        kept.close()
    _CHUNKS.give_back()
    _PASSING.give_back()


def gradient_room(like: Tensor) -> Tensor:
    """Memory for the gradient of a parameter; contiguous."""
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return _GRADIENTS.empty(tuple(like.shape), like.dtype)


def keep_gradient(g: Tensor) -> Tensor:
    """A parameter's gradient, which lasts until the optimizer's step; contiguous."""
    if g.device.type != "cpu":
        return g
    return gradient_room(g).copy_(g)
