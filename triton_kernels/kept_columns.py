"""The two gradient products without the columns of E in which nothing matters.

On real text nearly all of softmax - onehot is close to 0. Rows are taken in blocks; of a block, a
column of the vocabulary is kept if any |E / S| in it reaches `eps`. Kept columns are moved together
in the memory of E, and the products run over them alone:

    dH[r] = sum_k E'[r, k] W[kept[k]]          dW[kept[k]] += sum_r E'[r, k] x[r]

How many columns are kept, the host never asks: grids are made for all of them, and programs that
find nothing to do return. What is left out is bounded on the way, from the norms of x and W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, ProductConfig, next_power_of_2, product_config

# Rows that share one set of kept columns. Fewer keep fewer columns; but each block adds its part of
# dW to memory, and below some 1,000 rows that traffic outlasts the product on every chip here.
BLOCK_ROWS = 1024
TILE = 64  # columns that the products read at once, or a multiple of it


@dataclass(frozen=True)
class Kept:
    """Which columns each block of rows keeps, and what the others add up to."""

    columns: Tensor  # [B, V] int64; the first `count` are the kept ones, in rising order
    place: Tensor  # [B, V] int32; a column's place among the kept ones, negative: left out
    count: Tensor  # [B] int32
    bound: Tensor  # [V] float32; sum over blocks that leave a column out of |factor E| |x|


@triton.jit(do_not_specialize=["n", "block_rows"])
def column_maxima_kernel(
    e_ptr,  # [n, V], row stride stride_e
    total_ptr,  # [n] float32
    factor_ptr,  # [n] float32; 0: the row does not count
    norm_ptr,  # [n] float32: lengths of the rows of x
    top_ptr,  # [B, V] float32
    bound_ptr,  # [B, V] float32
    n,
    V,
    stride_e,
    block_rows,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * block_rows
    last = tl.minimum(first + block_rows, n)
    top = tl.zeros((BLOCK_V,), dtype=tl.float32)
    bound = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for r0 in range(first, last, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = r < last
        factor = tl.load(factor_ptr + r, mask=inside, other=0.0)
        total = tl.load(total_ptr + r, mask=inside, other=1.0)
        norm = tl.load(norm_ptr + r, mask=inside, other=0.0)
        counts = inside & (factor != 0) & (total == total)
        at = e_ptr + r.to(tl.int64)[:, None] * stride_e + v[None, :]
        e = tl.load(at, mask=counts[:, None] & (v < V)[None, :], other=0.0).to(tl.float32)
        e = tl.abs(e)
        top = tl.maximum(top, tl.max(e / tl.where(counts, total, 1.0)[:, None], 0))
        bound += tl.sum(e * tl.where(counts, tl.abs(factor) * norm, 0.0)[:, None], 0)
    tl.store(top_ptr + b * V + v, top, mask=v < V)
    tl.store(bound_ptr + b * V + v, bound, mask=v < V)


def keep_columns(
    exps: Tensor,  # [n, V], unit column stride
    total: Tensor,  # [n] float32: exps / total = softmax - onehot
    factor: Tensor,  # [n] float32; what multiplies exps in the gradient, 0: no part of it
    norms: Tensor,  # [n] float32: lengths of the rows of x
    eps: float,
    *,
    block_rows: int = BLOCK_ROWS,
) -> Kept:
    """Choose the columns of each block of rows."""
    n, V = exps.shape
    B = triton.cdiv(n, block_rows)
    top = torch.empty(B, V, dtype=torch.float32, device=exps.device)
    bound = torch.empty_like(top)
    column_maxima_kernel[(triton.cdiv(V, 256), B)](
        exps, total, factor, norms, top, bound, n, V, exps.stride(0), block_rows, BLOCK_R=16,
        BLOCK_V=256, num_warps=4, num_stages=2, **FUSED,
    )  # fmt: skip
    # entries were rounded on their way into E: one of eps must not slip below it
    keep = top >= eps * (1 - torch.finfo(exps.dtype).eps)
    place = torch.where(keep, keep.cumsum(1, dtype=torch.int32) - 1, -1).int()
    # a stable sort of flags: kept columns first, in rising order
    columns = keep.logical_not().byte().sort(dim=1, stable=True).indices
    left_out = torch.where(keep, 0.0, bound).sum(0)
    return Kept(columns, place, keep.sum(1, dtype=torch.int32), left_out)


@triton.jit(do_not_specialize=["block_rows"])
def move_together_kernel(
    e_ptr,  # [n, V], row stride stride_e
    place_ptr,  # [B, V] int32
    total_ptr,  # [n] float32
    length_ptr,  # [V] float32: lengths of the rows of W
    count_ptr,  # [B] int32
    missing_ptr,  # [n] float32
    V,
    width,
    stride_e,
    block_rows,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    b = tl.program_id(0) // block_rows
    e_row = e_ptr + r * stride_e
    place_row = place_ptr + b.to(tl.int64) * V
    missing = tl.zeros((BLOCK,), dtype=tl.float32)
    for v0 in range(0, V, BLOCK):
        v = v0 + tl.arange(0, BLOCK)
        e = tl.load(e_row + v, mask=v < V, other=0.0)
        place = tl.load(place_row + v, mask=v < V, other=0)
        length = tl.load(length_ptr + v, mask=v < V, other=0.0)
        missing += tl.where(place < 0, tl.abs(e.to(tl.float32)) * length, 0.0)
        # a place never lies behind its column; but the block's writes may cover what another warp
        # has yet to read
        tl.debug_barrier()
        tl.store(e_row + place, e, mask=(v < V) & (place >= 0))
    tl.store(missing_ptr + r, tl.sum(missing, 0) / tl.load(total_ptr + r))
    # the products read whole tiles: what lies behind the kept columns counts for nothing
    count = tl.load(count_ptr + b)
    last = tl.minimum(tl.cdiv(count, TAIL) * TAIL, width)
    tail = count + tl.arange(0, TAIL)
    zero = tl.zeros((TAIL,), dtype=tl.float32).to(e_ptr.dtype.element_ty)
    tl.store(e_row + tail, zero, mask=tail < last)


def move_together(
    exps: Tensor,  # [n, V], unit column stride; overwritten
    total: Tensor,  # [n] float32
    lengths: Tensor,  # [V] float32: lengths of the rows of W
    kept: Kept,
    *,
    block_rows: int = BLOCK_ROWS,
) -> Tensor:  # [n] float32
    """Kept columns to the front of each row; returns sum |softmax - onehot| |W_v| of the others."""
    n, V = exps.shape
    missing = torch.empty_like(total)
    move_together_kernel[(n,)](
        exps, kept.place, total, lengths, kept.count, missing, V, _width(exps), exps.stride(0),
        block_rows, BLOCK=min(4096, next_power_of_2(V)), TAIL=TILE, num_warps=8, num_stages=1,
        **FUSED,
    )  # fmt: skip
    return missing


def _width(exps: Tensor) -> int:
    """How far a row's memory may be read and written: whole tiles, where its stride has room."""
    V = exps.shape[1]
    whole = -(-V // TILE) * TILE
    return whole if exps.stride(0) >= whole else V


@triton.jit(do_not_specialize=["n", "block_rows"])
def kept_to_rows_kernel(
    e_ptr,  # [n, >= count], row stride stride_e
    w_ptr,  # [V, D]; of e's dtype, or narrower
    columns_ptr,  # [B, V] int64
    count_ptr,  # [B] int32
    out_ptr,  # [n, D] float32
    n,
    V,
    D,
    width,
    stride_e,
    stride_w,
    block_rows,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of E' W: rows of W are gathered. No tile of rows reaches over a block's end."""
    num_n = tl.cdiv(D, BLOCK_N)
    tile_m = tl.program_id(0) // num_n
    d = (tl.program_id(0) % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = tl.cdiv(block_rows, BLOCK_M)
    b = tile_m // tiles
    last = tl.minimum((b + 1) * block_rows, n)
    rows = b * block_rows + (tile_m % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < last
    count = tl.load(count_ptr + b)
    columns = columns_ptr + b.to(tl.int64) * V
    e_rows = e_ptr + rows.to(tl.int64)[:, None] * stride_e
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, count, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = tl.load(columns + k, mask=k < count, other=0)
        # whole tiles: behind the kept columns E is 0
        e = tl.load(e_rows + k[None, :], mask=inside[:, None] & (k < width)[None, :], other=0.0)
        w_at = w_ptr + v[:, None] * stride_w + d[None, :]
        w = tl.load(w_at, mask=(k < count)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(e, w.to(e.dtype), acc, input_precision=PRECISION)
    at = out_ptr + rows.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, acc, mask=inside[:, None] & (d < D)[None, :])


def kept_to_rows(
    exps: Tensor,  # [n, V], kept columns in front
    weight: Tensor,  # [V, D], unit column stride; exps' dtype or narrower
    kept: Kept,
    *,
    block_rows: int = BLOCK_ROWS,
) -> Tensor:  # [n, D] float32
    """E W over the kept columns."""
    (n, V), D = exps.shape, weight.shape[1]
    config = product_config(exps)
    out = torch.empty(n, D, dtype=torch.float32, device=weight.device)
    tiles_m = triton.cdiv(n, block_rows) * triton.cdiv(block_rows, config.block_m)
    kept_to_rows_kernel[(tiles_m * triton.cdiv(D, config.block_n),)](
        exps, weight, kept.columns, kept.count, out, n, V, D, _width(exps), exps.stride(0),
        weight.stride(0), block_rows, **_options(config, exps.dtype),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n", "block", "block_rows"])
def kept_to_head_kernel(
    e_ptr,  # [n, >= count], row stride stride_e
    x_ptr,  # [n, D]
    columns_ptr,  # [B, V] int64
    count_ptr,  # [B] int32
    out_ptr,  # [V, D] float32
    n,
    V,
    D,
    width,
    stride_e,
    stride_x,
    block,
    block_rows,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of E'^T x of one block of rows, added to the rows of the head that were kept."""
    num_n = tl.cdiv(D, BLOCK_N)
    first_k = (tl.program_id(0) // num_n) * BLOCK_M
    count = tl.load(count_ptr + block)
    if first_k >= count:
        return
    k = first_k + tl.arange(0, BLOCK_M)
    d = (tl.program_id(0) % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = block * block_rows
    last = tl.minimum(first + block_rows, n)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r0 in range(first, last, BLOCK_K):
        r = r0 + tl.arange(0, BLOCK_K)
        e_at = e_ptr + r.to(tl.int64)[:, None] * stride_e + k[None, :]
        e = tl.load(e_at, mask=(r < last)[:, None] & (k < width)[None, :], other=0.0)
        x_at = x_ptr + r.to(tl.int64)[:, None] * stride_x + d[None, :]
        x = tl.load(x_at, mask=(r < last)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(e), x, acc, input_precision=PRECISION)
    v = tl.load(columns_ptr + block.to(tl.int64) * V + k, mask=k < count, other=0)
    at = out_ptr + v[:, None] * D + d[None, :]
    inside = (k < count)[:, None] & (d < D)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + acc, mask=inside)


def kept_to_head(
    exps: Tensor,  # [n, V], kept columns in front
    x: Tensor,  # [n, D], unit column stride, dtype of exps: rows times their factors
    kept: Kept,
    out: Tensor,  # [V, D] float32, contiguous
    *,
    block_rows: int = BLOCK_ROWS,
) -> None:
    """out += E^T x over the kept columns; blocks of rows one after another, so no two programs
    meet and every sum has one order."""
    (n, V), D = exps.shape, x.shape[1]
    config = product_config(x)
    tiles = triton.cdiv(V, config.block_m) * triton.cdiv(D, config.block_n)
    for block in range(triton.cdiv(n, block_rows)):
        kept_to_head_kernel[(tiles,)](
            exps, x, kept.columns, kept.count, out, n, V, D, _width(exps), exps.stride(0),
            x.stride(0), block, block_rows, **_options(config, x.dtype),
        )  # fmt: skip


def _options(config: ProductConfig, dtype: torch.dtype) -> dict[str, object]:
    return {
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **FUSED,
    }


def kept_products_ref(
    exps: Tensor,  # [n, V]
    total: Tensor,  # [n]
    factor: Tensor,  # [n]
    x: Tensor,  # [n, D]
    scaled: Tensor,  # [n, D]: rows of x times their factors
    weight: Tensor,  # [V, D]
    eps: float,
    *,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(kept [n, V] bool, E W, E^T scaled, missing [n], bound [V]) in plain torch."""
    g = torch.where(factor[:, None] != 0, exps / total[:, None], 0.0).abs()
    kept = torch.cat([(part.amax(0) >= eps).expand(len(part), -1) for part in g.split(block_rows)])
    left = torch.where(kept, 0.0, exps)
    used = torch.where(kept, exps, 0.0)
    missing = (left.abs() * weight.norm(dim=1)).sum(1) / total
    bound = (left.abs() * (factor.abs() * x.norm(dim=1))[:, None]).sum(0)
    return kept, used @ weight, used.T @ scaled, missing, bound
