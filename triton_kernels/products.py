"""Matrix products that accumulate and return float32, by the vendor's library.

A product of bfloat16 or float16 rows must not be rounded to that: the head's gradient is a sum over
many chunks. Which forms the library takes differs between torch versions and between CUDA and ROCm,
so it is asked once a device; the check is on the host and waits for nothing.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20  # of a product that has to be added in a second step


@cache
def library_is_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of this dtype into float32 can be had on this device."""
    if device.type != "cuda":
        return True  # computed in float32
    return _accepts(dtype, device, add=False)


@cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the same product can be added to float32 in one step."""
    return _accepts(dtype, device, add=True)


def _accepts(dtype: torch.dtype, device: torch.device, *, add: bool) -> bool:
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        if add:
            torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, a, torch.float32, out=out)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a [m, k] times b [k, n] in float32, into `out` where given."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    if out is None:
        out = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    return out


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [m, n] float32 += a [m, k] times b [k, n]."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda and _adds_wide(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        add_product_by_blocks(out, a, b)


def add_product_by_blocks(out: Tensor, a: Tensor, b: Tensor) -> None:
    """The same where product and sum are two steps: a second copy of `out` is never held."""
    step = max(1, BLOCK_BYTES // (4 * b.shape[1]))
    for rows, part in zip(out.split(step), a.split(step), strict=True):
        rows += product(part, b)


def product_ref(a: Tensor, b: Tensor) -> Tensor:
    """The product in float64."""
    return a.double() @ b.double()
