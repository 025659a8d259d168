"""What the loss returns beside its value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CompactOutput:
    """Loss and every figure behind it. All but `loss` are detached."""

    loss: Tensor  # scalar; differentiable with respect to hidden, head weight and bias
    loss_sft: Tensor  # scalar; the part sum_k alpha_k NLL_k
    loss_consistency: Tensor  # scalar; the part lambda sum_{i<j} alpha_i alpha_j D_ij
    weights: Tensor  # [S]; alpha, sums to 1 in each question that is not skipped
    nll: Tensor  # [S]; difficulty, nats a token
    mi: Tensor  # [S]; adaptability (NaN where the layout carries no gold answer)
    consensus: Tensor  # [S]; S_cons as it entered the score
    score: Tensor  # [S]; what the softmax over teachers saw, before the temperature
    token_logp: Tensor  # [T]; log-likelihood of each label in nats, 0 where there is none
    consistency: Tensor  # [Q]; sum_{i<j} alpha_i alpha_j D_ij, before lambda
    filtered: Tensor  # [S] bool; weight 0 because of low consensus
    nonfinite: Tensor  # [S] bool; weight 0 because a score was not finite
    skipped: Tensor  # [Q] bool; no teacher left, the question adds nothing to the loss
    token_entropy: Tensor | None = None  # [T]; on request, nats, 0 where there is no label
    token_correct: Tensor | None = None  # [T] bool; on request, the label is the likeliest token
    kept_share: Tensor | None = None  # scalar; with skip_below: share of the gradients computed
    gradient_error: Tensor | None = None  # [3]; with skip_below: bounds on the Frobenius norm of
    # what is missing from the gradients of hidden, head weight and bias; see docs/method.md
