"""Portable tier: logits by the library's GEMM, then one pass over each row in place.

float32 logits [n, V] become E = exp(z - max) in the same memory, in float32 or a 2-byte type; the
label's entry becomes exp(z_y - max) - S, so that E / S = softmax - onehot. Soft-capped logits take
their cap on the way, and E the slope of it. A 2-byte row takes
the first half of the bytes of its float32 row: every element is written behind the ones still to
be read.

float16 holds nothing above 65,504, which S can pass, and nothing below 2^-24: its E is
2^14 (softmax - onehot), which fits and keeps what is as small as 2^-28 to full precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import UNFUSED, next_power_of_2
from .row_statistics import RowStatistics, log1p
from .soft_cap import soft_cap, soft_cap_slope

FLOAT16_TOTAL = 2.0**14  # what E of float16 is divided by to give softmax - onehot


@triton.jit
def row_softmax_kernel(
    z_ptr,  # [n, V] float32, row stride stride_z
    e_ptr,  # the same memory in the dtype of E, row stride stride_e
    targets_ptr,  # [n]
    offset_ptr,  # [n] outputs
    sum_ptr,
    logp_ptr,
    logsumexp_ptr,
    entropy_ptr,
    correct_ptr,
    V,
    stride_z,
    stride_e,
    STATISTICS: tl.constexpr,
    STORE: tl.constexpr,
    TOTAL: tl.constexpr,  # what E is divided by in every row; 0: by its own S
    CAP: tl.constexpr,  # of the logits; 0: none
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + r * stride_z
    target = tl.load(targets_ptr + r)
    z_label = tl.load(z_row + tl.maximum(target, 0))
    if CAP > 0:
        z_label = soft_cap(z_label, CAP)
    lanes = tl.arange(0, BLOCK)
    # a running maximum and sum a lane: no reduction across the block inside the loop
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    others = tl.zeros((BLOCK,), dtype=tl.float32)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    for v0 in range(0, V, BLOCK):
        v = v0 + lanes
        rival = (v < V) & (v != target)
        z = tl.load(z_row + v, mask=rival, other=float("-inf"))
        if CAP > 0:
            z = tl.where(rival, soft_cap(z, CAP), float("-inf"))
        higher = tl.maximum(top, z)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - safe)
        e = tl.exp(z - safe)
        if STATISTICS:
            # sum of e (z - top): moving top moves every term by the same amount
            moved = tl.where(others > 0, others * shrink * (top - safe), 0.0)
            dot = dot * shrink + moved + tl.where(e > 0, e * (z - safe), 0.0)
        others = others * shrink + e
        top = higher
    labelled = target >= 0
    highest = tl.max(top, 0)
    peak = tl.where(labelled, tl.maximum(highest, z_label), highest)
    shrink = tl.where(top == float("-inf"), 0.0, tl.exp(top - peak))
    if STATISTICS:
        moved = tl.where(shrink > 0, others * shrink * (top - peak), 0.0)
        dot_total = tl.sum(dot * shrink + moved, 0)
    rest = tl.sum(others * shrink, 0)
    own = tl.where(labelled, tl.exp(z_label - peak), 0.0)
    total = rest + own
    log_total = tl.where(own == 1.0, log1p(rest), tl.log(total))
    tl.store(offset_ptr + r, peak)
    grow = 1.0
    if TOTAL == 0:
        tl.store(sum_ptr + r, total)
    else:
        grow = TOTAL / total
        # a row that is not finite must show it
        tl.store(sum_ptr + r, tl.where(tl.abs(total) < float("inf"), TOTAL, total))
    tl.store(logsumexp_ptr + r, peak + log_total)
    tl.store(logp_ptr + r, tl.where(labelled, z_label - peak - log_total, 0.0))
    if STATISTICS:
        dot_total += tl.where(own > 0, own * (z_label - peak), 0.0)
        tl.store(entropy_ptr + r, tl.where(labelled, log_total - dot_total / total, 0.0))
        tl.store(correct_ptr + r, labelled & (highest <= z_label))
    if STORE:
        e_row = e_ptr + r * stride_e
        for v0 in range(0, V, BLOCK):
            v = v0 + lanes
            z = tl.load(z_row + v, mask=v < V, other=float("-inf"))
            if CAP > 0:
                z = soft_cap(z, CAP)
            e = tl.where(v == target, 0.0 - rest, tl.exp(z - peak)) * grow
            if CAP > 0:
                e *= soft_cap_slope(z, CAP)
            # the block's writes may cover what another warp has yet to read
            tl.debug_barrier()
            tl.store(e_row + v, e.to(e_ptr.dtype.element_ty), mask=v < V)


def row_softmax(
    logits: Tensor,  # [n, V] float32, unit column stride; overwritten
    targets: Tensor,  # [n] int64
    dtype: torch.dtype,  # of E: float32, or a 2-byte type
    *,
    statistics: bool,
    store: bool = True,
    softcap: float = 0.0,
) -> tuple[Tensor, RowStatistics]:
    """E [n, V] as a view of the logits' memory, and the rows' statistics (never to be redone).

    softcap: those of softcap tanh(logits / softcap), and E / S is the gradient by `logits`.
    """
    n, V = logits.shape
    out = RowStatistics.empty(logits.new_empty(n), statistics=statistics)
    exps = logits if dtype == torch.float32 else logits.view(dtype)[:, :V]
    if n:
        block = min(4096, next_power_of_2(V))
        row_softmax_kernel[(n,)](
            logits, exps, targets, out.offset, out.total, out.logp, out.logsumexp,
            out.total if out.entropy is None else out.entropy,
            out.redo if out.correct is None else out.correct.view(torch.uint8),
            V, logits.stride(0), exps.stride(0), STATISTICS=statistics, STORE=store,
            TOTAL=FLOAT16_TOTAL if dtype == torch.float16 else 0.0, CAP=float(softcap), BLOCK=block,
            num_warps=8, num_stages=1, **UNFUSED,
        )  # fmt: skip
    return exps, out


def row_softmax_ref(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(E, S) in plain torch and the dtype of `logits`: E / S = softmax - onehot."""
    e = (logits - logits.amax(1, keepdim=True)).exp()
    total = e.sum(1)
    labelled = (targets >= 0).nonzero().squeeze(1)
    e[labelled, targets[labelled]] -= total[labelled]
    return e, total
