"""Soft-capped logits inside other kernels: c = CAP tanh(z / CAP), and dc / dz = 1 - (c / CAP)^2.

A gradient by c becomes one by z where a row's entries are written, for c is at hand there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def soft_cap(z, CAP: tl.constexpr):
    """CAP tanh(z / CAP), within a few units in the last place of what is larger, c or CAP / 5."""
    x = z / CAP
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)  # near 0 a difference of two numbers near 1
    s = x * x
    near = a * (1.0 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315))))
    t = tl.where(a < 0.2, near, far)
    return CAP * tl.where(x < 0, -t, t)


@triton.jit
def soft_cap_slope(c, CAP: tl.constexpr):
    """dc / dz of capped logits."""
    part = c / CAP
    return 1.0 - part * part


def soft_cap_ref(z: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(c, dc / dz) in plain torch."""
    c = cap * torch.tanh(z / cap)
    return c, 1 - (c / cap) ** 2
