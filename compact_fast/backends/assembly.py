"""What the fused backends share at their end: per-token results, and the loss from its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compact_fast.backends.protocol import Gradients, LossResult
from compact_fast.config import CompactConfig


class RowResults(Protocol):
    """Statistics of some rows, all [n]."""

    @property
    def logp(self) -> Tensor: ...
    @property
    def logsumexp(self) -> Tensor: ...
    @property
    def entropy(self) -> Tensor | None: ...
    @property
    def correct(self) -> Tensor | None: ...


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token results of a batch, filled some rows at a time. All [T]."""

    logp: Tensor  # 0 where there is no label
    logsumexp: Tensor  # NaN where no logits were made
    entropy: Tensor | None
    correct: Tensor | None  # bool

    @classmethod
    def empty(cls, targets: Tensor, dtype: torch.dtype, *, full: bool) -> TokenStatistics:
        """Nothing yet, beside targets [T]. full: with entropy and correct."""
        logp = torch.zeros(targets.numel(), dtype=dtype, device=targets.device)
        return cls(
            logp=logp,
            logsumexp=torch.full_like(logp, torch.nan),
            entropy=torch.zeros_like(logp) if full else None,
            correct=torch.zeros_like(logp, dtype=torch.bool) if full else None,
        )

    def record(self, rows: Tensor, found: RowResults) -> None:
        """Put the results of packed positions `rows` [n] where they belong."""
        for name in ("logp", "logsumexp", "entropy", "correct"):
            into, value = getattr(self, name), getattr(found, name)
            if into is not None and value is not None:
                into[rows] = value.to(into.dtype)


class Shares(Protocol):
    """Weights of all sequences, [S], and what else comes with them."""

    @property
    def weights(self) -> Tensor: ...
    @property
    def score(self) -> Tensor: ...
    @property
    def consensus(self) -> Tensor: ...
    @property
    def filtered(self) -> Tensor: ...
    @property
    def nonfinite(self) -> Tensor: ...
    @property
    def skipped(self) -> Tensor: ...  # [Q]


def assemble(
    config: CompactConfig,
    *,
    nll: Tensor,  # [S]
    mi: Tensor,  # [S]
    shares: Shares,
    divergence: Tensor,  # [Q]; sum over pairs of alpha_i alpha_j D_ij
    normalizer: float | Tensor,
    gradients: Gradients,
    stats: TokenStatistics,
    kept_share: Tensor | None,
    gradient_error: Tensor | None,  # [3]
    dtype: torch.dtype,
) -> LossResult:
    """The loss, summed in float64, and all figures of a batch, rounded to `dtype` once; nothing
    waits for a device."""
    alpha = shares.weights.double()
    sft = torch.where(alpha > 0, alpha * nll, 0.0).sum() / normalizer
    pull = config.consistency_weight * divergence.double().sum() / normalizer
    return LossResult(
        loss=(sft + pull).to(dtype),
        loss_sft=sft.to(dtype),
        loss_consistency=pull.to(dtype),
        gradients=gradients,
        weights=shares.weights.to(dtype),
        nll=nll.to(dtype),
        mi=mi.to(dtype),
        consensus=shares.consensus.to(dtype),
        score=shares.score.to(dtype),
        token_logp=stats.logp.to(dtype),
        consistency=divergence.to(dtype),
        filtered=shares.filtered,
        nonfinite=shares.nonfinite,
        skipped=shares.skipped,
        token_entropy=None if stats.entropy is None else stats.entropy.to(dtype),
        token_correct=stats.correct,
        kept_share=kept_share,
        gradient_error=gradient_error,
    )
