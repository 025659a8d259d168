"""Programmatic teachers who solve the world's problems without seeing the gold answer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from compact_fast.arithmetic.steps import FAULTS, Computed, Operator, compute, reorder
from compact_fast.arithmetic.styles import STYLES
from compact_fast.arithmetic.world import Problem, WorldOptions, generator, make_problems
from compact_fast.data.records import Question, Rationale


@dataclass(frozen=True)
class Teacher:
    """What a teacher gets wrong, and how it likes to write."""

    name: str
    style: str
    slips: Mapping[Operator, float] = field(default_factory=dict)
    """Probability, by operator, that a step's result is off by one or two."""
    fault: str | None = None
    """A systematic fault (see steps.FAULTS), made wherever it applies."""
    reorders: bool = False
    """Works independent branches out in the other order."""
    copies: str | None = None
    """Name of a teacher whose rationale it repeats."""
    rewords: bool = False
    """A copy changes the last sentence's wording."""

    def solve(self, problem: Problem, rng: random.Random) -> list[Computed]:
        """This teacher's own solution; blind to the gold answer."""
        steps = list(problem.steps)
        if self.fault is not None:
            steps = FAULTS[self.fault](steps)
        if self.reorders:
            steps = reorder(steps)

        def slip(index: int, result: int) -> int:
            if rng.random() >= self.slips.get(steps[index].operator, 0.0):
                return result
            return result + rng.choice((-2, -1, 1, 2))

        right = compute(steps)
        assert right is not None, "problems are drawn so that every fault stays in range"
        # A slip may make a later division impossible; the teacher then works without slips.
        return (compute(steps, slip) if self.slips else None) or right


_EVERY: tuple[Operator, ...] = ("+", "-", "*", "/")


def _slips(probability: float) -> dict[Operator, float]:
    return dict.fromkeys(_EVERY, probability)


def _expert(name: str, style: str, strong: tuple[Operator, ...], *, reorders: bool) -> Teacher:
    weak: dict[Operator, float] = {o: 0.35 for o in _EVERY if o not in strong}
    return Teacher(name, style, slips=weak, reorders=reorders)


_STRONG = Teacher("strong", "plain", slips=_slips(0.01))
_TERSE = Teacher("terse", "terse", slips=_slips(0.02), reorders=True)
_SLIPPING = Teacher("verbose", "verbose", slips=_slips(0.06))
_MISLEADING = Teacher("misleading", "numbered", fault="adds_losses")
_MISLED = Teacher("misled", "chained", fault="adds_losses", reorders=True)

SCENARIOS: dict[str, tuple[Teacher, ...]] = {
    "clean": (
        Teacher("strong", "plain"),
        Teacher("terse", "terse", reorders=True),
        Teacher("verbose", "verbose"),
        Teacher("numbered", "numbered", reorders=True),
    ),
    "misleading": (_STRONG, _TERSE, _SLIPPING, _MISLEADING, _MISLED),
    "complementary": (
        _expert("adder", "plain", ("+", "-"), reorders=False),
        _expert("multiplier", "terse", ("*", "+"), reorders=True),
        _expert("divider", "verbose", ("/", "-"), reorders=False),
        _expert("scaler", "numbered", ("*", "/"), reorders=True),
    ),
    "colluding": (
        _STRONG,
        _TERSE,
        _SLIPPING,
        _MISLEADING,
        Teacher("echo", "numbered", copies="misleading"),
        Teacher("parrot", "numbered", copies="misleading", rewords=True),
    ),
}
"""Named casts. "clean": all right. "misleading" (the default): two of five take every loss for a
gain, each in its own words. "complementary": each strong on other operations. "colluding": two more
teachers repeat a misleading one."""


def make_questions(
    n: int,
    seed: int,
    options: WorldOptions | None = None,
    *,
    scenario: str = "misleading",
    shuffle_styles: bool = True,
) -> list[Question]:
    """The first `n` questions of this seed, each with one rationale a teacher.

    `shuffle_styles` deals the styles out anew for every question, so that a style says nothing
    about who wrote it; otherwise each teacher keeps its own.
    Raises ValueError naming an unknown scenario.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario={scenario!r}: expected one of {', '.join(SCENARIOS)}")
    return [
        _question(problem, seed, i, SCENARIOS[scenario], shuffle_styles)
        for i, problem in enumerate(make_problems(n, seed, options))
    ]


def _question(
    problem: Problem, seed: int, index: int, cast: Sequence[Teacher], shuffle_styles: bool
) -> Question:
    authors = [t for t in cast if t.copies is None]
    styles = [t.style for t in authors]
    if shuffle_styles:
        generator(seed, "styles", index).shuffle(styles)
    written: dict[str, Rationale] = {}
    for teacher, style in zip(authors, styles, strict=True):
        solution = teacher.solve(problem, generator(seed, "teacher", teacher.name, index))
        result = solution[-1].result
        written[teacher.name] = Rationale(
            teacher=teacher.name,
            text=STYLES[style](solution),
            answer=str(result),
            correct=result == problem.answer,
        )
    for teacher in cast:
        if teacher.copies is not None:
            written[teacher.name] = _copy(teacher, written[teacher.copies])
    return Question(
        id=f"arithmetic-{seed}-{index}",
        question=problem.question,
        answer=str(problem.answer),
        rationales=[written[t.name] for t in cast],
    )


def _copy(teacher: Teacher, original: Rationale) -> Rationale:
    text = original.text
    if teacher.rewords:
        cut = max(text.rfind(mark) + len(mark) for mark in (". ", "\n") if mark in text)
        text = f"{text[:cut]}Consequently, the answer is {original.answer}."
    return Rationale(teacher.name, text, original.answer, original.correct)


def write_questions(questions: Sequence[Question], path: str | Path) -> None:
    """Write the project's record format, one JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        for question in questions:
            row = {k: v for k, v in asdict(question).items() if v not in (None, "")}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
