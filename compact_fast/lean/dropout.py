"""Which units dropout keeps, with a bit an entry on a CPU, where torch would keep a float.

Random bits, which torch draws one by one, come from eight generators in turns, seeded by torch's:
a seed still fixes every number, and recomputation repeats them. The native module draws and
applies them (csrc/dropout.h); without it NumPy does, with the same results.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from compact_fast.lean.kept import lasting, passing
from compact_fast.native import native_with

_RANGE = 1 << 16  # a unit is kept where 16 random bits lie below its share of them
_GENERATORS = 8
_WORD = (1 << 64) - 1


def draw(like: Tensor, share: float, *, last: bool = False) -> tuple[Tensor, float]:
    """(which units are kept, for `apply`; the probability it really has).

    On a CPU uint8 [ceil(entries / 8)], entry i in bit i % 8 of byte i // 8; elsewhere uint8 as
    `like`. `last`: where it will be kept.
    """
    if like.device.type != "cpu":
        return (torch.rand(like.shape, device=like.device) < share).view(torch.uint8), share
    n, most = like.numel(), round(share * _RANGE)
    seed = int(torch.randint(1 << 62, ()))
    shape = (-(-n // 8),)
    bits = lasting(shape, like, torch.uint8) if last else torch.empty(shape, dtype=torch.uint8)
    native = _native()
    if most in (0, _RANGE):
        bits.fill_(255 * (most > 0))
    elif native is None:
        bits.copy_(torch.from_numpy(_draw(seed, most, n)))
    else:
        native.dropout_draw(seed, most, bits.data_ptr(), n)
    return bits, most / _RANGE


def _draw(seed: int, most: int, n: int) -> np.ndarray:
    turns = -(-n // (4 * _GENERATORS))
    words = np.empty((turns, _GENERATORS), "<u8")
    states = np.ones((4, _GENERATORS), np.uint64)
    states[:3] = np.array(_split_mix(seed, 3 * _GENERATORS), np.uint64).reshape(3, _GENERATORS)
    for i in range(_GENERATORS):
        generator = np.random.SFC64()
        generator.state = {**generator.state, "state": {"state": states[:, i]}}
        words[:, i] = generator.random_raw(turns)
    return np.packbits(words.reshape(-1).view("<u2")[:n] < most, bitorder="little")


def _split_mix(seed: int, count: int) -> list[int]:
    """So many numbers of SplitMix64."""
    found = []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & _WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        found.append(z ^ (z >> 31))
    return found


def apply(x: Tensor, kept: Tensor, *, in_place: bool = False) -> Tensor:
    """x with 0 for the units that are not kept; `kept` from `draw`."""
    if kept.shape == x.shape and x.device.type != "cpu":
        return x.mul_(kept) if in_place else x * kept
    native = _native()
    if native is None:
        units = torch.from_numpy(np.unpackbits(kept.numpy(), count=x.numel(), bitorder="little"))
        gone = units.view(x.shape) == 0
        return x.masked_fill_(gone, 0) if in_place else x.masked_fill(gone, 0)
    if not x.is_contiguous():
        found = apply(x.contiguous(), kept, in_place=True)
        return x.copy_(found) if in_place else found
    out = x if in_place else passing(tuple(x.shape), x)
    places = (x.data_ptr(), x.itemsize, kept.data_ptr(), out.data_ptr())
    native.dropout_apply(*places, x.numel(), torch.get_num_threads())
    return out


def add(into: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """into + `apply(x, kept)`, in place, both contiguous; x may be changed, too."""
    native = _native()
    if native is None or into.device.type != "cpu" or not into.dtype == x.dtype == torch.float32:
        return into.add_(apply(x, kept, in_place=True))
    places = (x.data_ptr(), kept.data_ptr(), into.data_ptr())
    native.dropout_add(*places, x.numel(), torch.get_num_threads())
    return into


def _native() -> ModuleType | None:
    return native_with("dropout_apply", "dropout on a CPU takes a few percent longer")
