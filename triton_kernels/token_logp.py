"""Statistics of rows from the fused GEMM; without an E buffer no logits are kept at all.

Order of launches: the labels' logits, the GEMM, the rows' sums; then both once more for rows that
need another offset. The second round always runs, and skips every tile without such a row: whether
there is one is known on the device only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import gemm_config
from .logits_gemm import can_describe, logits_exp, new_partials, padded_width
from .row_statistics import RowStatistics, finish_rows, row_dot, row_statistics_ref
from .tuning import tuned_config


def can_fuse(x: Tensor, weight: Tensor) -> bool:
    """Whether the fused GEMM takes these: unit column strides, and for bulk copies alignment."""
    if x.stride(1) != 1 or weight.stride(1) != 1 or x.dtype != weight.dtype:
        return False
    config = gemm_config(x, statistics=False, bias=False)
    return not config.tma or can_describe(x, weight)


def measure_rows(
    x: Tensor,  # [n, D]
    weight: Tensor,  # [V, D], dtype of x
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [n] int64, negative: no label
    *,
    exps: Tensor | None = None,  # [n, V]: filled so that exps / total = softmax - onehot
    statistics: bool = False,  # entropy and correct
    softcap: float = 0.0,
) -> RowStatistics:
    """Log-likelihood and logsumexp of every row, on request entropy and correct.

    softcap: those of softcap tanh(logits / softcap), and exps / total the gradient by `logits`.
    """
    n = x.shape[0]
    label_logit = row_dot(x, weight, targets, bias=bias)
    if softcap:
        label_logit = softcap * torch.tanh(label_logit / softcap)
    out = RowStatistics.empty(label_logit.clone(), statistics=statistics)
    if n == 0:
        return out
    config = tuned_config(x, weight, bias, statistics=statistics, softcap=softcap)
    partials = new_partials(n, weight, config, statistics=statistics)
    logits_exp(
        x, weight, bias, targets, out.offset, exps, partials, config, statistics=statistics,
        softcap=softcap,
    )  # fmt: skip
    finish_rows(partials, label_logit, targets, None, out, redone=False)
    logits_exp(
        x, weight, bias, targets, out.offset, exps, partials, config, statistics=statistics,
        redo=out.redo, softcap=softcap,
    )  # fmt: skip
    finish_rows(partials, label_logit, targets, exps, out, redone=True, softcap=softcap)
    return out


def exps_buffer(n: int, weight: Tensor) -> Tensor:
    """An E buffer [n, V] in the dtype of the head, rows aligned for bulk copies."""
    vocab = weight.shape[0]
    return weight.new_empty(n, padded_width(vocab))[:, :vocab]


def measure_rows_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, logsumexp, entropy, correct) in plain torch and the dtype of `x`."""
    logits = x @ weight.T
    return row_statistics_ref(logits if bias is None else logits + bias, targets)
