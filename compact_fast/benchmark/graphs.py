"""Reading rationales and matching them, on texts of the built-in world."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compact_fast.arithmetic import make_questions
from compact_fast.graphs import backend_name, match, parse_rationales
from compact_fast.graphs.options import Mode

QUESTIONS = 400
MODES: tuple[Mode, ...] = ("relaxed", "fast", "exact")


@dataclass(frozen=True)
class Rate:
    """How many of something a second."""

    task: str
    unit: str
    per_second: float


def rates(threads: int = 1, *, questions: int = QUESTIONS, seconds: float = 1.0) -> list[Rate]:
    """Parsing, and matching all pairs of teachers of a question in every mode."""
    made = make_questions(questions, seed=0)
    texts = [r.text for q in made for r in q.rationales]
    bounds = list(itertools.accumulate((len(q.rationales) for q in made), initial=0))
    pairs = np.array(
        [p for a, b in itertools.pairwise(bounds) for p in itertools.combinations(range(a, b), 2)]
    )
    name, _ = backend_name()
    out = [
        Rate(
            f"reading rationales ({name})",
            "rationales",
            len(texts) / _median(lambda: parse_rationales(texts, threads=threads), seconds),
        )
    ]
    graphs = parse_rationales(texts, threads=threads)
    for mode in MODES:
        took = _median(lambda mode=mode: match(graphs, pairs, mode, threads=threads), seconds)  # type: ignore[misc]
        out.append(Rate(f"matching, {mode}", "pairs", len(pairs) / took))
    return out


def _median(run: Callable[[], object], seconds: float) -> float:
    """Median time of at least three runs, and of as many as fit into `seconds`."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
