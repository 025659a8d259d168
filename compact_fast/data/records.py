"""Questions with several teachers' rationales: what every reader produces and tokenisation eats."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass
class Rationale:
    """One teacher's worked answer to one question."""

    teacher: str
    text: str
    answer: str | None = None
    """The teacher's final answer, as given or as extracted from `text`; None: it states none."""
    correct: bool | None = None
    """Whether `answer` equals the gold answer; None: unknown."""


@dataclass
class Question:
    """One question, its gold answer and one rationale a teacher (none in evaluation files)."""

    id: str
    question: str
    answer: str
    rationales: list[Rationale] = field(default_factory=list)
    choices: list[str] | None = None
    """Options in letter order; `answer` is then a letter or the text of an option."""
    messages: list[dict[str, Any]] | None = None
    """A conversation that ends in the user's turn, used instead of `question` where given."""
    source: str = ""
    """Where it was read, "file:line", for messages."""


def teachers_of(questions: Iterable[Question]) -> list[str]:
    """The teachers' names, in the order in which they first appear."""
    return list(dict.fromkeys(r.teacher for q in questions for r in q.rationales))


def select_teachers(questions: Iterable[Question], teachers: Sequence[str]) -> list[Question]:
    """The same questions with only these teachers' rationales; questions left with none go.

    Raises ValueError naming a teacher that gave no rationale at all, and the nearest name.
    """
    questions = list(questions)
    known = teachers_of(questions)
    for name in teachers:
        if name not in known:
            raise ValueError(f"teacher {name!r} is not in the data{nearest(name, known)}")
    wanted = set(teachers)
    kept = [
        replace(q, rationales=[r for r in q.rationales if r.teacher in wanted]) for q in questions
    ]
    return [q for q in kept if q.rationales]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: "; did you mean ...?" or what there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if not known:
        return ""
    return f"; there is {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
