"""Procedural word problems with their gold answers and gold step graphs.

A problem follows one quantity through two to five events ("chain"), or two quantities that are
brought together in the last step ("join"), so that their branches are independent. Question i of a
seed is the same whatever the number of questions asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from compact_fast.arithmetic.steps import FAULTS, OPERATORS, Computed, Of, Operator, Step, compute
from compact_fast.arithmetic.topics import COMMON_EVENTS, DAYS, ENDINGS, TOPICS, Topic

_MAX_DRAWS = 10_000


@dataclass(frozen=True)
class WorldOptions:
    """What problems are drawn. Raises ValueError naming the option, its value and its range."""

    min_steps: int = 2
    max_steps: int = 5
    max_value: int = 50
    """Largest right result of any step."""
    max_change: int = 9
    """Largest number added or taken away by one event."""
    max_factor: int = 3
    """Largest factor or divisor."""
    operators: tuple[Operator, ...] = OPERATORS
    distractor_share: float = 0.3
    """Share of questions with a sentence whose number has no part in the solution."""
    join_share: float = 0.15
    """Share, among problems of three steps or more, with two independent branches."""
    new_word_share: float = 0.6
    """Share of gains and losses told in words that the student has never met."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps <= len(DAYS):
            raise ValueError(
                f"min_steps={self.min_steps}, max_steps={self.max_steps}: expected "
                f"1 <= min_steps <= max_steps <= {len(DAYS)}"
            )
        for name, low, high in (
            ("max_value", 20, 60),
            ("max_change", 2, 20),
            ("max_factor", 2, 5),
            ("distractor_share", 0, 1),
            ("join_share", 0, 1),
            ("new_word_share", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={value!r}: expected {low} to {high}")
        if not self.operators or any(o not in OPERATORS for o in self.operators):
            raise ValueError(f"operators={self.operators!r}: expected some of {OPERATORS}")


@dataclass(frozen=True)
class Problem:
    """One question with its solution.

    `steps` is the gold step graph: `steps.edges(problem.steps)` are its "uses the result of" edges.
    """

    question: str
    steps: tuple[Step, ...]
    solution: tuple[Computed, ...]
    topic: str
    things: str
    distractor: int | None

    @property
    def answer(self) -> int:
        return self.solution[-1].result

    @property
    def is_join(self) -> bool:
        return self.steps[-1].when in ("together", "more")


def generator(seed: int, *key: object) -> random.Random:
    """Random numbers that depend on the seed and the key alone, on every Python and machine."""
    return random.Random(":".join(str(k) for k in (seed, *key)))


def make_problems(n: int, seed: int, options: WorldOptions | None = None) -> list[Problem]:
    """The first `n` problems of this seed."""
    if n < 0:
        raise ValueError(f"n={n}: expected a number of problems >= 0")
    options = options or WorldOptions()
    return [make_problem(generator(seed, "problem", i), options) for i in range(n)]


def make_problem(rng: random.Random, options: WorldOptions) -> Problem:
    """Draw until the solution, and what every systematic fault makes of it, stays in range."""
    sizes = range(options.min_steps, options.max_steps + 1)
    number = rng.choices(sizes, [1 / size for size in sizes])[0]  # more of the shorter ones
    for _ in range(_MAX_DRAWS):
        draft = _Draft(rng, options, number)
        steps = tuple(draft.steps)
        solution = compute(steps)
        if solution is None or any(c.result > options.max_value for c in solution):
            continue
        if all(compute(fault(steps)) is not None for fault in FAULTS.values()):
            return Problem(
                draft.text(),
                steps,
                tuple(solution),
                draft.topic.name,
                draft.things,
                draft.distractor,
            )
    raise ValueError(f"no problem found in {_MAX_DRAWS} draws under {options}; widen its ranges")


class _Draft:
    """One attempt: sentences and steps side by side."""

    def __init__(self, rng: random.Random, options: WorldOptions, number: int) -> None:
        self.rng, self.options = rng, options
        self.topic: Topic = rng.choice(TOPICS)
        self.things = rng.choice(self.topic.things)
        self.owners = rng.sample(self.topic.owners, 2)
        self.steps: list[Step] = []
        self.sentences: list[str] = []
        self.distractor: int | None = None
        self.days: Iterator[str] = iter(DAYS)
        if number >= 3 and rng.random() < options.join_share:
            self._join(number)
        else:
            self._branch(self.owners[0], number)
            self.ending = "end"
        if rng.random() < options.distractor_share:
            self._distract()

    def _say(self, phrases: tuple[str, ...], owner: str, **numbers: int) -> str:
        return self.rng.choice(phrases).format(a=owner, x=self.things, **numbers)

    def _branch(self, owner: str, number: int) -> int | Of:
        """`number` steps about one owner; the branch's value."""
        rng, options = self.rng, self.options
        value: int | Of
        if "*" in options.operators and rng.random() < 0.25:
            groups, size = rng.randint(2, options.max_factor), rng.randint(2, 9)
            self.sentences.append(self._say((self.topic.packed,), owner, m=groups, n=size))
            self.steps.append(Step("*", groups, size, owner, "start"))
            value = Of(len(self.steps) - 1)
            number -= 1
        else:
            value = rng.randint(3, options.max_value)
            self.sentences.append(self._say(self.topic.start, owner, n=value))
        for _ in range(number):
            value = self._event(owner, value)
        return value

    def _event(self, owner: str, value: int | Of) -> Of:
        rng, options = self.rng, self.options
        operator = rng.choice(options.operators)
        top = options.max_change if operator in "+-" else options.max_factor
        change = rng.randint(2, top)
        day = next(self.days)
        phrases: tuple[str, ...] = (COMMON_EVENTS[operator],)
        if operator in self.topic.events and rng.random() < options.new_word_share:
            phrases = self.topic.events[operator]
        phrase = self._say(phrases, owner, n=change)
        self.sentences.append(f"On {day} {phrase}")
        self.steps.append(Step(operator, value, change, owner, day))
        return Of(len(self.steps) - 1)

    def _join(self, number: int) -> None:
        first, second = self.owners
        own = self.rng.randint(1, number - 2)
        values = [self._branch(first, own), self._branch(second, number - 1 - own)]
        possible = [o for o in ("+", "-") if o in self.options.operators] or ["+"]
        operator: Operator = "-" if self.rng.choice(possible) == "-" else "+"
        self.ending = "more" if operator == "-" else "together"
        self.steps.append(Step(operator, values[0], values[1], first, self.ending))

    def _distract(self) -> None:
        self.distractor = self.rng.randint(2, 9)
        owner = self.steps[0].owner
        sentence = self._say(self.topic.distractors, owner, n=self.distractor)
        self.sentences.insert(self.rng.randint(0, len(self.sentences)), sentence)

    def text(self) -> str:
        first, second = self.owners
        ending = self.rng.choice(ENDINGS[self.ending]).format(a=first, b=second, x=self.things)
        story = ". ".join(s[0].upper() + s[1:] for s in self.sentences)
        return f"{story}. {ending}"
