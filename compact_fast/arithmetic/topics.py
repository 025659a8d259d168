"""The wording of the world's questions: topics, each with its own events."""

from __future__ import annotations

from dataclasses import dataclass

from compact_fast.arithmetic.steps import Operator

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

COMMON_EVENTS: dict[Operator, str] = {
    "+": "{a} gets {n} {x}",
    "-": "{a} loses {n} {x}",
    "*": "{a} gets {n} times as many {x}",
    "/": "{a} makes {n} equal parts and keeps one part",
}
"""One phrase an operator that every topic has: the words that the student knows from the start."""


@dataclass(frozen=True)
class Topic:
    """Phrases of one topic. Fields: {a} owner, {n} number, {m} second number, {x} thing counted."""

    name: str
    owners: tuple[str, ...]
    things: tuple[str, ...]
    start: tuple[str, ...]
    packed: str  # m groups of n things: the start is a product
    events: dict[Operator, tuple[str, ...]]  # beside the common ones; their words are to be learnt
    distractors: tuple[str, ...]


TOPICS = (
    Topic(
        "things",
        ("Ann", "Ben", "Mia", "Tom"),
        ("marbles", "apples", "cards", "coins"),
        ("{a} has {n} {x}", "{a} starts with {n} {x}"),
        "{a} has {m} boxes with {n} {x} in each",
        {
            "+": ("{a} buys {n} {x}", "{a} finds {n} {x}", "{a} wins {n} {x}"),
            "-": ("{a} sells {n} {x}", "{a} drops {n} {x}", "{a} gives {n} {x} away"),
        },
        ("{a} is {n} years old", "{a} has {n} cousins"),
    ),
    Topic(
        "bus",
        ("bus A", "bus B", "bus C"),
        ("people",),
        ("{a} carries {n} {x}", "{a} starts with {n} {x}"),
        "{a} has {m} rows with {n} {x} in each",
        {
            "+": ("{n} {x} board {a}", "{a} collects {n} {x}"),
            "-": ("{n} {x} leave {a}", "{a} drops {n} {x}"),
        },
        ("{a} has {n} windows", "{a} is {n} years old"),
    ),
    Topic(
        "farm",
        ("farm A", "farm B", "farm C"),
        ("hens", "sheep", "cows"),
        ("{a} has {n} {x}", "{n} {x} live on {a}"),
        "{a} has {m} barns with {n} {x} in each",
        {
            "+": ("{a} buys {n} {x}", "{n} {x} join {a}"),
            "-": ("{a} sells {n} {x}", "{n} {x} leave {a}"),
        },
        ("{a} has {n} windows", "{a} has {n} dogs"),
    ),
    Topic(
        "water",
        ("tank A", "tank B", "tank C"),
        ("liters",),
        ("{a} holds {n} {x}", "{a} starts with {n} {x}"),
        "{a} has {m} cans with {n} {x} in each",
        {
            "+": ("{a} collects {n} {x}", "{n} {x} enter {a}"),
            "-": ("{a} spills {n} {x}", "{n} {x} leave {a}"),
        },
        ("{a} is {n} years old", "{a} has {n} handles"),
    ),
)

ENDINGS = {
    "end": ("How many {x} does {a} have in the end?", "How many {x} are there in the end?"),
    "together": ("How many {x} do {a} and {b} have together?",),
    "more": ("How many more {x} than {b} does {a} have?",),
}
