"""How a worked solution is put into words. Every style ends by stating the final answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compact_fast.arithmetic.steps import Computed, Of

_GAIN = {"+": "more", "-": "fewer", "*": "times as many", "/": "equal parts"}


def _where(done: Computed) -> str:
    """The place in the question that a step belongs to."""
    if done.step.when in ("together", "more"):
        return "in the end"
    if done.step.when == "start":
        return f"at the start for {done.step.owner}"
    return f"on {done.step.when}"


def _start(solution: Sequence[Computed]) -> int | None:
    left = solution[0].step.left
    return None if isinstance(left, Of) or solution[0].step.when == "start" else left


def plain(solution: Sequence[Computed]) -> str:
    """One sentence a step, with its day."""
    lead = ("First", "Then", "Next", "Then", "Then")
    body = [f"{word}, {_where(c)} {c.equation}." for word, c in zip(lead, solution, strict=False)]
    return " ".join([*body, f"So the answer is {solution[-1].result}."])


def terse(solution: Sequence[Computed]) -> str:
    """Equations only."""
    return " ".join(
        [*(f"{c.equation}." for c in solution), f"The answer is {solution[-1].result}."]
    )


def verbose(solution: Sequence[Computed]) -> str:
    """Every step said in words before it is computed."""
    body = ["Let us see."]
    if (start := _start(solution)) is not None:
        body.append(f"{_name(solution[0].step.owner)} begins with {start}.")
    for c in solution:
        if c.step.when in ("together", "more"):
            both = f"Finally, we compare {c.left} with {c.right}"
            if c.step.operator == "+":
                both = f"Finally, we add {c.left} and {c.right}"
            body.append(f"{both}, and {c.equation}.")
        elif c.step.when == "start":
            body.append(
                f"{_name(c.step.owner)} has {c.left} groups of {c.right}, and {c.equation}."
            )
        else:
            what = f"{c.right} {_GAIN[c.step.operator]}"
            body.append(f"On {c.step.when} there are {what}, and {c.equation}.")
    return " ".join([*body, f"Therefore, the answer is {solution[-1].result}."])


def numbered(solution: Sequence[Computed]) -> str:
    """Enumerated steps, one a line."""
    lines = [f"Step {i}: {_where(c)} {c.equation}" for i, c in enumerate(solution, 1)]
    return "\n".join([*lines, f"Thus the answer is {solution[-1].result}."])


def chained(solution: Sequence[Computed]) -> str:
    """Two steps to a sentence."""
    pairs = [solution[i : i + 2] for i in range(0, len(solution), 2)]
    body = [", and then ".join(c.equation for c in pair) for pair in pairs]
    lead = ("We have", "After that,", "After that,")
    said = [f"{word} {text}." for word, text in zip(lead, body, strict=False)]
    return " ".join([*said, f"Hence the answer is {solution[-1].result}."])


def _name(owner: str) -> str:
    return owner[0].upper() + owner[1:]


STYLES: dict[str, Callable[[Sequence[Computed]], str]] = {
    "plain": plain,
    "terse": terse,
    "verbose": verbose,
    "numbered": numbered,
    "chained": chained,
}

OPENINGS = {
    "plain": "First",
    "terse": "",  # begins with a number
    "verbose": "Let",
    "numbered": "Step",
    "chained": "We",
}
"""The first word of each style, which tells the style of a text."""


def style_of(text: str) -> str | None:
    """The style a rationale was written in, by its first word; None for text of another hand."""
    word = text.split(maxsplit=1)[0].rstrip(",:.") if text.strip() else ""
    if word.isdigit():
        return "terse"
    return next((name for name, opening in OPENINGS.items() if opening and word == opening), None)
