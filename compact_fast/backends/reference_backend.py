"""The `reference` backend: plain torch with full logits. For judging, never chosen by "auto"."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compact_fast import reference
from compact_fast.backends.protocol import ABI, RunSpec
from compact_fast.config import CompactConfig
from compact_fast.inputs import check_head, check_ids
from compact_fast.layout import TokenLayout
from compact_fast.output import CompactOutput


@dataclass(frozen=True)
class ReferenceBackend:
    """`compact_fast.reference` behind the backend interface."""

    name: str = "reference"
    abi: int = ABI

    def can_run(self, spec: RunSpec) -> bool | str:
        """Always, given the memory for [T, V] logits."""
        return True

    def compact_loss(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        layout: TokenLayout,
        *,
        consensus: Tensor | None,
        attention: Tensor | None,
        config: CompactConfig,
        normalizer: float | None,
        head_bias: Tensor | None,
        statistics: bool,
    ) -> CompactOutput:
        """See `compact_fast.compact_loss`; token statistics are always there."""
        return reference.compact_loss(
            hidden,
            lm_head_weight,
            layout,
            consensus=consensus,
            attention=attention,
            config=config,
            normalizer=normalizer,
            head_bias=head_bias,
        )

    def token_logp(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        targets: Tensor,
        *,
        head_bias: Tensor | None,
    ) -> Tensor:
        """See `compact_fast.token_logp`."""
        check_head(hidden, lm_head_weight, head_bias)
        check_ids("targets", targets, lm_head_weight.shape[0])
        return reference.token_logp(hidden, lm_head_weight, targets, head_bias=head_bias)
