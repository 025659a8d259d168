"""Graph consensus of a run's questions, computed once and kept by content."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compact_fast.atomic import atomic_file
from compact_fast.data.records import Question

Backend = Literal["auto", "native", "rustworkx"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Agreement:
    """How far the teachers of each question agree. Sequences lie question by question."""

    scores: list[NDArray[np.float64]]  # a question: [K] in [0, 1]
    matrices: list[NDArray[np.float64]]  # a question: [K, K] in [0, 1]
    no_evidence: NDArray[np.bool_]  # [Q]; one teacher, or one distinct text
    undecidable: NDArray[np.bool_]  # [Q]; two
    backend: str
    cached: bool
    answer_only: list[str] = field(default_factory=list)
    """Rationales too long for a step graph, by name: compared by their final answers alone."""


def graph_agreement(
    questions: Sequence[Question],
    *,
    backend: Backend = "auto",
    threads: int | None = None,
    cache_dir: Path | None = None,
) -> Agreement:
    """Graph consensus of every question, from `cache_dir` where the same texts are known.

    No rationale is too long for it: see `Agreement.answer_only`.
    """
    texts = [r.text for q in questions for r in q.rationales]
    answers = [r.answer for q in questions for r in q.rationales]
    sizes = [len(q.rationales) for q in questions]
    path = None
    if cache_dir is not None:
        path = cache_dir / "consensus" / f"{_digest(texts, answers, sizes)}.npz"
        if (found := _load(path, sizes)) is not None:
            return _named(*found, questions)
    computed = _compute(texts, answers, sizes, backend, threads)
    if path is not None:
        _store(path, *computed)
    return _named(*computed, questions)


def _named(agreement: Agreement, beyond: Sequence[int], questions: Sequence[Question]) -> Agreement:
    """With the names of the rationales at these places among all."""
    if not len(beyond):
        return agreement
    names = [
        f"{q.source + ': ' if q.source else ''}question {q.id}, teacher {r.teacher}"
        for q in questions
        for r in q.rationales
    ]
    return replace(agreement, answer_only=[names[s] for s in beyond])


def _compute(
    texts: list[str],
    answers: list[str | None],
    sizes: list[int],
    backend: Backend,
    threads: int | None,
) -> tuple[Agreement, list[int]]:
    """The agreement, and the places of the rationales that are compared by their answers alone."""
    from compact_fast.graphs import consensus
    from compact_fast.graphs.limits import stand_ins
    from compact_fast.graphs.parsing import BeyondLimitsError

    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    choices: dict[str, Any] = {"final_answers": answers, "backend": backend, "threads": threads}
    beyond: list[int] = []
    try:
        result = consensus(texts, offsets, **choices)
    except BeyondLimitsError:
        texts, beyond = stand_ins(texts, find_answers=False, backend=backend)
        result = consensus(texts, offsets, **choices)
    scores = np.asarray(result.scores, dtype=np.float64)
    agreement = Agreement(
        scores=np.split(scores, offsets[1:-1]),
        matrices=[np.asarray(m, dtype=np.float64) for m in result.agreement],
        no_evidence=np.asarray(result.no_evidence, dtype=bool),
        undecidable=np.asarray(result.undecidable, dtype=bool),
        backend=str(result.backend),
        cached=False,
    )
    return agreement, beyond


def _digest(texts: list[str], answers: list[str | None], sizes: list[int]) -> str:
    digest = hashlib.sha256(_code())
    content = json.dumps([sizes, texts, answers], ensure_ascii=False)
    digest.update(content.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:40]


def _code() -> bytes:
    """A digest of what computes the consensus: other code, other scores."""
    from compact_fast import graphs

    package = Path(str(graphs.__file__)).parent
    digest = hashlib.sha256()
    for path in [*sorted(package.glob("*.py")), *sorted(package.parent.glob("_native*"))]:
        digest.update(path.read_bytes())
    return digest.digest()


def _store(path: Path, agreement: Agreement, beyond: Sequence[int]) -> None:
    flat = np.concatenate([m.ravel() for m in agreement.matrices])
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            scores=np.concatenate(agreement.scores),
            matrices=flat,
            no_evidence=agreement.no_evidence,
            undecidable=agreement.undecidable,
            backend=np.array(agreement.backend),
            beyond=np.array(beyond, dtype=np.int64),
        )


def _load(path: Path, sizes: list[int]) -> tuple[Agreement, list[int]] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            parts = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: damaged (%s); the consensus is computed anew", path, error)
        return None
    k = np.array(sizes)
    matrices = np.split(parts["matrices"], np.cumsum(k * k)[:-1])
    agreement = Agreement(
        scores=np.split(parts["scores"], np.cumsum(k)[:-1]),
        matrices=[m.reshape(n, n) for m, n in zip(matrices, sizes, strict=True)],
        no_evidence=parts["no_evidence"],
        undecidable=parts["undecidable"],
        backend=str(parts["backend"]),
        cached=True,
    )
    return agreement, parts["beyond"].tolist()


def teacher_table(
    questions: Sequence[Question], teachers: Sequence[str], agreement: Agreement
) -> dict[str, Any]:
    """Mean agreement of every pair of teachers, JSON-ready; None where a pair never met.

    Keys: teachers, matrix [n][n], counts [n][n] (questions both answered).
    """
    index = {name: i for i, name in enumerate(teachers)}
    total = np.zeros((len(teachers), len(teachers)))
    counts = np.zeros((len(teachers), len(teachers)), dtype=np.int64)
    for question, matrix in zip(questions, agreement.matrices, strict=True):
        ids = [index[r.teacher] for r in question.rationales]
        total[np.ix_(ids, ids)] += matrix
        counts[np.ix_(ids, ids)] += 1
    met = counts > 0
    mean = np.where(met, total / np.maximum(counts, 1), 0.0)
    rows = [
        [float(mean[i, j]) if met[i, j] else None for j in range(len(teachers))]
        for i in range(len(teachers))
    ]
    return {"teachers": list(teachers), "matrix": rows, "counts": counts.tolist()}


def mean_with_others(table: Mapping[str, Any]) -> list[float | None]:
    """Each teacher's mean agreement with the others, over the questions both answered."""
    out: list[float | None] = []
    for i, row in enumerate(table["matrix"]):
        pairs = [
            (value, table["counts"][i][j])
            for j, value in enumerate(row)
            if j != i and value is not None
        ]
        n = sum(count for _, count in pairs)
        out.append(sum(value * count for value, count in pairs) / n if n else None)
    return out


def filtered_share(
    questions: Sequence[Question],
    teachers: Sequence[str],
    agreement: Agreement,
    filter_below: float,
) -> list[float]:
    """Each teacher's share of rationales whose consensus is below filter_below x the largest."""
    index = {name: i for i, name in enumerate(teachers)}
    filtered, total = [0] * len(teachers), [0] * len(teachers)
    for q, (question, scores) in enumerate(zip(questions, agreement.scores, strict=True)):
        evidence = not agreement.no_evidence[q]
        for rationale, score in zip(question.rationales, scores, strict=True):
            i = index[rationale.teacher]
            total[i] += 1
            filtered[i] += bool(evidence and score < filter_below * scores.max())
    return [f / n if n else 0.0 for f, n in zip(filtered, total, strict=True)]
