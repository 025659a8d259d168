"""How a worked solution is put into words. Every style ends by stating the final answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compact_fast.arithmetic.steps import Computed, Of
from compact_fast.arithmetic.topics import TOPICS

_CHANGE = {"+": "more", "-": "fewer", "*": "times as many", "/": "equal parts"}
_TOGETHER = ("together", "more")


def _label(done: Computed) -> str:
    """The step's place in the question; a branch's first step names its owner."""
    when = done.step.when
    when = "end" if when in _TOGETHER else when
    return when if isinstance(done.step.left, Of) else f"{done.step.owner} {when}"


def _where(done: Computed) -> str:
    """The same in a sentence."""
    when = done.step.when
    place = (
        "in the end" if when in _TOGETHER else "at the start" if when == "start" else f"on {when}"
    )
    return place if isinstance(done.step.left, Of) else f"{done.step.owner} {place}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def plain(solution: Sequence[Computed]) -> str:
    """One sentence a step, with its place in the story."""
    lead = ("First", "Then", "Next", "Then", "Then")
    body = [f"{word}, {_where(c)} {c.equation}." for word, c in zip(lead, solution, strict=False)]
    return " ".join([*body, f"So the answer is {solution[-1].result}."])


def terse(solution: Sequence[Computed]) -> str:
    """A label and an equation a step."""
    body = [f"{_capital(_label(c))} {c.equation}." for c in solution]
    return " ".join([*body, f"The answer is {solution[-1].result}."])


def verbose(solution: Sequence[Computed]) -> str:
    """Every step said in words before it is computed."""
    body = ["Let us see."]
    for c in solution:
        step = c.step
        if not isinstance(step.left, Of) and step.when != "start":
            body.append(f"{_capital(step.owner)} begins with {step.left}.")
        if step.when in _TOGETHER:
            what = f"we add {c.left} and {c.right}"
            if step.operator == "-":
                what = f"we compare {c.left} with {c.right}"
            body.append(f"Finally, {what}, and {c.equation}.")
        elif step.when == "start":
            body.append(
                f"{_capital(step.owner)} has {c.left} groups of {c.right}, and {c.equation}."
            )
        else:
            body.append(
                f"On {step.when} there are {c.right} {_CHANGE[step.operator]}, and {c.equation}."
            )
    return " ".join([*body, f"Therefore, the answer is {solution[-1].result}."])


def numbered(solution: Sequence[Computed]) -> str:
    """Enumerated steps, one a line."""
    lines = [f"Step {i}: {_where(c)} {c.equation}" for i, c in enumerate(solution, 1)]
    return "\n".join([*lines, f"Thus the answer is {solution[-1].result}."])


def chained(solution: Sequence[Computed]) -> str:
    """Two steps to a sentence."""
    pairs = [solution[i : i + 2] for i in range(0, len(solution), 2)]
    body = [", and then ".join(f"{_where(c)} {c.equation}" for c in pair) for pair in pairs]
    lead = ("We have", "After that,", "After that,")
    said = [f"{word} {text}." for word, text in zip(lead, body, strict=False)]
    return " ".join([*said, f"Hence the answer is {solution[-1].result}."])


STYLES: dict[str, Callable[[Sequence[Computed]], str]] = {
    "plain": plain,
    "terse": terse,
    "verbose": verbose,
    "numbered": numbered,
    "chained": chained,
}

_OPENINGS = {"First": "plain", "Let": "verbose", "Step": "numbered", "We": "chained"}
_OWNERS = {_capital(owner).split()[0] for topic in TOPICS for owner in topic.owners}


def style_of(text: str) -> str | None:
    """The style a rationale was written in, by its first word; None for a text of another hand."""
    words = text.split(maxsplit=1)
    first = words[0].rstrip(",:.") if words else ""
    return "terse" if first in _OWNERS else _OPENINGS.get(first)
