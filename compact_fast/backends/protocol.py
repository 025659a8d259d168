"""What a backend is: a structural type, so that others need to import nothing of ours.

A backend computes values and gradients; it knows nothing of autograd. `compact_fast.ops` wraps
whatever backend is chosen into differentiable operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout

ABI = 1  # raised when a signature below changes


@dataclass(frozen=True)
class RunSpec:
    """What a backend is asked to run, so that it can say beforehand whether it can."""

    device: torch.device
    dtype: torch.dtype  # of the hidden states
    vocab_size: int
    hidden_size: int
    head_bias: bool = False
    head_dtype: torch.dtype | None = None  # of the unembedding; None: that of the hidden states
    softcap: float = 0.0  # of the logits, 0: none

    @property
    def weight_dtype(self) -> torch.dtype:
        """The unembedding's dtype."""
        return self.dtype if self.head_dtype is None else self.head_dtype


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients in the dtype of what they belong to; None where not wanted."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]


class LossResult(NamedTuple):
    """Loss, gradients and figures of one batch; see CompactOutput for the figures' meaning.

    Figures are float32, or float64 when `hidden` is. No tensor shares memory with an argument.
    """

    loss: Tensor
    loss_sft: Tensor
    loss_consistency: Tensor
    gradients: Gradients
    weights: Tensor  # [S]
    nll: Tensor  # [S]
    mi: Tensor  # [S]
    consensus: Tensor  # [S]
    score: Tensor  # [S]
    token_logp: Tensor  # [T]
    consistency: Tensor  # [Q]
    filtered: Tensor  # [S] bool
    nonfinite: Tensor  # [S] bool
    skipped: Tensor  # [Q] bool
    token_entropy: Tensor | None  # [T]; if statistics were asked for
    token_correct: Tensor | None  # [T] bool; if statistics were asked for
    # With config.skip_below > 0 only; see "Leaving out small gradients" in docs/method.md
    kept_share: Tensor | None = None  # scalar; share of the logit gradients that was multiplied
    gradient_error: Tensor | None = None  # [3]; bounds for hidden, weight, bias


@runtime_checkable
class CompactBackend(Protocol):
    """The operations behind `compact_fast.compact_loss` and `compact_fast.token_logp`.

    Arguments have been checked for shape, dtype and device, and autocast is off. They are all on
    one device; a backend with an attribute `takes_host_layout = True` may be handed a layout, or
    the targets of token_logp, on the CPU, so that it can read it without waiting for the device.
    Only a backend with an attribute `skips_blocks = True` is given a config with `skip_below` > 0,
    and only one with `caps_logits = True` is given a `softcap`, where it is > 0: logits are then
    softcap tanh((W h + bias) / softcap), those that `mi="logit"` reads included.
    """

    @property
    def name(self) -> str: ...

    @property
    def abi(self) -> int: ...

    def can_run(self, spec: RunSpec) -> bool | str:
        """True, or the reason why not in one sentence."""
        ...

    def score_and_loss(
        self,
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        layout: TokenLayout,
        consensus: Tensor | None,  # [S]
        attention: Tensor | None,  # [S]
        config: CompactConfig,
        normalizer: float | None,
        needs: Needs,
        statistics: bool,
        softcap: float = 0.0,
    ) -> LossResult:
        """Scores, weights, loss and the gradients of the loss, in one pass."""
        ...

    def token_logp(
        self,
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [T]
        statistics: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log-likelihood, entropy, correct) [T] each; the last two if statistics are wanted."""
        ...

    def token_logp_gradients(
        self,
        grad_logp: Tensor,  # [T]
        hidden: Tensor,  # [T, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [T]
        needs: Needs,
        softcap: float = 0.0,
    ) -> Gradients:
        """Gradients of sum_t grad_logp_t logp_t."""
        ...
