"""Matrix products that accumulate and return float32, by the vendor's library.

A product of bfloat16 rows must not be rounded to bfloat16: the head's gradient is a sum over many.
"""

from __future__ import annotations

import torch
from torch import Tensor


def library_is_wide() -> bool:
    """Whether this torch can return float32 from a product of 2-byte operands."""
    return hasattr(torch.ops.aten.addmm, "dtype_out")


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
    if a.dtype != torch.float32 and a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def product_ref(a: Tensor, b: Tensor) -> Tensor:
    """The same in float64."""
    return a.double() @ b.double()
