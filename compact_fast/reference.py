"""The whole method in plain torch: the judge of every other backend.

Written to be read beside the method's formulas, not to be fast: it holds the full logits. Any
float dtype; float64 stays float64 throughout, everything lower is computed in float32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from compact_fast.config import CompactConfig
from compact_fast.inputs import check_loss_inputs
from compact_fast.layout import TokenLayout
from compact_fast.output import CompactOutput
from compact_fast.scores import (
    adaptability,
    difficulty,
    layout_weights,
    pointwise_information,
    statistics_dtype,
)
from compact_fast.softcap import capped


def compact_loss(
    hidden: Tensor,  # [T, D]
    lm_head_weight: Tensor,  # [V, D]
    layout: TokenLayout,
    *,
    consensus: Tensor | None = None,  # [S]
    attention: Tensor | None = None,  # [S]
    config: CompactConfig | None = None,
    normalizer: float | None = None,
    head_bias: Tensor | None = None,  # [V]
    softcap: float = 0.0,
) -> CompactOutput:
    """See `compact_fast.compact_loss`; gradients by autograd through the full [T, V] logits.

    config.skip_below leaves out each entry of the NLL's logit gradients by itself: no backend
    leaves out more. gradient_error has all three bounds, whichever gradients are taken.
    """
    config = config or CompactConfig()
    check_loss_inputs(
        hidden, lm_head_weight, layout, consensus, attention, config, head_bias, softcap
    )
    dtype = statistics_dtype(hidden.dtype)  # of the results
    z = logits(hidden, lm_head_weight, head_bias, softcap)  # [T, V]
    logp = z.log_softmax(-1)
    label_logp = target_logp(z, layout.targets)  # [T] float64
    nll = difficulty(label_logp, layout)  # [S]
    gold = _gold_rows(hidden, lm_head_weight, head_bias, softcap, logp, layout, config)
    mi = _mi(gold, label_logp, layout, config)  # [S]

    shares = layout_weights(mi.detach(), nll.detach(), consensus, attention, layout, config)
    alpha = shares.weights

    cleaned = hidden
    if bool(shares.nonfinite.any()):  # weight 0 times inf would poison the loss and its gradient
        alive = ~shares.nonfinite[layout.token_sequence]
        cleaned = torch.where(alive[:, None], hidden, 0.0)
        z = logits(cleaned, lm_head_weight, head_bias, softcap)
        trained = z.log_softmax(-1)
        trained_nll = difficulty(target_logp(z, layout.targets), layout)
    else:
        trained, trained_nll = logp, nll
    if config.skip_below > 0:
        g = _logit_gradients(trained, layout.targets)  # [T, V]
        kept = g >= config.skip_below
        sparse = _KeptGradient.apply(z, kept)  # type: ignore[no-untyped-call]
        trained_nll = difficulty(target_logp(sparse, layout.targets), layout)
    weighted = torch.where(alpha > 0, alpha * trained_nll, 0.0)  # float64, as the loss is summed
    sft = weighted.new_zeros(layout.num_questions).index_add(0, layout.sequence_question, weighted)
    divergence = _consistency(trained, alpha, layout, config).double()  # [Q]
    if normalizer is None:
        normalizer = max(1, int((~shares.skipped).sum()))
    kept_share = gradient_error = None
    if config.skip_below > 0:
        counts = layout.label_counts.clamp(min=1)
        scale = torch.where(layout.labelled, (alpha / counts)[layout.token_sequence], 0.0)  # [T]
        left_out = torch.where(kept, 0.0, g * scale[:, None]) / normalizer
        kept_share = kept[scale > 0].to(g.dtype).mean().nan_to_num(1.0)
        gradient_error = left_out_bounds(left_out, cleaned, lm_head_weight)
    loss_sft = sft.sum() / normalizer
    loss_consistency = config.consistency_weight * divergence.sum() / normalizer
    return CompactOutput(
        loss=(loss_sft + loss_consistency).to(dtype),
        loss_sft=loss_sft.detach().to(dtype),
        loss_consistency=loss_consistency.detach().to(dtype),
        weights=alpha.to(dtype),
        nll=nll.detach().to(dtype),
        mi=mi.detach().to(dtype),
        consensus=shares.consensus.to(dtype),
        score=shares.score.to(dtype),
        token_logp=label_logp.detach().to(dtype),
        consistency=divergence.detach().to(dtype),
        filtered=shares.filtered,
        nonfinite=shares.nonfinite,
        skipped=shares.skipped,
        token_entropy=entropy(logp, layout.targets).detach(),
        token_correct=logp.argmax(-1) == layout.targets,
        kept_share=kept_share,
        gradient_error=gradient_error,
    )


class _KeptGradient(torch.autograd.Function):
    """The identity, whose gradient is 0 where `kept` is not: `skip_below` entry by entry."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return torch.where(kept, upstream[0], 0.0), None


