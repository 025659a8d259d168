"""Scaling whole gradients by a number that only the device knows.

A head's gradient is the largest tensor of a step, so each pass over it counts:

    divide_into       out = x / by, in the dtype of `out`: division and rounding in one pass
    multiply_unless_one   x *= by, without a pass where `by` is 1, as it is in most backward passes
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED

BLOCK = 4096  # elements a program: 16 bytes a thread and load, four loads under way


@triton.jit(do_not_specialize=["size"])
def divide_into_kernel(
    x_ptr,  # [size] float32
    by_ptr,  # [1] float
    out_ptr,  # [size]
    size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(by_ptr).to(tl.float32)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    out = tl.div_rn(x, tl.zeros((BLOCK,), dtype=tl.float32) + by)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=i < size)


def divide_into(
    x: Tensor,  # any shape, float32, contiguous
    by: Tensor,  # one element, any float dtype
    out: Tensor,  # shape of x, contiguous, any float dtype; may be x
) -> Tensor:
    """out = x / by."""
    size = x.numel()
    if size:
        divide_into_kernel[(triton.cdiv(size, BLOCK),)](
            x, by, out, size, BLOCK=BLOCK, num_warps=4, num_stages=1, **UNFUSED
        )
    return out


def divide_into_ref(x: Tensor, by: Tensor, out: Tensor) -> Tensor:
    """The same in plain torch."""
    return out.copy_(x / by)


@triton.jit(do_not_specialize=["size"])
def multiply_unless_one_kernel(
    x_ptr,  # [size]
    by_ptr,  # [1] float
    size,
    BLOCK: tl.constexpr,
):
    by = tl.load(by_ptr).to(tl.float32)
    if by != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
        tl.store(x_ptr + i, (x * by).to(x_ptr.dtype.element_ty), mask=i < size)


def multiply_unless_one(
    x: Tensor,  # any shape, contiguous, any float dtype but float64
    by: Tensor,  # one element, any float dtype
) -> Tensor:
    """x *= by."""
    size = x.numel()
    if size:
        multiply_unless_one_kernel[(triton.cdiv(size, BLOCK),)](
            x, by, size, BLOCK=BLOCK, num_warps=4, num_stages=1, **UNFUSED
        )
    return x


def multiply_unless_one_ref(x: Tensor, by: Tensor) -> Tensor:
    """The same in plain torch."""
    return x.mul_(by)
