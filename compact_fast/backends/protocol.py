"""What a backend is: a structural type, so that others need to import nothing of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.output import CompactOutput

ABI = 1  # raised when a signature below changes


@dataclass(frozen=True)
class RunSpec:
    """What a backend is asked to run, so that it can say beforehand whether it can."""

    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    hidden_size: int
    head_bias: bool = False


@runtime_checkable
class CompactBackend(Protocol):
    """The operations behind `compact_fast.compact_loss` and `compact_fast.token_logp`."""

    @property
    def name(self) -> str: ...

    @property
    def abi(self) -> int: ...

    def can_run(self, spec: RunSpec) -> bool | str:
        """True, or the reason why not in one sentence."""
        ...

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
    ) -> CompactOutput: ...

    def token_logp(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        targets: Tensor,
        *,
        head_bias: Tensor | None,
    ) -> Tensor: ...