@torch.no_grad()
def _logit_gradients(logp: Tensor, targets: Tensor) -> Tensor:
    """|softmax - onehot| [T, V] of log-probabilities [T, V]."""
    g = logp.exp()
    labelled = (targets >= 0).nonzero().squeeze(1)
    own = logp[labelled, targets[labelled]]
    g[labelled, targets[labelled]] = -own.expm1()
    return g


@torch.no_grad()
def left_out_bounds(
    left_out: Tensor,  # [T, V]: sizes of the logit gradients that are missing, 0 elsewhere
    hidden: Tensor,  # [T, D]
    lm_head_weight: Tensor,  # [V, D]
) -> Tensor:
    """Bounds [3] on the Frobenius norms of what is missing from the gradients of hidden, W, bias.

    Row by row sum_v |g_tv| |W_v|, column by column sum_t |g_tv| |h_t|, and sum_t |g_tv|.
    """
    norms, sizes = (m.to(left_out.dtype).norm(dim=1) for m in (lm_head_weight, hidden))
    missing = (left_out @ norms, left_out.T @ sizes, left_out.sum(0))
    return torch.stack([part.norm() for part in missing])


@torch.no_grad()
def _gold_rows(
    hidden: Tensor,  # [T, D]
    lm_head_weight: Tensor,  # [V, D]
    head_bias: Tensor | None,  # [V]
    softcap: float,
    logp: Tensor,  # [T, V]
    layout: TokenLayout,
    config: CompactConfig,
) -> Tensor | None:
    """What MI reads of each gold token at every position, [G, T]; None: it reads none."""
    if config.mi == "pvi" or layout.gold_ids is None:
        return None
    if config.mi == "logprob":
        return logp.T[layout.gold_ids]
    # without a cap it adds a constant, which the difference along the sequence cancels
    bias = head_bias[layout.gold_ids] if head_bias is not None and softcap else None
    return logits(hidden, lm_head_weight[layout.gold_ids], bias, softcap).T


@torch.no_grad()
def _mi(
    gold_rows: Tensor | None,  # [G, T]
    label_logp: Tensor,  # [T]
    layout: TokenLayout,
    config: CompactConfig,
) -> Tensor:
    """S_MI [S] in the form that the configuration names; NaN where there is nothing to measure."""
    if config.mi == "pvi" and layout.prior_logp is not None:
        return pointwise_information(label_logp, layout)
    if gold_rows is None or layout.cu_gold is None:
        return torch.full_like(layout.label_counts, torch.nan, dtype=label_logp.dtype)
    gold = mean_gold(gold_rows, layout.cu_gold)  # [Q, T]
    question = layout.sequence_question[layout.token_sequence]  # [T]
    return adaptability(gold.gather(0, question[None, :]).squeeze(0), layout, config)


def mean_gold(rows: Tensor, cu_gold: Tensor) -> Tensor:
    """Mean over each question's gold tokens: rows [G, *], cu_gold [Q+1] -> [Q, *]; NaN if none."""
    counts = cu_gold.diff()
    question = torch.repeat_interleave(
        torch.arange(counts.numel(), device=counts.device), counts, output_size=rows.shape[0]
    )
    total = rows.new_zeros(counts.numel(), *rows.shape[1:]).index_add(0, question, rows)
    return total / counts.view(-1, *[1] * (rows.ndim - 1))


def _consistency(
    logp: Tensor,  # [T, V]
    alpha: Tensor,  # [S]
    layout: TokenLayout,
    config: CompactConfig,
) -> Tensor:
    """sum_{i<j} alpha_i alpha_j D_ij for each question, [Q]."""
    total = [logp.new_zeros(()) for _ in range(layout.num_questions)]
    if config.consistency == "off":
        return torch.stack(total)
    starts, lengths = consistency_spans(layout, config)
    bounds = layout.cu_teachers.tolist()
    for q in range(layout.num_questions):
        for i in range(bounds[q], bounds[q + 1]):
            for j in range(i + 1, bounds[q + 1]):
                share = float(alpha[i]) * float(alpha[j])
                n = min(lengths[i], lengths[j])
                if n == 0 or share < config.pair_floor or share == 0:
                    continue
                a = logp[starts[i] : starts[i] + n]
                b = logp[starts[j] : starts[j] + n]
                apart = torch.where(a == b, 0.0, a - b)  # two of -inf are not
                total[q] = total[q] + share * ((a.exp() - b.exp()) * apart).sum() / n
    return torch.stack(total)


