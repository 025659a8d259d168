"""Which questions go through the head together, and which of their rows need what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends.consistency import AnswerRows
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.scores import layout_weights


@dataclass(frozen=True)
class Group:
    """Consecutive whole questions."""

    questions: range
    sequences: slice
    rows: Tensor  # packed positions that need logits: plain ones, answers, then statistics alone
    plain: int
    answers: AnswerRows | None

    @property
    def answer_slice(self) -> slice:
        """Where among `rows` the answers are."""
        return slice(self.plain, self.plain + (0 if self.answers is None else len(self.answers.at)))


def weightless(
    layout: TokenLayout,
    consensus: Tensor | None,  # [S]
    attention: Tensor | None,  # [S]
    config: CompactConfig,
) -> Tensor:
    """[S] bool: sequences that will get weight 0 whatever the student says, most likely.

    What can still change is the filter, if another teacher's score is not finite.
    """
    zeros = torch.zeros(layout.num_sequences, dtype=torch.float64, device=layout.device)
    shares = layout_weights(zeros, zeros, consensus, attention, layout, config)
    out = shares.filtered | shares.nonfinite
    return out if config.scored else out | (shares.weights == 0)
