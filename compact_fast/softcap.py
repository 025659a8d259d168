"""Soft-capped logits, as Gemma 2, 3n and 4 have them: c = cap tanh(z / cap) takes the place of z.

Scores, likelihoods and divergences are those of c; by the chain rule a gradient by c times
dc / dz = 1 - (c / cap)^2 is one by z. A cap of 0 stands for none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def capped(z: Tensor, softcap: float) -> Tensor:
    """Logits of any shape, capped, in new memory if there is a cap."""
    return softcap * torch.tanh(z / softcap) if softcap else z


def cap_(z: Tensor, softcap: float) -> Tensor:
    """The same in place."""
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def slope(c: Tensor, softcap: float, out: Tensor | None = None) -> Tensor:
    """dc / dz of capped logits c, in new memory or `out`; softcap > 0."""
    return torch.addcmul(c.new_ones(1), c, c, value=-(softcap**-2), out=out)