def consistency_spans(layout: TokenLayout, config: CompactConfig) -> tuple[list[int], list[int]]:
    """First packed position and length of the stretch that consistency compares, per sequence."""
    starts = layout.cu_seqlens[:-1].tolist()
    if config.consistency == "all":  # from a sequence's first position to its last real one
        ends = (layout.last_real + 1).tolist()
        return starts, [e - s for s, e in zip(starts, ends, strict=True)]
    if layout.answer_spans is None:
        return starts, [0] * layout.num_sequences
    spans = layout.answer_spans.tolist()
    return [s for s, _ in spans], [e - s for s, e in spans]


@torch.no_grad()
def attention_consensus(
    queries: Tensor,  # [S, num_heads * d]
    keys: Tensor,  # [S, num_kv_heads * d]
    cu_teachers: Tensor,  # [Q+1]
    *,
    num_heads: int,
    num_kv_heads: int,
    gqa: Literal["heads", "repeat"] = "heads",
) -> Tensor:
    """In-degree of each rationale in the attention among a question's rationales, [S].

    queries and keys are the last decoder layer's q_proj and k_proj of the final-norm hidden state
    at each rationale's last real token. The diagonal is set to 0 AFTER the softmax; logits are
    scaled by the square root of the full query width.

    gqa="heads": each query head meets its own key head. "repeat": keys are repeated feature by
    feature, so that feature i of the query meets feature i // rep of the key (the authors' code).
    """
    S, width = queries.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is no multiple of num_kv_heads={num_kv_heads}")
    rep = num_heads // num_kv_heads
    if width % num_heads or keys.shape != (S, width // rep):
        raise ValueError(
            f"expected queries [S, {num_heads} * d] and keys [S, {num_kv_heads} * d]; got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    dtype = statistics_dtype(queries.dtype)
    q, k = queries.to(dtype), keys.to(dtype)
    if gqa == "repeat":
        k = k.repeat_interleave(rep, dim=-1)
    else:
        k = k.view(S, num_kv_heads, -1).repeat_interleave(rep, dim=1).reshape(S, width)
    out = q.new_zeros(S)
    bounds = cu_teachers.tolist()
    for start, end in pairwise(bounds):
        attention = (q[start:end] @ k[start:end].T / width**0.5).softmax(-1)
        out[start:end] = attention.fill_diagonal_(0).sum(0)
    return out


def logits(
    hidden: Tensor, lm_head_weight: Tensor, head_bias: Tensor | None, softcap: float = 0.0
) -> Tensor:
    """Of the whole vocabulary, capped: [T, D], [V, D], [V] -> [T, V], in float32 or wider."""
    dtype = statistics_dtype(hidden.dtype)
    out = hidden.to(dtype) @ lm_head_weight.to(dtype).T
    return capped(out if head_bias is None else out + head_bias.to(dtype), softcap)


def log_softmax(
    hidden: Tensor, lm_head_weight: Tensor, head_bias: Tensor | None, softcap: float = 0.0
) -> Tensor:
    """Log-probabilities of the whole vocabulary: [T, D], [V, D], [V] -> [T, V]."""
    return logits(hidden, lm_head_weight, head_bias, softcap).log_softmax(-1)


def pick_targets(logp: Tensor, targets: Tensor) -> Tensor:
    """logp [T, V] at targets [T], 0 at negative targets."""
    picked = logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(targets >= 0, picked, 0.0)


def target_logp(z: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [T] float64 of targets [T] by logits z [T, V], 0 at negative targets.

    The logits' own rounding is the only one: in float32 that of a log-probability is larger.
    """
    top = z.detach().amax(-1, keepdim=True)
    total = (z - top).exp().sum(-1, dtype=torch.float64)
    own = z.gather(1, targets.clamp(min=0)[:, None]).double() - top
    return torch.where(targets >= 0, own.squeeze(1) - total.log(), 0.0)


def entropy(logp: Tensor, targets: Tensor) -> Tensor:
    """Entropy in nats of logp [T, V], 0 at negative targets, [T]."""
    return torch.where(targets >= 0, -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1), 0.0)


def token_logp(
    hidden: Tensor,  # [T, D]
    lm_head_weight: Tensor,  # [V, D]
    targets: Tensor,  # [T]
    *,
    head_bias: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """log softmax(W h_t)[targets_t] in nats, 0 at negative targets, [T]."""
    return pick_targets(log_softmax(hidden, lm_head_weight, head_bias, softcap), targets)
