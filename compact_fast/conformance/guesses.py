"""Guesses about what went wrong, so that a check can name a fault and not only a difference."""

from __future__ import annotations

import inspect
from dataclasses import replace

import torch
from torch import Tensor

from compact_fast import scores
from compact_fast.backends.protocol import LossResult
from compact_fast.config import CompactConfig
from compact_fast.conformance.judge import close, in_float64, truth
from compact_fast.reference import log_softmax, pick_targets
from compact_fast.testing import RandomBatch


def hint(got: Tensor, guesses: dict[str, Tensor]) -> str:
    return next((text for text, value in guesses.items() if close(got, value)), "")


def show(values: Tensor) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values.tolist()) + ")"


def last_labels(batch: RandomBatch) -> Tensor:
    layout = batch.layout
    at = torch.where(layout.labelled, torch.arange(layout.num_tokens), -1)
    last = torch.full((layout.num_sequences,), -1).scatter_reduce(
        0, layout.token_sequence, at, "amax"
    )
    out = torch.zeros_like(layout.labelled)
    out[last[last >= 0]] = True
    return out


def gradient_hint(
    got: Tensor, exact: Tensor, result: LossResult, batch: RandomBatch, config: CompactConfig
) -> str:
    layout = batch.layout
    error = float((got.double() - exact).abs().max() / exact.abs().max())
    if got.dtype == torch.float32 and 2e-5 < error < 4e-3:
        return f"relative error {error:.1e}: is it kept in bfloat16 or float16?"
    if config.weighting == "compact" and close(got, _gradient_through_alpha(batch, config), 1e-3):
        return "it flows through alpha, which must be a constant (detached)"
    part = _consistency_share(got, exact, batch, config)
    if part is not None:
        return part
    if config.consistency != "all" and bool(got[~layout.labelled].any()):
        return "positions without a label have a gradient"
    last = last_labels(batch)
    if bool((got[last] == 0).all()):
        return "each rationale's last labelled token has none"
    ratios = []
    for s in range(layout.num_sequences):
        mine, right = (t[layout.token_sequence == s].double() for t in (got, exact))
        square = (right * right).sum()
        if square == 0:
            continue
        ratio = (mine * right).sum() / square
        if not close(mine, ratio * right, 1e-4):
            return ""
        ratios.append((s, float(ratio)))
    off = [(s, r) for s, r in ratios if abs(r - 1) > 1e-3]
    if not off:
        return ""
    s, r = off[0]
    if all(abs(x - r) < 1e-3 for _, x in ratios):
        return f"all of it is {r:.4g} times too large: the division by questions or labels is off"
    return (
        f"rationale {s} has {r:.4g} times the gradient that its weight "
        f"{float(result.weights[s]):.4g} gives it (wrong weight)"
    )


def _gradient_through_alpha(batch: RandomBatch, config: CompactConfig) -> Tensor:
    """What the hidden gradient would be if alpha were not detached (labels' part alone)."""
    wide = in_float64(batch)
    layout = batch.layout
    hidden = wide.hidden.clone().requires_grad_()
    with torch.enable_grad():
        logp = log_softmax(hidden, wide.weight, wide.bias)
        nll = scores.difficulty(pick_targets(logp, layout.targets), layout)
        shares = inspect.unwrap(scores.teacher_weights)(
            truth(batch, config).mi,
            nll,
            wide.consensus,
            wide.attention,
            layout.cu_teachers,
            config,
            teachers=layout.teachers,
        )
        loss = (shares.weights * nll).sum() / layout.num_questions
        (gradient,) = torch.autograd.grad(loss, hidden)
    return gradient


def _consistency_share(
    got: Tensor, exact: Tensor, batch: RandomBatch, config: CompactConfig
) -> str | None:
    """Whether the gradient is right but for the consistency term."""
    if config.consistency == "off" or config.consistency_weight == 0:
        return None
    without = truth(batch, replace(config, consistency="off")).gradients.hidden
    assert without is not None
    pull, left = exact - without, got.double() - without
    size = (pull * pull).sum()
    if size == 0:
        return None
    ratio = float((left * pull).sum() / size)
    if close(got, without):
        return "the consistency term has no gradient"
    if abs(ratio - 1) > 1e-3 and close(left, ratio * pull, 1e-6):
        return f"the consistency term's gradient is taken {ratio:.4g} times"
    return None


def head_gradient_hint(name: str, got: Tensor, exact: LossResult, batch: RandomBatch) -> str:
    """What is wrong with the gradient of the head's weight or bias."""
    if not bool(got.any()):
        return "it is 0"
    right = getattr(exact.gradients, name)
    size = (right * right).sum()
    ratio = float((got.double() * right).sum() / size)
    if abs(ratio - 1) > 1e-3 and close(got, ratio * right, 1e-5):
        return f"all of it is {ratio:.4g} times too large: the division by questions is off"
    even = truth(batch, CompactConfig(weighting="uniform", consistency="off"))
    if close(got, getattr(even.gradients, name)):
        return "the weights are ignored, every teacher counts the same"
    return ""


def weights_hint(got: LossResult, batch: RandomBatch, config: CompactConfig) -> str:
    """Which choice of the configuration the weights do not follow."""
    others = {
        "the temperature tau is ignored": replace(config, tau=1.0),
        "z_floor is ignored": replace(config, z_floor=0.0),
        "the consensus is ignored": replace(config, beta_consensus=0.0, filter_below=0.0),
        "teachers below filter_below keep a weight": replace(config, filter_below=0.0),
        "adaptability is ignored": replace(config, beta_mi=0.0),
        "difficulty is ignored": replace(config, beta_difficulty=0.0),
        "difficulty counts for a teacher, not against it": replace(
            config, beta_difficulty=-config.beta_difficulty
        ),
        "adaptability counts against a teacher": replace(config, beta_mi=-config.beta_mi),
    }
    for text, other in others.items():
        if other != config:
            found = scores.teacher_weights(
                got.mi,
                got.nll,
                batch.consensus,
                batch.attention,
                batch.layout.cu_teachers,
                other,
                teachers=batch.layout.teachers,
            )
            if close(got.weights, found.weights, 1e-5):
                return text
    return ""
