"""Agreement between a question's rationales, and each one's consensus score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compact_fast.graphs import fallback_match as twin
from compact_fast.graphs.fallback_parse import Graph
from compact_fast.graphs.matching import (
    as_array,
    check_graphs,
    consensus_settings,
    match_python,
    quantise,
)
from compact_fast.graphs.native import Backend, backend_name, choose
from compact_fast.graphs.options import (
    MODES,
    UNIT,
    Centrality,
    GraphOptions,
    Mode,
    check_options,
)
from compact_fast.graphs.parsing import (
    BeyondLimitsError,
    as_list,
    check_texts,
    check_threads,
    parse_python,
    raise_parse_error,
    set_answers,
    unpack,
)
from compact_fast.graphs.structure import Int64, StepGraphs, check_offsets

NO_EVIDENCE, UNDECIDABLE = 1, 2
MOST_TEACHERS = 4096  # of one question


@dataclass(frozen=True, eq=False)
class ConsensusResult:
    """Scores of S rationales of Q questions."""

    scores: NDArray[np.float64]  # [S] in [0, 1]
    agreement: list[NDArray[np.float64]]  # Q matrices [K, K], symmetric, 1 on the diagonal
    groups: NDArray[np.int32]  # [S]; texts with one number inside a question share one vote
    no_evidence: NDArray[np.bool_]  # [Q]; fewer than two groups: all scores are 1
    undecidable: NDArray[np.bool_]  # [Q]; two groups: all scores are equal
    backend: str  # "native" or "rustworkx"
    backend_reason: str


def consensus(
    texts: Sequence[str],  # [S] rationales, question by question
    cu_teachers: ArrayLike,  # [Q+1] integers; question q has texts cu_teachers[q]..[q+1]-1
    *,
    final_answers: Sequence[str | None] | None = None,  # [S]; None: find them in the texts
    options: GraphOptions | None = None,
    mode: Mode = "relaxed",
    centrality: Centrality = "coverage",
    cluster_at: float = 0.5,
    node_budget: int = 100_000,
    backend: Backend = "auto",
    threads: int | None = None,
) -> ConsensusResult:
    """Score every rationale by its agreement with the other teachers of its question.

    Texts become step graphs, all pairs of a question are matched, the final answers join with
    their share, and near-identical texts share one vote. A score is the mean, over the other votes,
    of how much of their reasoning the rationale covers ("coverage"), of how far both agree
    ("agreement"), or the first counted only from those it agrees with by at least `cluster_at`
    ("cluster"); its own soundness joins with its share. The result does not depend on threads, on
    the order of teachers or on what else is in the call. Without the native module it is computed
    on rustworkx, with the same values.

    Raises ValueError naming question and teacher for texts that are not valid strings or too long
    (BeyondLimitsError), and for offsets that do not fit.
    """
    options = check_options(options)
    settings = consensus_settings(
        options, mode, centrality, node_budget=node_budget, cluster_at=cluster_at
    )
    texts = as_list(texts, "texts")
    cu = _check_cu(cu_teachers, len(texts))
    count = check_threads(threads)
    native, _ = choose(backend)
    try:
        texts = check_texts(texts)
        if final_answers is not None:
            final_answers = as_list(final_answers, "final answers")
            if len(final_answers) != len(texts):
                raise ValueError(f"{len(texts)} texts, but {len(final_answers)} final answers")
            final_answers = check_texts(final_answers, "final answer", optional=True)
        if native is not None:
            try:
                flat = native.score_texts(texts, cu, final_answers, settings, count)
            except OverflowError as error:
                raise_parse_error(error)
        else:
            graphs = parse_python(texts, options)
            if final_answers is not None:
                set_answers(graphs, final_answers)
            flat = _score_python(graphs, cu, settings, None)
    except BeyondLimitsError as error:
        raise BeyondLimitsError(name_place(str(error), cu)) from None
    except ValueError as error:
        raise ValueError(name_place(str(error), cu)) from None
    return _result(flat, cu, backend)


def score_graphs(
    graphs: StepGraphs,
    cu_teachers: ArrayLike,
    *,
    options: GraphOptions | None = None,
    embeddings: ArrayLike | None = None,  # [N, width] floats: one row a step
    mode: Mode = "relaxed",
    centrality: Centrality = "coverage",
    cluster_at: float = 0.5,
    node_budget: int = 100_000,
    backend: Backend = "auto",
    threads: int | None = None,
) -> ConsensusResult:
    """As `consensus`, from graphs that are already parsed, with embeddings if wanted."""
    settings = consensus_settings(
        check_options(options), mode, centrality, node_budget=node_budget, cluster_at=cluster_at
    )
    count = check_threads(threads)
    cu = _check_cu(cu_teachers, len(check_graphs(graphs)))
    rows = quantise(embeddings, graphs.result.size)
    native, _ = choose(backend)
    if native is not None:
        flat = native.score_graphs(graphs.arrays(), rows, cu, settings, count)
    else:
        lists = None
        if rows is not None:
            lists = [part.tolist() for part in np.split(rows, graphs.cu_nodes[1:-1])]
        flat = _score_python(unpack(graphs), cu, settings, lists)
    return _result(flat, cu, backend)


def agreement(
    graphs: StepGraphs, cu_teachers: ArrayLike, **choices: Any
) -> list[NDArray[np.float64]]:
    """One matrix [K, K] a question: how far two rationales agree, 0 to 1. See `score_graphs`."""
    return score_graphs(graphs, cu_teachers, **choices).agreement


def _check_cu(cu_teachers: ArrayLike, texts: int) -> Int64:
    cu = as_array("cu_teachers", cu_teachers)
    if cu.ndim != 1 or cu.size < 1 or cu.dtype.kind not in "iu":
        raise ValueError(f"cu_teachers: expected integers [Q + 1], got {cu.dtype} {cu.shape}")
    check_offsets("cu_teachers", cu, cu.size - 1, texts)
    many = np.flatnonzero(np.diff(cu) > MOST_TEACHERS)
    if many.size:
        q = many[0]
        raise ValueError(
            f"question {q}: {cu[q + 1] - cu[q]} teachers; at most {MOST_TEACHERS}, for all pairs "
            "are compared (has cu_teachers an entry for every question?)"
        )
    return np.ascontiguousarray(cu, dtype=np.int64)


def name_place(message: str, cu: Int64) -> str:
    """ "text 7: ..." or "final answer 7: ..." with question and teacher put in front."""
    for what in ("text ", "final answer "):
        if message.startswith(what) and (index := message[len(what) :].partition(":")[0]).isdigit():
            question = int(np.searchsorted(cu, int(index), side="right")) - 1
            return f"question {question}, teacher {int(index) - cu[question]}: {message}"
    return message


def _result(flat: tuple[Any, ...], cu: Int64, backend: Backend) -> ConsensusResult:
    r, scores, groups, flags = flat
    name, reason = backend_name(backend)
    return ConsensusResult(
        scores=scores,
        agreement=_matrices(r / UNIT, np.diff(cu)),
        groups=groups,
        no_evidence=(flags & NO_EVIDENCE) > 0,
        undecidable=(flags & UNDECIDABLE) > 0,
        backend=name,
        backend_reason=reason,
    )


def _matrices(flat: NDArray[np.float64], sizes: Int64) -> list[NDArray[np.float64]]:
    """One [K, K] a question. Runs of equal K at once: this part has one thread, whatever comes."""
    out: list[NDArray[np.float64]] = []
    bounds = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), sizes.size]
    at = 0
    for first, behind in pairwise(bounds):
        if first < behind:
            k = int(sizes[first])
            end = at + (behind - first) * k * k
            out += list(flat[at:end].reshape(behind - first, k, k))
            at = end
    return out


def _score_python(
    graphs: Sequence[Graph], cu: Int64, o: dict[str, int], rows: list[Any] | None
) -> tuple[Any, ...]:
    mode = MODES[o["mode"]]
    r_all: list[int] = []
    scores: list[float] = []
    groups: list[int] = []
    flags: list[int] = []
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        mine = graphs[begin:end]
        k = len(mine)
        selves = [twin.self_value(g, o, mode, rows is not None) for g in mine]
        r = [[UNIT] * k for _ in range(k)]
        covers = [[UNIT] * k for _ in range(k)]
        for i in range(k):
            for j in range(i + 1, k):
                both = None if rows is None else (rows[begin + i], rows[begin + j])
                value = match_python(mine[i], mine[j], o, mode, both).value
                agrees, covers[i][j], covers[j][i] = twin.compare(
                    mine[i], mine[j], (selves[i], selves[j]), value, o["answer_share"]
                )
                r[i][j] = r[j][i] = agrees
        group = twin.surface_groups(mine, o)
        sound = [twin.soundness(g) for g in mine]
        score, flag = twin.score_groups(r, covers, sound, group, o)
        r_all += [x for row in r for x in row]
        scores += score
        groups += group
        flags.append(flag)
    return (
        np.array(r_all, dtype=np.int64),
        np.array(scores, dtype=np.float64),
        np.array(groups, dtype=np.int32),
        np.array(flags, dtype=np.uint8),
    )
