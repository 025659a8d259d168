"""Which units dropout keeps: on a CPU a seed for all of them, where torch would keep a float each.

Units are drawn again wherever they are applied. Random bits, which torch draws one by one, come
from eight generators in turns for every block of entries, seeded by torch's: a seed still fixes
every number, and recomputation repeats them. The native module draws and applies in one pass
(csrc/dropout.h); without it NumPy does, with the same results.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from compact_fast.lean.kept import passing
from compact_fast.native import native_with

_RANGE = 1 << 16  # a unit is kept where 16 random bits lie below its share of them
_GENERATORS = 8
_BLOCK = 1 << 15  # entries; as in csrc/dropout.h
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Units:
    """Which entries of a tensor are kept."""

    share: float  # the probability it really has
    seed: int = 0
    mask: Tensor | None = None  # not on a CPU: uint8, as the tensor

    @property
    def most(self) -> int:
        """Random bits are below it where a unit is kept."""
        return round(self.share * _RANGE)


def draw(like: Tensor, share: float) -> Units:
    """Units of a tensor, kept with a probability of about `share`."""
    if like.device.type != "cpu":
        mask = (torch.rand(like.shape, device=like.device) < share).view(torch.uint8)
        return Units(share, mask=mask)
    return Units(round(share * _RANGE) / _RANGE, int(torch.randint(1 << 62, ())))


def apply(x: Tensor, units: Units, *, in_place: bool = False) -> Tensor:
    """x with 0 for the units that are not kept."""
    if units.mask is not None:
        return x.mul_(units.mask) if in_place else x * units.mask
    native = _native()
    if native is None:
        gone = torch.from_numpy(~_kept(units, x.numel())).view(x.shape)
        return x.masked_fill_(gone, 0) if in_place else x.masked_fill(gone, 0)
    if not x.is_contiguous():
        found = apply(x.contiguous(), units, in_place=True)
        return x.copy_(found) if in_place else found
    out = x if in_place else passing(tuple(x.shape), x)
    given = (x.data_ptr(), x.itemsize, units.seed, units.most, out.data_ptr())
    native.dropout_apply(*given, x.numel(), torch.get_num_threads())
    return out


def add(into: Tensor, x: Tensor, units: Units) -> Tensor:
    """into + `apply(x, units)`, in place, both contiguous; x may be changed, too."""
    native = _native() if units.mask is None else None
    if native is None or not into.dtype == x.dtype == torch.float32:
        return into.add_(apply(x, units, in_place=True))
    given = (x.data_ptr(), units.seed, units.most, into.data_ptr())
    native.dropout_add(*given, x.numel(), torch.get_num_threads())
    return into


def _kept(units: Units, n: int) -> np.ndarray:
    """What csrc/dropout.h draws, [n] bool."""
    found = [
        _kept_of_block(units, block, min(_BLOCK, n - block * _BLOCK))
        for block in range(-(-n // _BLOCK))
    ]
    return np.concatenate([np.zeros(0, bool), *found])


def _kept_of_block(units: Units, block: int, n: int) -> np.ndarray:
    states = np.ones((4, _GENERATORS), np.uint64)
    first, count = 3 * _GENERATORS * block, 3 * _GENERATORS
    numbers = [_split_mix(units.seed, first + i) for i in range(1, count + 1)]
    states[:3] = np.array(numbers, np.uint64).reshape(3, _GENERATORS)
    turns = -(-n // (4 * _GENERATORS))
    words = np.empty((turns, _GENERATORS), "<u8")
    for i in range(_GENERATORS):
        generator = np.random.SFC64()
        generator.state = {**generator.state, "state": {"state": states[:, i]}}
        words[:, i] = generator.random_raw(turns)
    below: np.ndarray = words.reshape(-1).view("<u2")[:n] < np.uint32(units.most)
    return below


def _split_mix(seed: int, i: int) -> int:
    """The i-th number of SplitMix64."""
    z = (seed + i * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def _native() -> ModuleType | None:
    return native_with("dropout_apply", "dropout on a CPU takes a few percent longer")
