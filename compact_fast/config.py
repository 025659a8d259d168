"""The method's choices in one dataclass: what is scored, how it is weighted, what the loss is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, get_args

Mode = Literal["compact", "paper", "reference"]
MiKind = Literal["logit", "logprob", "pvi"]
MiPositions = Literal["assistant", "all"]
ConsensusKind = Literal["graph", "attention", "both", "none"]
AttentionGqa = Literal["heads", "repeat"]
ConsistencyKind = Literal["answer", "all", "off"]
Weighting = Literal[
    "compact", "uniform", "consensus", "mi", "difficulty", "best", "random", "correct"
]

# A field left at BY_MODE takes its value from the mode's table below.
BY_MODE: Any = None

MODES: Mapping[str, Mapping[str, Any]] = {
    "compact": {
        "mi_positions": "assistant",
        "consensus": "graph",
        "attention_gqa": "heads",
        "consistency": "answer",
        "filter_below": 0.8,
    },
    "paper": {
        "mi_positions": "assistant",
        "consensus": "attention",
        "attention_gqa": "heads",
        "consistency": "answer",
        "filter_below": 0.0,
    },
    "reference": {
        "mi_positions": "all",
        "consensus": "attention",
        "attention_gqa": "repeat",
        "consistency": "all",
        "filter_below": 0.0,
    },
}

# Baselines are compared as themselves: only these use the mode's consensus filter by default.
FILTERED_WEIGHTINGS = ("compact", "consensus")


@dataclass(frozen=True)
class CompactConfig:
    """How rationales are scored, weighted and turned into a loss.

    `mode` is a named set of field values; any field given by itself overrides it.
    Raises ValueError, naming the field, its value and what is allowed.
    """

    mode: Mode = "compact"
    """"compact": graph consensus as filter and score. "paper": the paper's figure. "reference":
    what the authors' code computes, quirks included (use it on a right-padded batch)."""

    weighting: Weighting | tuple[float, ...] = "compact"
    """How a question's loss is shared among its teachers: "compact" (the method), the baselines
    "uniform", "consensus", "mi", "difficulty" (one score alone), "best" (all weight on the best
    score; ties share), "random" (uniform on the simplex, by seed, question and teacher), "correct"
    (teachers whose extracted answer equals the gold one share), or fixed weights by teacher id."""

    mi: MiKind = "logit"
    """Adaptability: gain in the gold answer's mean logit ("logit"), in its mean log-probability
    ("logprob"), or pointwise V-information of the whole rationale ("pvi")."""

    mi_positions: MiPositions = BY_MODE
    """Positions the gain is summed over: tokens of the assistant's turn, or "all" (PAD too)."""

    mi_length_norm: bool = False
    """Divide the gain by the number of positions it was summed over."""

    thinking_weight: float = 1.0
    """Weight of the gain where the input token is a thinking token ("Therefore", "Wait", ...)."""

    other_weight: float = 0.1
    """Weight of the gain at all other positions."""

    consensus: ConsensusKind = BY_MODE
    """Where the consensus score comes from: step graphs, the student's attention, "both" (mean of
    the two z-scores), or "none"."""

    attention_gqa: AttentionGqa = BY_MODE
    """Attention consensus under grouped-query attention: each query head against its own
    key head ("heads"), or keys repeated feature by feature ("repeat", the authors' code)."""

    beta_mi: float = 1.0
    """Weight of the adaptability z-score."""

    beta_consensus: float = 1.0
    """Weight of the consensus z-score."""

    beta_difficulty: float = 0.5
    """Weight of the difficulty z-score, which counts against a teacher."""

    tau: float = 1.0
    """Temperature of the softmax over teachers; > 0."""

    z_floor: float = 0.0
    """Standard deviations below this count as this, so that near-ties stay near-ties."""

    filter_below: float = BY_MODE
    """Teachers whose consensus is below this share of the question's largest get weight 0.
    0 = off. Unless set, baselines other than "consensus" are not filtered."""

    consistency: ConsistencyKind = BY_MODE
    """Where teachers' branches are pulled together: on the "answer" span, on "all" positions
    aligned by index, or "off"."""

    consistency_weight: float = 0.1
    """Weight lambda of the consistency term."""

    pair_floor: float = 1e-4
    """Pairs of teachers whose weights multiply to less than this are left out of consistency."""

    seed: int = 0
    """Seed of weighting="random"."""

    skip_below: float = 0.0
    """Leave out of the gradients what is smaller than this: whole blocks of the logits in which
    every |softmax - label| is below it. 0 = off. Loss, scores and weights stay exact; the share
    that was computed and a bound on the gradients' error are reported."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: expected one of {', '.join(MODES)}")
        for name, value in MODES[self.mode].items():
            if getattr(self, name) is BY_MODE:
                if name == "filter_below" and self.weighting not in FILTERED_WEIGHTINGS:
                    value = 0.0
                object.__setattr__(self, name, value)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if name == "weighting" and not isinstance(value, str):
                self._set_fixed_weights(value)
            elif value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        for name in _NON_NEGATIVE:
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r}: expected a finite number >= 0")
        for name in ("beta_mi", "beta_consensus", "beta_difficulty"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{name}={value!r}: expected a finite number")
        if not (isinstance(self.tau, (int, float)) and math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"tau={self.tau!r}: expected a finite number > 0")
        if self.filter_below > 1:
            raise ValueError(f"filter_below={self.filter_below!r}: expected a share, 0 to 1")
        if self.skip_below >= 1:
            raise ValueError(f"skip_below={self.skip_below!r}: expected 0 (off) or less than 1")
        # made here, once: operators take the configuration as text, also while being compiled
        object.__setattr__(self, "_text", json.dumps(asdict(self), sort_keys=True))

    @property
    def text(self) -> str:
        """The configuration as one line of JSON; `from_text` reads it back."""
        return self._text  # type: ignore[attr-defined, no-any-return]

    @staticmethod
    @lru_cache(maxsize=64)
    def from_text(text: str) -> CompactConfig:
        """The configuration that `text` came from. Unknown fields raise ValueError."""
        values = json.loads(text)
        unknown = set(values) - set(FIELD_NAMES)
        if unknown:
            raise ValueError(f"configuration has unknown fields: {', '.join(sorted(unknown))}")
        return CompactConfig(**values)

    def _set_fixed_weights(self, value: Any) -> None:
        try:
            weights = tuple(float(w) for w in value)
        except (TypeError, ValueError):
            weights = ()
        if not weights or any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
            raise ValueError(
                f"weighting={value!r}: fixed weights must be finite, >= 0 and not all 0, "
                "one for each teacher"
            )
        object.__setattr__(self, "weighting", weights)

    @property
    def scored(self) -> bool:
        """Whether the weighting looks at scores."""
        return self.weighting in ("compact", "mi", "consensus", "difficulty", "best")

    @property
    def betas(self) -> tuple[float, float, float]:
        """(mi, consensus, difficulty) after the weighting's choice of scores."""
        full = (self.beta_mi, self.beta_consensus, self.beta_difficulty)
        chosen = {
            "mi": (full[0], 0.0, 0.0),
            "consensus": (0.0, full[1], 0.0),
            "difficulty": (0.0, 0.0, full[2]),
        }
        return chosen.get(self.weighting, full) if isinstance(self.weighting, str) else full


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "weighting": get_args(Weighting),
    "mi": get_args(MiKind),
    "mi_positions": get_args(MiPositions),
    "consensus": get_args(ConsensusKind),
    "attention_gqa": get_args(AttentionGqa),
    "consistency": get_args(ConsistencyKind),
}
_NON_NEGATIVE = (
    "thinking_weight",
    "other_weight",
    "z_floor",
    "filter_below",
    "consistency_weight",
    "pair_floor",
    "skip_below",
)
FIELD_NAMES = tuple(f.name for f in fields(CompactConfig))
