"""Per-row results around the logits GEMM: the label's logit before it, the row's statistics after.

With offset o, S = sum_v exp(z_v - o) and S' the same without the label y:

    logsumexp = o + log S        log p_y = z_y - logsumexp  (= -log1p(S') where o = z_y)
    entropy   = log S - sum_v exp(z_v - o)(z_v - o) / S

and row / S of an E buffer is the softmax without its label, whose entry becomes -S', so that
E / S = softmax - onehot. S' is a sum of positive terms: a confident row loses no digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSED, next_power_of_2
from .logits_gemm import Partials
from .soft_cap import soft_cap_slope

# A sum outside these bounds (a label 66 nats from the likeliest token) is redone with the row's
# maximum as offset: its products with the head could overflow, or its terms have underflowed.
LARGE = tl.constexpr(2.0**96)
SMALL = tl.constexpr(2.0**-96)


@dataclass(frozen=True)
class RowStatistics:
    """Results of n rows, all [n] float32 but `correct` and `redo`."""

    offset: Tensor
    total: Tensor  # S: softmax = exp(z - offset) / S
    logp: Tensor  # of the label in nats; 0 where there is none
    logsumexp: Tensor
    entropy: Tensor | None  # nats; 0 where there is no label
    correct: Tensor | None  # bool; no logit exceeds the label's
    redo: Tensor  # uint8

    @classmethod
    def empty(cls, offset: Tensor, *, statistics: bool) -> RowStatistics:
        def new() -> Tensor:
            return torch.empty_like(offset)

        return cls(
            offset,
            new(),
            new(),
            new(),
            new() if statistics else None,
            torch.empty_like(offset, dtype=torch.bool) if statistics else None,
            torch.empty_like(offset, dtype=torch.uint8),
        )


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to full precision (Kahan)."""
    u = 1.0 + x
    near = tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x < 1.0, near, tl.log(u))


@triton.jit
def row_dot_kernel(
    x_ptr,  # [*, D]
    rows_ptr,  # [n] int64: rows of x, or unused
    w_ptr,  # [*, D]
    index_ptr,  # [n] int64: rows of w; negative: none
    bias_ptr,
    out_ptr,  # [n] float32
    D,
    stride_x,
    stride_w,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr + r)
    row = r
    if HAS_ROWS:
        row = tl.load(rows_ptr + r)
    if index < 0:
        tl.store(out_ptr + r, 0.0)
        return
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * stride_x + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + index * stride_w + d, mask=d < D, other=0.0).to(tl.float32)
        total += x * w
    out = tl.sum(total, 0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + index).to(tl.float32)
    tl.store(out_ptr + r, out)


def row_dot(
    x: Tensor,  # [*, D]
    weight: Tensor,  # [*, D]
    index: Tensor,  # [n] int64
    *,
    rows: Tensor | None = None,  # [n] int64
    bias: Tensor | None = None,
) -> Tensor:  # [n] float32
    """<x[rows[r]], weight[index[r]]> + bias[index[r]] in float32; 0 where index is negative."""
    n, D = index.numel(), x.shape[1]
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        block = min(1024, next_power_of_2(D))
        row_dot_kernel[(n,)](
            x, index if rows is None else rows, weight, index, weight if bias is None else bias,
            out, D, x.stride(0), weight.stride(0), HAS_ROWS=rows is not None,
            HAS_BIAS=bias is not None, BLOCK_D=block, num_warps=4, num_stages=2, **FUSED,
        )  # fmt: skip
    return out


