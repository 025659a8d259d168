"""Solutions as small directed graphs of integer operations, and how they go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Operator = Literal["+", "-", "*", "/"]
OPERATORS: tuple[Operator, ...] = ("+", "-", "*", "/")

MAX_NUMBER = 99
"""Largest number in any text of the world; each one is a single token of its student."""


@dataclass(frozen=True)
class Of:
    """The result of an earlier step, as an operand."""

    step: int


@dataclass(frozen=True)
class Step:
    """One operation. An operand is a number given in the question or the result of a step."""

    operator: Operator
    left: int | Of
    right: int | Of
    owner: str  # whose quantity it changes
    when: str  # "Monday" ... for an event; "start", "together" or "more" else


@dataclass(frozen=True)
class Computed:
    """A step with its numbers: left operator right = result."""

    step: Step
    left: int
    right: int
    result: int

    @property
    def equation(self) -> str:
        return f"{self.left} {self.step.operator} {self.right} = {self.result}"


def apply(operator: Operator, left: int, right: int) -> int | None:
    """The result, or None where it is no integer from 0 to MAX_NUMBER."""
    if operator == "/":
        if right == 0 or left % right:
            return None
        value = left // right
    else:
        value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return value if 0 <= value <= MAX_NUMBER else None


def compute(
    steps: Sequence[Step], slip: Callable[[int, int], int] | None = None
) -> list[Computed] | None:
    """Work the steps out in order; None where one leaves the world's numbers.

    `slip(index, result)` may return another result, which the steps behind it then use.
    """
    results: list[int] = []
    done: list[Computed] = []
    for index, step in enumerate(steps):
        left, right = (
            results[value.step] if isinstance(value, Of) else value
            for value in (step.left, step.right)
        )
        result = apply(step.operator, left, right)
        if result is not None and slip is not None:
            result = slip(index, result)
        if result is None or not 0 <= result <= MAX_NUMBER:
            return None
        results.append(result)
        done.append(Computed(step, left, right, result))
    return done


def edges(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """(i, j) wherever step j uses the result of step i."""
    return [
        (value.step, j)
        for j, step in enumerate(steps)
        for value in (step.left, step.right)
        if isinstance(value, Of)
    ]


def reorder(steps: Sequence[Step]) -> list[Step]:
    """The same solution with its independent branches the other way round.

    The branch of the last step's right operand comes first; a chain stays as it is.
    """
    last = steps[-1]
    if not (isinstance(last.left, Of) and isinstance(last.right, Of)):
        return list(steps)
    second = set(_ancestors(steps, last.right.step))
    order = [i for i in range(len(steps)) if i in second]
    order += [i for i in range(len(steps)) if i not in second]
    place = {old: new for new, old in enumerate(order)}

    def moved(value: int | Of) -> int | Of:
        return Of(place[value.step]) if isinstance(value, Of) else value

    return [
        replace(steps[i], left=moved(steps[i].left), right=moved(steps[i].right)) for i in order
    ]


def _ancestors(steps: Sequence[Step], index: int) -> list[int]:
    found = [index]
    for value in (steps[index].left, steps[index].right):
        if isinstance(value, Of):
            found += _ancestors(steps, value.step)
    return found


# ---- systematic faults: right in form, wrong in result ------------------------------------------


def _swap(taken: Operator, put: Operator) -> Callable[[Sequence[Step]], list[Step]]:
    def fault(steps: Sequence[Step]) -> list[Step]:
        return [replace(s, operator=put) if s.operator == taken else s for s in steps]

    return fault


def _stop_early(steps: Sequence[Step]) -> list[Step]:
    """Leave the last step out, where a problem has three or more."""
    return list(steps[:-1]) if len(steps) >= 3 else list(steps)


FAULTS: dict[str, Callable[[Sequence[Step]], list[Step]]] = {
    "adds_losses": _swap("-", "+"),
    "adds_multiples": _swap("*", "+"),
    "subtracts_shares": _swap("/", "-"),
    "stops_early": _stop_early,
}
"""Each turns right steps into wrong ones on a whole class of problems and leaves the rest alone."""


def is_affected(steps: Sequence[Step], fault: str) -> bool:
    """Whether the fault changes the solution of these steps."""
    return FAULTS[fault](steps) != list(steps)
