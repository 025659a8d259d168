"""Matching pairs of step graphs; the objective and the modes are described in csrc/matching.h."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compact_fast.graphs import fallback_match as twin
from compact_fast.graphs.fallback_parse import Graph
from compact_fast.graphs.native import Backend, choose
from compact_fast.graphs.options import (
    CENTRALITIES,
    MODES,
    MOST_STEPS,
    ONE,
    UNIT,
    Centrality,
    GraphOptions,
    Mode,
    check_options,
)
from compact_fast.graphs.parsing import as_list, check_threads, unpack
from compact_fast.graphs.structure import Int64, StepGraphs, check_edges, check_offsets


@dataclass(frozen=True, eq=False)
class MatchResult:
    """P matchings. Values and bounds are in units of 1/32768 of one wholly matched step."""

    values: Int64  # [P]
    bounds: Int64  # [P]; no matching is worth more
    proven: NDArray[np.bool_]  # [P]; the value is the best there is
    scores: NDArray[np.float64]  # [P] in [0, 1]: 2 F(a, b) / (F(a, a) + F(b, b)); 0 if all are 0
    cu_assigned: Int64  # [P+1]
    assigned: NDArray[np.int32]  # step of the second graph for each step of the first, or -1


def match(
    graphs: StepGraphs,
    pairs: ArrayLike,  # [P, 2] integers: indices of graphs
    mode: Mode = "relaxed",
    *,
    options: GraphOptions | None = None,
    embeddings: ArrayLike | None = None,  # [N, width] floats: one row a step
    node_budget: int = 100_000,
    backend: Backend = "auto",
    threads: int | None = None,
) -> MatchResult:
    """Match pairs of graphs. `exact` stops at `node_budget` search nodes a pair and then gives a
    bound; rustworkx does `relaxed`, and `exact` up to 10 steps in the smaller graph.

    Raises ValueError naming the pair and the value for indices out of range, a bad mode, or
    embeddings that are not finite or do not fit.
    """
    settings = consensus_settings(check_options(options), mode, "coverage", node_budget=node_budget)
    count = check_threads(threads)
    index = check_pairs(pairs, len(check_graphs(graphs)))
    rows = quantise(embeddings, graphs.result.size)
    native, _ = choose(backend)
    if native is not None:
        values, bounds, proven, selves, cu, assigned = native.match_graphs(
            graphs.arrays(), rows, index, settings, count
        )
    else:
        values, bounds, proven, selves, cu, assigned = _match_python(graphs, rows, index, settings)
    total = selves.reshape(-1, 2).sum(1)
    scores = np.minimum(1.0, 2.0 * values / np.maximum(total, 1)) * (total > 0)
    return MatchResult(values, bounds, proven.astype(bool), scores, cu, assigned)


def consensus_settings(
    options: GraphOptions,
    mode: Mode,
    centrality: Centrality,
    *,
    node_budget: int = 100_000,
    cluster_at: float = 0.5,
) -> dict[str, int]:
    """All choices as the integers csrc takes. Raises ValueError naming the value."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if centrality not in CENTRALITIES:
        raise ValueError(f"centrality={centrality!r}: expected one of {', '.join(CENTRALITIES)}")
    if isinstance(node_budget, bool) or not isinstance(node_budget, int) or node_budget < 0:
        raise ValueError(f"node_budget={node_budget!r}: expected an integer >= 0")
    number = isinstance(cluster_at, (int, float)) and not isinstance(cluster_at, bool)
    if not number or not 0 <= cluster_at <= 1:
        raise ValueError(f"cluster_at={cluster_at!r}: expected a number from 0 to 1")
    return {
        **options.integers(),
        "mode": MODES.index(mode),
        "centrality": CENTRALITIES.index(centrality),
        "node_budget": min(node_budget, 1 << 62),
        "cluster_at": round(cluster_at * UNIT),
    }


