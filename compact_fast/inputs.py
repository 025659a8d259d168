"""Checks of the loss's arguments, the same for every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout


def check_loss_inputs(
    hidden: Tensor,
    weight: Tensor,
    layout: TokenLayout,
    consensus: Tensor | None,
    attention: Tensor | None,
    config: CompactConfig,
    bias: Tensor | None,
    softcap: float = 0.0,
) -> None:
    """Raises ValueError naming the argument, its value and the remedy."""
    check_head(hidden, weight, bias)
    check_softcap(softcap)
    if softcap and config.skip_below > 0:
        raise ValueError(
            f"config.skip_below={config.skip_below}: no gradients are left out of soft-capped "
            f"logits (softcap={softcap}); set it to 0"
        )
    T, S, V = layout.num_tokens, layout.num_sequences, weight.shape[0]
    if layout.num_questions == 0:
        raise ValueError("layout holds no question; an empty batch has no loss")
    if hidden.shape[0] != T:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, the layout {T} positions")
    if layout.device not in (hidden.device, torch.device("cpu")):
        raise ValueError(
            f"layout is on {layout.device}, hidden on {hidden.device}; "
            "leave it on the CPU, or use layout.to(hidden.device)"
        )
    check_ids("targets", layout.targets, V)
    if layout.gold_ids is not None:
        check_ids("gold_ids", layout.gold_ids, V)
    for name, scores in (("consensus", consensus), ("attention", attention)):
        if scores is not None and tuple(scores.shape) != (S,):
            raise ValueError(f"{name}: expected shape ({S},), got {tuple(scores.shape)}")
        if scores is not None and scores.device != hidden.device:
            raise ValueError(f"{name} is on {scores.device}, hidden on {hidden.device}")
    if config.consensus == "attention" and attention is None:
        raise ValueError(
            "config.consensus='attention' needs attention=[S] scores "
            "(compact_fast.reference.attention_consensus)"
        )
    if config.consensus == "both" and (attention is None or consensus is None):
        raise ValueError("config.consensus='both' needs both consensus=[S] and attention=[S]")
    if config.consistency == "all" and layout.real is not None:
        counts = torch.zeros_like(layout.label_counts)
        counts.index_add_(0, layout.token_sequence, layout.real.long())
        if bool((layout.last_real + 1 - layout.cu_seqlens[:-1] != counts).any()):
            raise ValueError("config.consistency='all' compares by index: pad on the right")
    _check_weighting(layout, config)
    if mi_is_used(config):
        if layout.gold_ids is None and config.mi != "pvi":
            raise ValueError(
                f"config.mi={config.mi!r} needs layout.gold_ids and cu_gold; "
                "without a gold answer set beta_mi=0"
            )
        if config.mi == "pvi" and layout.prior_logp is None:
            raise ValueError("config.mi='pvi' needs layout.prior_logp [Q], log p(gold | question)")


def _check_weighting(layout: TokenLayout, config: CompactConfig) -> None:
    if config.weighting == "correct" and layout.correct is None:
        raise ValueError("config.weighting='correct' needs layout.correct [S]")
    if config.weighting == "random" and layout.question_ids is None:
        raise ValueError("config.weighting='random' needs layout.question_ids [Q]")
    if isinstance(config.weighting, tuple):
        most = int(layout.teachers.max()) if layout.num_sequences else -1
        if most >= len(config.weighting):
            raise ValueError(
                f"config.weighting has {len(config.weighting)} fixed weights; "
                f"the batch has teacher {most}"
            )


def mi_is_used(config: CompactConfig) -> bool:
    """Whether the adaptability score can change a weight."""
    return config.weighting in ("compact", "mi", "best") and config.betas[0] != 0


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of hidden [T, D], weight [V, D], bias [V]."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "expected hidden [T, D] and lm_head_weight [V, D] with one D; got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"expected float dtypes, got {hidden.dtype} and {weight.dtype}")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(
            f"hidden is {hidden.dtype}, lm_head_weight {weight.dtype}; float64 goes with float64"
        )
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, lm_head_weight on {weight.device}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"head_bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_softcap(softcap: float) -> None:
    """It is 0 for none, or positive and finite."""
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap={softcap}: expected a positive number, or 0 for none")


def check_ids(name: str, ids: Tensor, vocab: int) -> None:
    """Token ids must lie below the vocabulary size."""
    if ids.numel() and int(ids.max()) >= vocab:
        at = int(ids.argmax())
        raise ValueError(
            f"{name}[{at}] = {int(ids[at])} is outside the head's vocabulary of {vocab}; "
            "does the tokenizer belong to this model?"
        )