def row_dot_ref(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same in plain torch."""
    x = x if rows is None else x[rows]
    out = (x * weight[index.clamp(min=0)]).sum(1)
    if bias is not None:
        out = out + bias[index.clamp(min=0)]
    return torch.where(index >= 0, out, 0.0)


@triton.jit(do_not_specialize=["n"])
def finish_rows_kernel(
    total_ptr,  # [tiles, n]; so are dot and top
    dot_ptr,
    top_ptr,
    label_logit_ptr,  # [n]
    targets_ptr,  # [n]
    e_ptr,  # [n, V], row stride stride_e
    offset_ptr,  # [n], updated where a row must be redone
    sum_ptr,  # [n] outputs
    logp_ptr,
    logsumexp_ptr,
    entropy_ptr,
    correct_ptr,
    redo_ptr,
    n,
    tiles,
    stride_e,
    STATISTICS: tl.constexpr,
    STORE: tl.constexpr,
    REDONE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    others = tl.zeros((BLOCK,), dtype=tl.float32)  # S'
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for t0 in range(0, tiles, BLOCK_TILES):
        t = t0 + tl.arange(0, BLOCK_TILES)
        at = t[:, None].to(tl.int64) * n + rows[None, :]
        keep = (t < tiles)[:, None] & inside[None, :]
        others += tl.sum(tl.load(total_ptr + at, mask=keep, other=0.0), 0)
        part = tl.load(top_ptr + at, mask=keep, other=float("-inf"))
        top = tl.maximum(top, tl.max(part, 0))
        if STATISTICS:
            dot += tl.sum(tl.load(dot_ptr + at, mask=keep, other=0.0), 0)
    offset = tl.load(offset_ptr + rows, mask=inside, other=0.0)
    z = tl.load(label_logit_ptr + rows, mask=inside, other=0.0)
    target = tl.load(targets_ptr + rows, mask=inside, other=-1)
    labelled = target >= 0
    own = tl.where(labelled, tl.exp(z - offset), 0.0)
    total = others + own
    log_total = tl.where(own == 1.0, log1p(others), tl.log(total))
    tl.store(sum_ptr + rows, total, mask=inside)
    tl.store(logsumexp_ptr + rows, offset + log_total, mask=inside)
    logp = tl.where(labelled, z - offset - log_total, 0.0)
    tl.store(logp_ptr + rows, logp, mask=inside)
    if STATISTICS:
        dot += tl.where(own > 0, own * (z - offset), 0.0)
        entropy = tl.where(labelled, log_total - dot / total, 0.0)
        tl.store(entropy_ptr + rows, entropy, mask=inside)
        tl.store(correct_ptr + rows, labelled & (top <= z - offset), mask=inside)
    if STORE:
        entry = e_ptr + rows.to(tl.int64) * stride_e + target
        value = 0.0 - others
        if CAP > 0:
            value *= soft_cap_slope(z, CAP)
        tl.store(entry, value.to(e_ptr.dtype.element_ty), mask=inside & labelled)
    if not REDONE:
        redo = (total > LARGE) | (total < SMALL)
        tl.store(redo_ptr + rows, redo.to(tl.uint8), mask=inside)
        highest = tl.where(labelled, tl.maximum(offset + top, z), offset + top)
        tl.store(offset_ptr + rows, highest, mask=inside & redo)


def finish_rows(
    partials: Partials,
    label_logit: Tensor,  # [n] float32
    targets: Tensor,  # [n] int64
    exps: Tensor | None,  # [n, V]; the label's entries are written
    out: RowStatistics,
    *,
    redone: bool,
    softcap: float = 0.0,  # of the logits, `label_logit` among them
) -> None:
    """Sum the tiles of each row, in order, into `out`.

    Unless `redone`, rows that need another offset are marked in `out.redo` and given it.
    """
    tiles, n = partials.total.shape
    # 32 rows a program read 128 contiguous bytes of each tile's sums
    block, block_tiles = 32, min(64, next_power_of_2(tiles))
    finish_rows_kernel[(triton.cdiv(n, block),)](
        *partials, label_logit, targets, partials.total if exps is None else exps, out.offset,
        out.total, out.logp, out.logsumexp, out.total if out.entropy is None else out.entropy,
        out.redo if out.correct is None else out.correct.view(torch.uint8), out.redo, n, tiles,
        0 if exps is None else exps.stride(0), STATISTICS=out.entropy is not None,
        STORE=exps is not None, REDONE=redone, CAP=float(softcap), BLOCK=block,
        BLOCK_TILES=block_tiles, num_warps=4, num_stages=2, **FUSED,
    )  # fmt: skip


def row_statistics_ref(
    logits: Tensor,  # [n, V]
    targets: Tensor,  # [n]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, logsumexp, entropy, correct) in plain torch."""
    labelled = targets >= 0
    logp = logits.log_softmax(1)
    at_label = logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp).sum(1)
    correct = labelled & (at_label == logp.amax(1))
    zero = at_label.new_zeros(())
    return (
        torch.where(labelled, at_label, zero),
        logits.logsumexp(1),
        torch.where(labelled, entropy, zero),
        correct,
    )
