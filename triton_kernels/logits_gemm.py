"""Logits GEMM whose epilogue keeps exp(z - offset) and partial sums, never the logits.

For rows x [n, D], unembedding W [V, D], labels y [n] and an offset o a row (the label's own logit):

    z = W x + b          E[r, v] = exp(z[r, v] - o[r]) for v != y[r],  0 for v = y[r]

and for every row and vocabulary tile, over v != y: sum of E, sum of E (z - o), maximum of z - o.
The label's column is left out of all of them: what belongs there is known only when the row is
complete (`finish_rows`), and without it S - p_y S comes out of a sum, not of a difference.

Soft-capped logits (CAP > 0) take their cap before all of that, and E times its slope is written, so
that E / S becomes the gradient by the products; the sums are those of E alone.

An accumulator is rounded only on its way into E; all sums are taken from it in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import FUSED, GemmConfig, num_processors
from .soft_cap import soft_cap, soft_cap_ref, soft_cap_slope


class Partials(NamedTuple):
    """What the epilogue leaves for each row and vocabulary tile, all [tiles, n] float32."""

    total: Tensor  # sum of exp(d), d = z - offset
    dot: Tensor  # sum of exp(d) d, for the entropy
    top: Tensor  # maximum of d


@triton.jit
def _tile_of(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Order of tiles: up to GROUP_M row tiles share each vocabulary tile before the next one.

    All groups but the last are of one height: a last group of few rows would read W once more.
    """
    even = tl.cdiv(num_m, tl.cdiv(num_m, GROUP_M))
    per_group = even * num_n
    first_m = (tile // per_group) * even
    height = tl.minimum(num_m - first_m, even)
    inside = tile % per_group
    return first_m + inside % height, inside // height


@triton.jit
def _exp_and_sums(
    z,  # [BLOCK_M, BLOCK_N] float32
    first_col,
    bias_ptr,
    target,  # [BLOCK_M]
    offset,  # [BLOCK_M]
    V,
    HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """E of some columns, the sum of exp(d), the sum of exp(d) d, the maximum of d = z - offset."""
    cols = first_col + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if CAP > 0:
        z = soft_cap(z, CAP)
    # -inf makes exp(d) 0 and never wins the maximum
    rival = (cols[None, :] != target[:, None]) & (cols < V)[None, :]
    d = tl.where(rival, z - offset[:, None], float("-inf"))
    e = tl.exp(d)
    total = tl.sum(e, 1)
    if STATISTICS:
        dot = tl.sum(tl.where(e > 0, e * d, 0.0), 1)
    else:
        dot = total
    if CAP > 0:
        e *= soft_cap_slope(z, CAP)
    return e, total, dot, tl.max(d, 1)


@triton.jit
def _store_partials(
    total, dot, top, tile_n, rows, inside, n, total_ptr, dot_ptr, top_ptr, STATISTICS: tl.constexpr
):
    where = tile_n.to(tl.int64) * n + rows
    tl.store(total_ptr + where, total, mask=inside)
    tl.store(top_ptr + where, top, mask=inside)
    if STATISTICS:
        tl.store(dot_ptr + where, dot, mask=inside)


@triton.jit(do_not_specialize=["n"])
def logits_exp_kernel(
    x_ptr,  # [n, D]
    w_ptr,  # [V, D]
    e_ptr,  # [n, V], row stride stride_e
    bias_ptr,
    targets_ptr,
    offset_ptr,
    redo_ptr,
    total_ptr,
    dot_ptr,
    top_ptr,
    n,
    V,
    D,
    stride_x,
    stride_w,
    stride_e,
    HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    STORE: tl.constexpr,
    REDO: tl.constexpr,
    CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Portable version: pointers, one program a tile."""
    num_m = tl.cdiv(n, BLOCK_M)
    num_n = tl.cdiv(V, BLOCK_N)
    tile_m, tile_n = _tile_of(tl.program_id(0), num_m, num_n, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if REDO:
        flags = tl.load(redo_ptr + rows, mask=rows < n, other=0)
        if tl.max(flags.to(tl.int32), 0) == 0:
            return
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows and columns past the end read the last one: their results are masked
    x_rows = x_ptr + tl.minimum(rows, n - 1).to(tl.int64) * stride_x
    w_rows = w_ptr + tl.minimum(cols, V - 1).to(tl.int64) * stride_w
    x_ptrs = x_rows[:, None] + k[None, :]
    w_ptrs = w_rows[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, D, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k0 + k < D)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k0 + k < D)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    inside = rows < n
    target = tl.load(targets_ptr + rows, mask=inside, other=-1).to(tl.int32)
    offset = tl.load(offset_ptr + rows, mask=inside, other=0.0)
    e, total, dot, top = _exp_and_sums(
        acc, tile_n * BLOCK_N, bias_ptr, target, offset, V, HAS_BIAS, STATISTICS, CAP, BLOCK_N
    )
    if STORE:
        e_ptrs = e_ptr + rows.to(tl.int64)[:, None] * stride_e + cols[None, :]
        tl.store(e_ptrs, e.to(e_ptr.dtype.element_ty), mask=inside[:, None] & (cols < V)[None, :])
    _store_partials(
        total, dot, top, tile_n, rows, inside, n, total_ptr, dot_ptr, top_ptr, STATISTICS
    )


@triton.jit
def _tma_tile(
    x_desc, w_desc, e_desc, bias_ptr, targets_ptr, offset_ptr, total_ptr, dot_ptr, top_ptr,
    tile_m, tile_n, n, V, D,
    HAS_BIAS: tl.constexpr, STATISTICS: tl.constexpr, STORE: tl.constexpr, CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, D, BLOCK_K):
        x = x_desc.load([tile_m * BLOCK_M, k0])
        w = w_desc.load([tile_n * BLOCK_N, k0])
        acc = tl.dot(x, w.T, acc)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    target = tl.load(targets_ptr + rows, mask=inside, other=-1).to(tl.int32)
    offset = tl.load(offset_ptr + rows, mask=inside, other=0.0)
    e, total, dot, top = _exp_and_sums(
        acc, tile_n * BLOCK_N, bias_ptr, target, offset, V, HAS_BIAS, STATISTICS, CAP, BLOCK_N
    )
    if STORE:
        e_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], e.to(e_desc.dtype))
    _store_partials(
        total, dot, top, tile_n, rows, inside, n, total_ptr, dot_ptr, top_ptr, STATISTICS
    )


@triton.jit(do_not_specialize=["n"])
def logits_exp_tma_kernel(
    x_desc,  # [n, D], blocks [BLOCK_M, BLOCK_K]
    w_desc,  # [V, D], blocks [BLOCK_N, BLOCK_K]
    e_desc,  # [n, V], blocks [BLOCK_M, BLOCK_N]
    bias_ptr,
    targets_ptr,
    offset_ptr,
    redo_ptr,
    any_ptr,  # one uint8: whether any row must be redone
    total_ptr,
    dot_ptr,
    top_ptr,
    n,
    V,
    D,
    HAS_BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    STORE: tl.constexpr,
    REDO: tl.constexpr,
    CAP: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Hopper and newer: bulk copies by tensor descriptor, persistent programs."""
    num_m = tl.cdiv(n, BLOCK_M)
    num_n = tl.cdiv(V, BLOCK_N)
    tiles = num_m * num_n
    if REDO:
        tiles = tl.where(tl.load(any_ptr) != 0, tiles, 0)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            tile_m, tile_n = _tile_of(tile, num_m, num_n, GROUP_M)
            rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
            flags = tl.load(redo_ptr + rows, mask=rows < n, other=0)
            if tl.max(flags.to(tl.int32), 0) != 0:
                _tma_tile(
                    x_desc, w_desc, e_desc, bias_ptr, targets_ptr, offset_ptr, total_ptr,
                    dot_ptr, top_ptr, tile_m, tile_n, n, V, D, HAS_BIAS, STATISTICS, STORE,
                    CAP, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    else:
        # flattened: the next tile's copies are under way while this one's epilogue runs
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            tile_m, tile_n = _tile_of(tile, num_m, num_n, GROUP_M)
            _tma_tile(
                x_desc, w_desc, e_desc, bias_ptr, targets_ptr, offset_ptr, total_ptr,
                dot_ptr, top_ptr, tile_m, tile_n, n, V, D, HAS_BIAS, STATISTICS, STORE,
                CAP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


def padded_width(vocab: int) -> int:
    """Row stride of the E buffer: rows start on 128-byte boundaries, as bulk copies need."""
    return -(-vocab // 64) * 64


def new_partials(n: int, weight: Tensor, config: GemmConfig, *, statistics: bool) -> Partials:
    """Room for the partial sums of n rows."""
    shape = (triton.cdiv(weight.shape[0], config.block_n), n)
    total = weight.new_empty(shape, dtype=torch.float32)
    top = torch.empty_like(total)
    return Partials(total, torch.empty_like(total) if statistics else top, top)


def logits_exp(
    x: Tensor,  # [n, D], contiguous
    weight: Tensor,  # [V, D], contiguous, dtype of x
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [n] int64, negative: no label
    offset: Tensor,  # [n] float32
    exps: Tensor | None,  # [n, V] with unit column stride; None: only the sums are wanted
    partials: Partials,
    config: GemmConfig,
    *,
    statistics: bool,
    redo: Tensor | None = None,  # [n] uint8; only row tiles that hold such a row are computed
    softcap: float = 0.0,  # of the logits; 0: none
) -> None:
    """Fill `exps` and `partials`. On a device with bulk copies `can_describe` must hold."""
    (n, D), V = x.shape, weight.shape[0]
    flags: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "STATISTICS": statistics,
        "STORE": exps is not None,
        "REDO": redo is not None,
        "CAP": float(softcap),
        "GROUP_M": config.group_m,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **FUSED,
    }
    out = x if exps is None else exps
    rows = (weight if bias is None else bias, targets, offset, targets if redo is None else redo)
    sums = (*partials, n, V, D)
    tiles = triton.cdiv(n, config.block_m) * triton.cdiv(V, config.block_n)
    if config.tma:
        assert can_describe(x, weight, out)
        programs = min(tiles, num_processors(x))
        blocks_m, blocks_n, blocks_k = config.block_m, config.block_n, config.block_k
        logits_exp_tma_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [blocks_m, blocks_k]),
            TensorDescriptor.from_tensor(weight, [blocks_n, blocks_k]),
            TensorDescriptor.from_tensor(out, [blocks_m, blocks_k if exps is None else blocks_n]),
            *rows,
            targets if redo is None else redo.amax(),
            *sums,
            **flags,
        )
        return
    logits_exp_kernel[(tiles,)](
        x, weight, out, *rows, *sums, x.stride(0), weight.stride(0), out.stride(0),
        EVEN_K=D % config.block_k == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **flags,
    )  # fmt: skip


def can_describe(*tensors: Tensor) -> bool:
    """Whether bulk copies can address these: 16-byte aligned base and rows."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)


def logits_exp_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    offset: Tensor,
    *,
    block_n: int,
    softcap: float = 0.0,
) -> tuple[Tensor, Partials]:
    """The same in plain torch, in the dtype of `x`: E [n, V] and the partials."""
    z = x @ weight.T
    if bias is not None:
        z = z + bias
    steep = None
    if softcap:
        z, steep = soft_cap_ref(z, softcap)
    d = z - offset[:, None]
    labelled = (targets >= 0).nonzero().squeeze(1)
    d[labelled, targets[labelled]] = -torch.inf
    e = d.exp()
    parts = [
        (
            part.exp().sum(1),
            torch.where(part.exp() > 0, part.exp() * part, 0.0).sum(1),
            part.amax(1),
        )
        for part in d.split(block_n, 1)
    ]
    total, dot, top = (torch.stack(column) for column in zip(*parts, strict=True))
    return e if steep is None else e * steep, Partials(total, dot, top)
