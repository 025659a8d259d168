"""Is consensus ever worse than a vote on the final answers? On real files and on made-up teachers.

    python bench/matching/consensus_vote.py [--data FOLDER]

Writes bench/results/consensus_vote.csv: the AUC of right rationales above wrong ones inside a
question (ties 1/2, mean over the questions that have both) by the vote and by consensus with its
defaults, their difference and its standard error over questions, and how often the rationale with
the highest score is right (ties shared).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from records import ROOT, add_data, auc, machine, write

from compact_fast import __version__
from compact_fast.arithmetic.teachers import SCENARIOS, make_questions
from compact_fast.graphs import answer_keys, consensus

MADE_UP = 800  # questions of each made-up case


class Case(NamedTuple):
    """Rationales question by question."""

    name: str
    texts: list[str]
    answers: list[str | None]
    right: np.ndarray  # [S] bool
    cu: np.ndarray  # [Q + 1]


def case(name: str, questions: list[list[tuple[str, str | None, bool]]]) -> Case:
    flat = [rationale for question in questions for rationale in question]
    texts, answers, right = zip(*flat, strict=True)
    cu = np.cumsum([0, *map(len, questions)])
    return Case(name, list(texts), list(answers), np.array(right), cu)


def real(folder: Path) -> Iterator[Case]:
    """Every file that has final answers."""
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        questions = [
            [(r["text"], r["answer"], bool(r["correct"])) for r in row["rationales"]]
            for row in rows
            if row["rationales"]
        ]
        if any(answer is not None for question in questions for _, answer, _ in question):
            yield case(path.stem, questions)


def built_in() -> Iterator[Case]:
    """The built-in world's casts."""
    for scenario in SCENARIOS:
        found = make_questions(MADE_UP, 7, scenario=scenario)
        questions = [
            [(r.text, r.answer, bool(r.correct)) for r in question.rationales] for question in found
        ]
        yield case(f"arithmetic, {scenario}", questions)


OPENINGS = [
    "Now",
    "Then he has",
    "That makes",
    "So far",
    "Next comes",
    "Adding up:",
    "We get",
    "Here",
]
THINGS = ["of them", "pens in all", "apples", "on the table", "altogether", "for her", "left", "so"]


def chain(numbers: random.Random, words: random.Random, slip: int, start: int) -> tuple[str, int]:
    """Three sums from `start` on, the last one off by `slip`, each in words drawn anew."""
    lines, at = [], start
    for step in range(3):
        by = numbers.randrange(2, 9)
        result = at + by + (slip if step == 2 else 0)
        opening, thing, other = words.choice(OPENINGS), words.choice(THINGS), words.choice(THINGS)
        lines.append(f"{opening} {at} {thing} + {by} = {result} {other}.")
        at = result
    return "\n".join(lines), at


def made_up() -> Iterator[Case]:
    """Independent teachers, right with probability p, else one of four wrong answers. Their texts
    say nothing, or what has nothing to do with the answer, or share all but the last step; the last
    also word for word, so that consensus takes all who agree for copies of one."""
    kinds = ("answers alone", "unrelated steps", "slip at the end", "slip at the end, one wording")
    for teachers in (3, 5, 9):
        for p in (0.4, 0.7):
            for kind in kinds:
                rng = random.Random(f"{teachers} {p} {kind}")
                questions = []
                for _ in range(MADE_UP):
                    shared = rng.getrandbits(32)
                    question = []
                    for _ in range(teachers):
                        right = rng.random() < p
                        slip = 0 if right else rng.choice((-2, -1, 1, 2))
                        answer, steps = str(slip), ""
                        if kind == "unrelated steps":
                            steps, _ = chain(rng, rng, 0, rng.randrange(20, 90))
                        elif kind != "answers alone":
                            numbers = random.Random(shared)
                            words = numbers if kind.endswith("wording") else rng
                            steps, end = chain(numbers, words, slip, numbers.randrange(20, 90))
                            answer = str(end)
                        text = f"{steps}\nThe answer is {answer}.".strip()
                        question.append((text, answer, right))
                    questions.append(question)
                yield case(f"{kind}; {teachers} teachers right with {p}", questions)


def vote(c: Case) -> np.ndarray:
    """Share of a question's other teachers with the same final answer."""
    keys, given = answer_keys(c.answers)
    scores = np.zeros(len(c.texts))
    for a, b in zip(c.cu[:-1], c.cu[1:], strict=True):
        same = (keys[a:b, None] == keys[a:b]) & given[a:b, None] & given[a:b]
        np.fill_diagonal(same, False)
        scores[a:b] = same.sum(1) / max(1, b - a - 1)
    return scores


def judge(c: Case, scores: np.ndarray) -> tuple[np.ndarray, float]:
    """AUC of each mixed question; share of all questions whose best rationale is right."""
    values, best = [], []
    for a, b in zip(c.cu[:-1], c.cu[1:], strict=True):
        mine, right = scores[a:b], c.right[a:b]
        best.append(right[mine == mine.max()].mean())
        if right.any() and not right.all():
            values.append(auc(mine, right))
    return np.array(values), float(np.mean(best))


def row(c: Case) -> dict[str, Any] | None:
    """One line of the table; None where no question has right and wrong rationales."""
    by_vote, best_by_vote = judge(c, vote(c))
    found = consensus(c.texts, c.cu, final_answers=c.answers)
    by_consensus, best_by_consensus = judge(c, found.scores)
    if not by_vote.size:
        return None
    gap = by_consensus - by_vote
    figures = {
        "auc_vote": by_vote.mean(),
        "auc_consensus": by_consensus.mean(),
        "difference": gap.mean(),
        "standard_error": gap.std() / len(gap) ** 0.5,
        "best_right_vote": best_by_vote,
        "best_right_consensus": best_by_consensus,
    }
    return {
        "case": c.name,
        "questions": len(c.cu) - 1,
        "mixed": len(gap),
        **{name: f"{value:.4f}" for name, value in figures.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_data(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/consensus_vote.csv")
    arguments = parser.parse_args()
    made = {"version": __version__, **machine()}
    lines = []
    for cases in (real(arguments.data), built_in(), made_up()):
        for c in cases:
            if (line := row(c)) is not None:
                lines.append({**line, **made})
                print(f"{c.name:55}", *(line[k] for k in list(line)[2:]))
    write(arguments.out, lines)


if __name__ == "__main__":
    main()