def as_array(name: str, values: ArrayLike) -> NDArray[Any]:
    """`values` as an array. Raises ValueError naming them where their rows differ in length."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: expected an array: {error}") from None


def check_graphs(graphs: StepGraphs) -> StepGraphs:
    """The graphs themselves. Raises ValueError for anything else."""
    if not isinstance(graphs, StepGraphs):
        raise ValueError(f"graphs: expected StepGraphs, got {type(graphs).__name__}")
    return graphs


def check_pairs(pairs: ArrayLike, graphs: int) -> Int64:
    """[P, 2] int64, all inside the graphs."""
    index = as_array("pairs", pairs)
    if index.size == 0:
        index = np.zeros((0, 2), dtype=np.int64)
    if index.ndim != 2 or index.shape[1] != 2 or index.dtype.kind not in "iu":
        raise ValueError(f"pairs: expected integers [P, 2], got {index.dtype} {index.shape}")
    bad = np.argwhere((index < 0) | (index >= graphs))
    if bad.size:
        p, side = bad[0]
        raise ValueError(f"pairs[{p}, {side}] = {index[p, side]}: there are {graphs} graphs")
    return np.array(index, dtype=np.int64, order="C")


def quantise(embeddings: ArrayLike | None, nodes: int) -> NDArray[np.int8] | None:
    """Rows of length 127, rounded to int8: from here on all arithmetic is on integers."""
    if embeddings is None:
        return None
    rows = as_array("embeddings", embeddings)
    if rows.ndim != 2 or rows.shape[0] != nodes or rows.dtype.kind != "f":
        raise ValueError(
            f"embeddings: expected floats [{nodes}, width], one row a step, got {rows.dtype} "
            f"{rows.shape}"
        )
    bad = np.argwhere(~np.isfinite(rows))
    if bad.size:
        i, d = bad[0]
        raise ValueError(f"embeddings[{i}, {d}] = {rows[i, d]}: must be finite")
    wide = rows.astype(np.float64)
    scale = np.abs(wide).max(axis=1, initial=0.0, keepdims=True)
    wide = np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0)
    norm = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    unit = np.divide(wide, norm, out=np.zeros_like(wide), where=norm > 0)
    quantised: NDArray[np.int8] = np.rint(unit * 127).astype(np.int8)
    return quantised


def _match_python(
    graphs: StepGraphs, rows: NDArray[np.int8] | None, pairs: Int64, o: dict[str, int]
) -> tuple[Any, ...]:
    objects = unpack(graphs)
    lists = None if rows is None else rows.tolist()
    cu = graphs.cu_nodes.tolist()
    mode = MODES[o["mode"]]
    values, bounds, proven, selves, assigned, sizes = [], [], [], [], [], [0]
    for a, b in pairs.tolist():
        both = None if lists is None else (lists[cu[a] : cu[a + 1]], lists[cu[b] : cu[b + 1]])
        out = match_python(objects[a], objects[b], o, mode, both)
        values.append(out.value)
        bounds.append(out.bound)
        proven.append(out.proven)
        selves += [twin.self_value(objects[g], o, mode, rows is not None) for g in (a, b)]
        assigned += out.assigned
        sizes.append(len(assigned))
    int64 = [np.array(x, dtype=np.int64) for x in (values, bounds, selves, sizes)]
    return (
        int64[0], int64[1], np.array(proven, dtype=bool), int64[2], int64[3],
        np.array(assigned, dtype=np.int32),
    )  # fmt: skip


def match_python(
    a: Graph, b: Graph, o: dict[str, int], mode: str, rows: twin.RowsPair = None
) -> twin.Outcome:
    """One pair by the fallback."""
    half = (o["edge_next"], o["edge_uses"])
    similarity = twin.similarity(a, b, o, rows)
    if not a.nodes or not b.nodes:
        return twin.Outcome(0, 0, True, [-1] * len(a.nodes))
    return twin.match_matrix(similarity, a.edges, b.edges, half, mode, o["node_budget"])


def match_matrices(
    similarities: Sequence[ArrayLike],  # P matrices [n, m], int32 in units of 1/32768
    edges_a: Sequence[ArrayLike],  # P arrays [E, 3]: source, target, type (0 or 1)
    edges_b: Sequence[ArrayLike],
    mode: Mode = "relaxed",
    *,
    options: GraphOptions | None = None,
    node_budget: int = 100_000,
    backend: Backend = "auto",
    threads: int | None = None,
) -> MatchResult:
    """Match pairs whose node similarity is given; `scores` are NaN, for there is no self-match.

    Raises ValueError naming the pair for a wrong shape or dtype, similarities below 0 or above
    32768, and edges that leave their graph, loop or repeat.
    """
    settings = consensus_settings(check_options(options), mode, "coverage", node_budget=node_budget)
    count = check_threads(threads)
    matrices = [_check_similarity(p, s) for p, s in enumerate(as_list(similarities, "matrices"))]
    edges_a, edges_b = as_list(edges_a, "edge lists"), as_list(edges_b, "edge lists")
    if not len(matrices) == len(edges_a) == len(edges_b):
        raise ValueError(
            f"{len(matrices)} similarities, {len(edges_a)} and {len(edges_b)} edge lists"
        )
    sizes = np.array([s.shape for s in matrices], dtype=np.int64).reshape(-1, 2)
    large = np.flatnonzero(sizes.max(1, initial=0) > MOST_STEPS)
    if large.size:
        raise ValueError(f"pair {large[0]}: {sizes[large[0]].max()} steps; at most {MOST_STEPS}")
    a, b = (_edges(name, edges, sizes[:, side]) for side, name, edges in (
        (0, "edges_a", edges_a), (1, "edges_b", edges_b)))  # fmt: skip
    native, _ = choose(backend)
    if native is not None:
        half = np.array([settings["edge_next"], settings["edge_uses"]], dtype=np.int64)
        cu = np.concatenate([[0], np.cumsum(sizes.prod(1))]).astype(np.int64)
        flat = np.concatenate([np.zeros(0, np.int32), *(s.ravel() for s in matrices)])
        values, bounds, proven, rows, assigned = native.match_arrays(
            flat, cu, sizes, a, b, half, settings["mode"], settings["node_budget"], count
        )
        nan = np.full(len(matrices), np.nan)
        return MatchResult(values, bounds, proven.astype(bool), nan, rows, assigned)
    found = []
    half2 = (settings["edge_next"], settings["edge_uses"])
    for s, ea, eb in zip(matrices, edges_a, edges_b, strict=True):
        if s.size == 0:
            found.append(twin.Outcome(0, 0, True, [-1] * s.shape[0]))
            continue
        both = _edge_tuples(ea), _edge_tuples(eb)
        found.append(twin.match_matrix(s.tolist(), both[0], both[1], half2, mode, node_budget))
    return MatchResult(
        np.array([f.value for f in found], dtype=np.int64),
        np.array([f.bound for f in found], dtype=np.int64),
        np.array([f.proven for f in found], dtype=bool),
        np.full(len(found), np.nan),
        np.concatenate([[0], np.cumsum(sizes[:, 0])]).astype(np.int64),
        np.array([j for f in found for j in f.assigned], dtype=np.int32),
    )


def _edge_tuples(edges: ArrayLike) -> list[tuple[int, int, int]]:
    return [(int(a), int(b), int(kind)) for a, b, kind in np.asarray(edges).reshape(-1, 3)]


def _check_similarity(p: int, similarity: ArrayLike, limit: int = ONE) -> NDArray[np.int32]:
    s = as_array(f"pair {p}", similarity)
    if s.ndim != 2 or s.dtype.kind not in "iu":
        raise ValueError(f"pair {p}: expected a matrix of integers, got {s.dtype} {s.shape}")
    bad = np.argwhere((s < 0) | (s > limit))
    if bad.size:
        i, j = bad[0]
        raise ValueError(f"pair {p}: entry [{i}, {j}] = {s[i, j]}: expected 0 to {limit}")
    return np.ascontiguousarray(s, dtype=np.int32)


def _edges(name: str, lists: Sequence[ArrayLike], nodes: Int64) -> list[Any]:
    arrays = []
    for p, edges in enumerate(lists):
        array = as_array(f"{name}[{p}]", edges)
        if array.size == 0:
            array = np.zeros((0, 3), dtype=np.int64)
        if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "iu":
            raise ValueError(
                f"{name}[{p}]: expected integers [E, 3], got {array.dtype} {array.shape}"
            )
        arrays.append(array.astype(np.int64))
    cu = np.concatenate([[0], np.cumsum([len(x) for x in arrays])]).astype(np.int64)
    flat = np.concatenate([np.zeros((0, 3), np.int64), *arrays])
    owner = np.repeat(np.arange(len(arrays)), np.diff(cu))
    if flat.size and (flat.min() < 0 or flat.max() >= 1 << 31 or flat[:, 2].max() > 1):
        raise ValueError(f"{name}: entries must be node numbers >= 0 and a type of 0 or 1")
    source, target = flat[:, 0].astype(np.int32), flat[:, 1].astype(np.int32)
    kind = flat[:, 2].astype(np.uint8)
    check_offsets(name, cu, len(arrays), len(flat))
    check_edges(name, source, target, kind, owner, nodes[owner])
    return [cu, source, target, kind]


def assign(
    weights: Sequence[ArrayLike],  # P matrices [n, m] of integers >= 0, below 2^30
    *,
    backend: Backend = "auto",
    threads: int | None = None,
) -> tuple[Int64, list[NDArray[np.int32]]]:
    """Maximum-weight assignments: (values [P], column of each row or -1, matrix by matrix).

    Rows may stay unassigned; weights of 0 count as unassigned. Raises ValueError naming the matrix
    and the entry for what is not a matrix of integers in that range.
    """
    count = check_threads(threads)
    matrices = [
        _check_similarity(p, w, (1 << 30) - 1) for p, w in enumerate(as_list(weights, "matrices"))
    ]
    native, _ = choose(backend)
    if native is None:
        found = [twin.assign(w.tolist()) for w in matrices]
        values = np.array([value for value, _ in found], dtype=np.int64)
        return values, [np.array(columns, dtype=np.int32) for _, columns in found]
    sizes = np.array([w.shape for w in matrices], dtype=np.int64).reshape(-1, 2)
    cu = np.concatenate([[0], np.cumsum(sizes.prod(1))]).astype(np.int64)
    flat = np.concatenate([np.zeros(0, np.int32), *(w.ravel() for w in matrices)])
    values, rows, assigned = native.assignment(flat, cu, sizes, count)
    return values, np.split(assigned, rows[1:-1]) if matrices else []
