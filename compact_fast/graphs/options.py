"""Constants shared with csrc/, and the user's choices, as floats outside and integers inside."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

RESULT_NONE, RESULT_IMPLIED, RESULT_STATED = 0, 1, 2
ANSWER_NONE, ANSWER_IMPLIED, ANSWER_EXPLICIT = 0, 1, 2
EDGE_NEXT, EDGE_USES = 0, 1
ONE = 1 << 15  # similarity 1.0
UNIT = 1 << 24  # agreement 1.0
MOST_STEPS = 2048  # in one graph: no sum of the core can overflow below
SHIFT = 23  # similarity * similarity * edge weight is in units of 1 / (ONE << SHIFT)

Mode = Literal["relaxed", "exact", "fast"]
Centrality = Literal["coverage", "agreement", "cluster"]
MODES: tuple[Mode, ...] = get_args(Mode)
CENTRALITIES: tuple[Centrality, ...] = get_args(Centrality)


@dataclass(frozen=True)
class GraphOptions:
    """How steps are compared, how matchings are valued and how agreement becomes consensus.

    All numbers become fixed-point integers once, so that every backend computes the same value.
    Raises ValueError naming the field, its value and the range.
    """

    result: float = 0.35
    """Weight of equal results in the similarity of two steps."""

    numbers: float = 0.3
    """Weight of the overlap (Dice) of the steps' operands."""

    operators: float = 0.1
    """Weight of the overlap (Dice) of the steps' operators."""

    text: float = 0.1
    """Weight of the overlap (Dice) of words and word pairs; it is 1 in steps without numbers."""

    embedding: float = 0.3
    """Weight of the cosine of the steps' embedding rows, where such rows are given."""

    ramp: tuple[float, float] = (0.2, 0.8)
    """Similarity at or below the first counts as 0, at or above the second as 1."""

    step_weights: tuple[float, float, float] = (1.0, 0.5, 0.25)
    """Importance of a step that states a result, that mentions numbers, that has words only."""

    edge_weight: float = 0.25
    """Lambda: what a pair of agreeing edges adds, as a share of the product of its ends."""

    next_edge: float = 0.5
    """Weight of "follows" among the edges."""

    uses_edge: float = 1.0
    """Weight of "uses the result of" among the edges."""

    answer_share: float = 0.8
    """Share of the final answer in the agreement of two rationales; the steps have the rest."""

    soundness: float = 0.15
    """Share of a rationale's own soundness in its score: whether its steps derive its final
    answer, and whether later steps use what it computes."""

    dedupe: float | None = 0.7
    """Jaccard overlap of 3-word shingles from which two texts share one vote; None: never."""

    dedupe_min_words: int = 14
    """Shorter texts are never taken for copies: honest short texts look alike."""

    max_steps: int = 512
    """Longer rationales are refused; in runs and files they count by their answers alone."""

    max_bytes: int = 4 << 20
    """As `max_steps`, in UTF-8."""

    def __post_init__(self) -> None:
        for name in ("result", "numbers", "operators", "text", "embedding"):
            self._number(name, getattr(self, name), 1000.0)
        for name in ("edge_weight", "next_edge", "uses_edge"):
            self._number(name, getattr(self, name), 4.0)
        self._number("answer_share", self.answer_share, 1.0)
        self._number("soundness", self.soundness, 1.0)
        if self.dedupe is not None:
            self._number("dedupe", self.dedupe, 1.0)
        for name, size in (("ramp", 2), ("step_weights", 3)):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or len(values) != size:
                raise ValueError(f"{name}={values!r}: expected {size} numbers")
            for value in values:
                self._number(name, value, 1.0)
        if not self.ramp[0] < self.ramp[1]:
            raise ValueError(f"ramp={self.ramp!r}: the first must be below the second")
        if self.edge_weight * max(self.next_edge, self.uses_edge) > 1:
            raise ValueError(
                f"edge_weight={self.edge_weight!r}: times the larger of next_edge="
                f"{self.next_edge!r} and uses_edge={self.uses_edge!r} it must be at most 1"
            )
        ranges = {"max_steps": (1, MOST_STEPS), "max_bytes": (1, 1 << 28)}
        for name in ("dedupe_min_words", "max_steps", "max_bytes"):
            value = getattr(self, name)
            low, high = ranges.get(name, (0, 1 << 20))
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: expected an integer from {low} to {high}")

    @staticmethod
    def _number(name: str, value: object, high: float) -> None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not 0 <= value <= high:  # type: ignore[arg-type, operator]
            raise ValueError(f"{name}={value!r}: expected a number from 0 to {high:g}")

    def integers(self) -> dict[str, int]:
        """The same in the fixed-point units of csrc/similarity.h."""
        low, high = self.ramp
        stated, numbers, words = self.step_weights
        return {
            "weight_result": round(self.result * 1024),
            "weight_numbers": round(self.numbers * 1024),
            "weight_operators": round(self.operators * 1024),
            "weight_text": round(self.text * 1024),
            "weight_embedding": round(self.embedding * 1024),
            "ramp_low": round(low * ONE),
            "ramp_high": max(round(high * ONE), round(low * ONE) + 1),
            "step_stated": round(stated * 256),
            "step_numbers": round(numbers * 256),
            "step_words": round(words * 256),
            "edge_next": round(self.edge_weight * self.next_edge * 128),
            "edge_uses": round(self.edge_weight * self.uses_edge * 128),
            "answer_share": round(self.answer_share * 1024),
            "soundness": round(self.soundness * 1024),
            "dedupe": 0 if self.dedupe is None else max(1, round(self.dedupe * 1024)),
            "dedupe_min_shingles": max(1, self.dedupe_min_words - 2),
            "max_steps": self.max_steps,
            "max_bytes": self.max_bytes,
        }


def check_options(options: GraphOptions | None) -> GraphOptions:
    """The options, or the default ones. Raises ValueError for anything else."""
    if options is None:
        return GraphOptions()
    if not isinstance(options, GraphOptions):
        raise ValueError(f"options: expected GraphOptions or None, got {type(options).__name__}")
    return options


OPTION_NAMES = tuple(f.name for f in fields(GraphOptions))
