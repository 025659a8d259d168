"""Row scaling around the two gradient products, once the weights are known.

With E / S = softmax - onehot of a row and its factor f = alpha / |A| (0 where it has no label):

    dH[at] (+)= (f / S) (E W)[r]          dW += E^T ((f / S) x[r])

Factors are read through the row's sequence, on the device. A row with factor 0 adds exactly 0,
whatever it holds: NaN and infinity do not leak.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, next_power_of_2


# slices of a batch's vectors start anywhere: their alignment must not compile anything anew
@triton.jit(
    do_not_specialize=["n", "first_sequence"],
    do_not_specialize_on_alignment=["weights_ptr", "labels_ptr"],
)
def row_factors_kernel(
    weights_ptr,  # [S] float32
    labels_ptr,  # [S] int64: label counts
    sequence_ptr,  # [n] int64
    targets_ptr,  # [n] int64
    total_ptr,  # [n] float32
    out_ptr,  # [n] float32
    n,
    first_sequence,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < n
    s = tl.load(sequence_ptr + r, mask=inside, other=0) - first_sequence
    labelled = inside & (tl.load(targets_ptr + r, mask=inside, other=-1) >= 0)
    alpha = tl.load(weights_ptr + s, mask=labelled, other=0.0)
    count = tl.load(labels_ptr + s, mask=labelled, other=1).to(tl.float32)
    total = tl.load(total_ptr + r, mask=labelled, other=1.0)
    # alpha is 0 where anything in the sequence was not finite, S among it
    factor = tl.where(labelled & (alpha > 0), alpha / count / total, 0.0)
    tl.store(out_ptr + r, factor, mask=inside)


def row_factors(
    weights: Tensor,  # [S] float32
    labels: Tensor,  # [S] int64
    sequence: Tensor,  # [n] int64
    targets: Tensor,  # [n] int64
    total: Tensor,  # [n] float32
    *,
    first_sequence: int = 0,  # the sequence that weights[0] and labels[0] belong to
) -> Tensor:  # [n] float32
    """weights / labels / total of each row; 0 without a label or a weight."""
    out = torch.empty_like(total)
    n = out.numel()
    if n:
        row_factors_kernel[(triton.cdiv(n, 256),)](
            weights, labels, sequence, targets, total, out, n, first_sequence, BLOCK=256,
            num_warps=2, num_stages=1, **UNFUSED,
        )  # fmt: skip
    return out


def row_factors_ref(
    weights: Tensor,
    labels: Tensor,
    sequence: Tensor,
    targets: Tensor,
    total: Tensor,
    *,
    first_sequence: int = 0,
) -> Tensor:
    """The same in plain torch."""
    s = sequence - first_sequence
    factor = weights[s] / labels[s] / total
    return torch.where((targets >= 0) & (weights[s] > 0), factor, 0.0)


@triton.jit(do_not_specialize_on_alignment=["from_ptr", "to_ptr"])
def scale_rows_kernel(
    x_ptr,  # [*, D]
    from_ptr,  # [n] int64: rows of x, or unused
    factor_ptr,  # [n] float32
    out_ptr,  # [*, D]
    to_ptr,  # [n] int64: rows of out, negative: none; or unused
    D,
    stride_x,
    stride_out,
    HAS_FROM: tl.constexpr,
    HAS_TO: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = r
    if HAS_FROM:
        source = tl.load(from_ptr + r)
    to = r
    if HAS_TO:
        to = tl.load(to_ptr + r)
    factor = tl.load(factor_ptr + r)
    inside = d < tl.where(to >= 0, D, 0)
    x = tl.load(x_ptr + source * stride_x + d, mask=d < tl.where(factor != 0, D, 0), other=0.0)
    value = x.to(tl.float32) * factor
    at = out_ptr + to * stride_out + d
    if ADD:
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=inside)


def scale_rows(
    x: Tensor,  # [*, D]
    factor: Tensor,  # [n] float32
    out: Tensor,  # [*, D], any float dtype
    *,
    source: Tensor | None = None,  # [n] int64; row r reads x[source[r]], else x[r]
    to: Tensor
    | None = None,  # [n] int64, no row twice; row r goes to out[to[r]], negative: nowhere
    add: bool = False,
) -> Tensor:
    """out[to[r]] (+)= factor[r] x[source[r]]; exactly 0 where the factor is 0."""
    n, D = factor.numel(), x.shape[1]
    block = min(1024, next_power_of_2(D))
    if n:
        scale_rows_kernel[(n, triton.cdiv(D, block))](
            x, factor if source is None else source, factor, out, factor if to is None else to,
            D, x.stride(0), out.stride(0), HAS_FROM=source is not None, HAS_TO=to is not None,
            ADD=add, BLOCK_D=block, num_warps=4, num_stages=1, **UNFUSED,
        )  # fmt: skip
    return out


def scale_rows_ref(
    x: Tensor,
    factor: Tensor,
    out: Tensor,
    *,
    source: Tensor | None = None,
    to: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """The same in plain torch."""
    rows = x[: factor.numel()] if source is None else x[source]
    value = torch.where(factor[:, None] != 0, rows * factor[:, None], 0.0)
    to = torch.arange(factor.numel()) if to is None else to
    keep = to >= 0
    base = out[to[keep]] if add else torch.zeros_like(out[to[keep]])
    out[to[keep]] = (base + value[keep]).to(out.dtype)
    return out


@triton.jit
def clear_rows_kernel(
    e_ptr,  # [n, V], row stride stride_e
    factor_ptr,  # [n]
    total_ptr,  # [n]
    V,
    stride_e,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    total = tl.load(total_ptr + r)
    finite = (total == total) & (tl.abs(total) != float("inf"))
    if (tl.load(factor_ptr + r) == 0) & (finite == 0):
        zero = tl.zeros((BLOCK,), dtype=tl.float32).to(e_ptr.dtype.element_ty)
        for v0 in range(0, V, BLOCK):
            v = v0 + tl.arange(0, BLOCK)
            tl.store(e_ptr + r * stride_e + v, zero, mask=v < V)


def clear_rows(
    exps: Tensor,  # [n, V], unit column stride
    factor: Tensor,  # [n] float32
    total: Tensor,  # [n] float32
) -> None:
    """Zero the rows that have factor 0 and no finite sum: in E^T X, NaN times 0 is NaN."""
    n, V = exps.shape
    if n:
        clear_rows_kernel[(n,)](
            exps, factor, total, V, exps.stride(0), BLOCK=min(4096, next_power_of_2(V)),
            num_warps=4, num_stages=1, **UNFUSED,
        )  # fmt: skip


def clear_rows_ref(exps: Tensor, factor: Tensor, total: Tensor) -> None:
    """The same in plain torch."""
    exps[(factor == 0) & ~torch.isfinite(total)] = 0
