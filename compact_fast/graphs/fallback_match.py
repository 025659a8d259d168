"""Similarity, matching and scoring in Python on rustworkx: the twin of csrc/{similarity,matching,
consensus}.cpp, with the same integers. Slower, and `exact` only for small graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import rustworkx as rx

from compact_fast.graphs.fallback_parse import Graph, Node
from compact_fast.graphs.fallback_text import HUGE
from compact_fast.graphs.options import (
    ANSWER_NONE,
    CENTRALITIES,
    ONE,
    RESULT_NONE,
    RESULT_STATED,
    SHIFT,
    UNIT,
)

EXACT_LIMIT = 10  # nodes of the smaller graph
Matrix = list[list[int]]
Edges = Sequence[tuple[int, int, int]]  # source, target, type
RowsPair = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None
OPEN = -2


class Outcome(NamedTuple):
    """As csrc/matching.h MatchOutcome."""

    value: int
    bound: int
    proven: bool
    assigned: list[int]


# ---- similarity ------------------------------------------------------------------------------


def _dice(common: int, total: int) -> int:
    return 2 * common * ONE // total


def _numeric(node: Node) -> bool:
    return node.result_kind != RESULT_NONE or bool(node.numbers)


def importance(node: Node, o: dict[str, int]) -> int:
    """Weight of a step, in 1/256."""
    if node.result_kind == RESULT_STATED:
        return o["step_stated"]
    return o["step_numbers"] if _numeric(node) else o["step_words"]


def _cosine(p: Sequence[int], q: Sequence[int]) -> int:
    if list(p) == list(q):
        return ONE
    dot = sum(a * b for a, b in zip(p, q, strict=True))
    return 0 if dot <= 0 else min(dot * ONE // (127 * 127), ONE)


def node_similarity(
    x: Node,
    y: Node,
    o: dict[str, int],
    rows: tuple[Sequence[int], Sequence[int]] | None = None,
) -> int:
    """Weighted similarity of two steps, in 1/ONE."""
    total = weight = 0
    has_x, has_y = x.result_kind != RESULT_NONE, y.result_kind != RESULT_NONE
    if has_x or has_y:
        total += o["weight_result"] * (ONE if has_x and has_y and x.result == y.result else 0)
        weight += o["weight_result"]
    if count := len(x.numbers) + len(y.numbers):
        common = len(set(x.numbers) & set(y.numbers))
        total += o["weight_numbers"] * _dice(common, count)
        weight += o["weight_numbers"]
    if x.operators | y.operators:
        count = x.operators.bit_count() + y.operators.bit_count()
        common = (x.operators & y.operators).bit_count()
        total += o["weight_operators"] * _dice(common, count)
        weight += o["weight_operators"]
    if count := x.signature.bit_count() + y.signature.bit_count():
        share = o["weight_text"] if _numeric(x) or _numeric(y) else 1024
        total += share * _dice((x.signature & y.signature).bit_count(), count)
        weight += share
    if rows is not None:
        total += o["weight_embedding"] * _cosine(*rows)
        weight += o["weight_embedding"]
    s = total // weight if weight else 0
    low, high = o["ramp_low"], o["ramp_high"]
    s = 0 if s <= low else ONE if s >= high else (s - low) * ONE // (high - low)
    return s * min(importance(x, o), importance(y, o)) // 256


def similarity(a: Graph, b: Graph, o: dict[str, int], rows: RowsPair = None) -> Matrix:
    """[n][m] similarity of all steps of two graphs; `rows` are both graphs' embedding rows."""
    return [
        [
            node_similarity(x, y, o, None if rows is None else (rows[0][i], rows[1][j]))
            for j, y in enumerate(b.nodes)
        ]
        for i, x in enumerate(a.nodes)
    ]


def self_value(a: Graph, o: dict[str, int], mode: str, embedded: bool) -> int:
    """Value of a graph matched with itself, step by step."""
    own = []
    for node in a.nodes:
        has = node.result_kind != RESULT_NONE
        alike = (
            (has and o["weight_result"] > 0)
            or (bool(node.numbers) and o["weight_numbers"] > 0)
            or (bool(node.operators) and o["weight_operators"] > 0)
            or (node.signature > 0 and (not _numeric(node) or o["weight_text"] > 0))
            or (embedded and o["weight_embedding"] > 0)
        )
        own.append(ONE * importance(node, o) // 256 if alike else 0)
    half = (o["edge_next"], o["edge_uses"])
    beside = [0] * len(own)
    for source, target, kind in a.edges:
        beside[source] += half[kind] * own[target]
        beside[target] += half[kind] * own[source]
    if mode == "relaxed":
        return sum(s + -(-s * near >> SHIFT) for s, near in zip(own, beside, strict=True))
    return sum((s << SHIFT) + s * near for s, near in zip(own, beside, strict=True)) >> SHIFT


# ---- matching --------------------------------------------------------------------------------


def assign(weights: Matrix) -> tuple[int, list[int]]:
    """Maximum-weight assignment: (value, column of each row or -1)."""
    n, m = len(weights), len(weights[0]) if weights else 0
    graph: rx.PyGraph[None, int] = rx.PyGraph(multigraph=False)
    graph.add_nodes_from([None] * (n + m))
    graph.add_edges_from(
        [(i, n + j, w) for i, row in enumerate(weights) for j, w in enumerate(row) if w > 0]
    )
    assigned = [-1] * n
    value = 0
    for u, v in rx.max_weight_matching(graph, max_cardinality=False, weight_fn=int):
        i, j = min(u, v), max(u, v) - n
        assigned[i] = j
        value += weights[i][j]
    return value, assigned


@dataclass
class _Problem:
    s: Matrix
    n: int
    m: int
    half: tuple[int, int]
    na: list[list[list[int]]]  # neighbours of each node by list, type * 2 + direction
    nb: list[list[list[int]]]


def _neighbours(edges: Edges, n: int) -> list[list[list[int]]]:
    lists: list[list[list[int]]] = [[[], [], [], []] for _ in range(n)]
    for source, target, kind in edges:
        lists[source][2 * kind].append(target)
        lists[target][2 * kind + 1].append(source)
    return lists


def _bounds(p: _Problem, columns: list[int], taken: set[int]) -> Matrix:
    """Upper bound of each pair's share, in 1/ONE; see csrc/matching.cpp."""
    out = [[0] * p.m for _ in range(p.n)]
    for i in range(p.n):
        if columns[i] != OPEN:
            continue
        for j in range(p.m):
            if not p.s[i][j] or j in taken:
                continue
            total = 0
            for which in range(4):
                a, b = p.na[i][which], p.nb[j][which]
                settled = sum(p.s[k][columns[k]] for k in a if columns[k] in b)
                open_a = [k for k in a if columns[k] == OPEN]
                open_b = [c for c in b if c not in taken]
                left = sum(max((p.s[k][c] for c in open_b), default=0) for k in open_a)
                right = sum(max((p.s[k][c] for k in open_a), default=0) for c in open_b)
                total += p.half[which // 2] * (min(left, right) + 2 * settled)
            out[i][j] = p.s[i][j] + -(-p.s[i][j] * total >> SHIFT)
    return out


def _objective(p: _Problem, columns: list[int]) -> int:
    total = 0
    for i, j in enumerate(columns):
        if j < 0:
            continue
        total += p.s[i][j] << SHIFT
        for kind in (0, 1):
            for k in p.na[i][2 * kind]:
                if columns[k] in p.nb[j][2 * kind]:
                    total += 2 * p.half[kind] * p.s[i][j] * p.s[k][columns[k]]
    return total


def match_matrix(
    s: Matrix, edges_a: Edges, edges_b: Edges, half: tuple[int, int], mode: str, budget: int
) -> Outcome:
    """One pair of graphs from its similarity matrix. Raises ValueError for what it cannot do."""
    n, m = len(s), len(s[0]) if s else 0
    p = _Problem(s, n, m, half, _neighbours(edges_a, n), _neighbours(edges_b, m))
    columns = [OPEN] * n
    ceiling, first = assign(_bounds(p, columns, set()))
    if mode == "relaxed":
        return Outcome(ceiling, ceiling, True, first)
    if mode == "fast":
        raise ValueError("mode='fast' needs the native module; use 'relaxed' or 'exact'")
    if min(n, m) > EXACT_LIMIT:
        raise ValueError(
            f"mode='exact' without the native module stops at {EXACT_LIMIT} steps in the smaller "
            f"graph, here {min(n, m)}; use 'relaxed' or install the native module"
        )
    best, best_columns = _objective(p, first), first
    nodes = budget
    taken: set[int] = set()

    def search(i: int, limit: int) -> None:
        nonlocal best, best_columns, nodes
        if i == n:
            return
        free = [j for j in range(m) if j not in taken and s[i][j]]
        for j in [*sorted(free, key=lambda c: -s[i][c]), -1]:
            if limit <= best >> SHIFT or nodes <= 0:
                return
            nodes -= 1
            columns[i] = j
            taken.add(j)
            rest, guess = assign(_bounds(p, columns, taken))
            full = [g if c == OPEN else c for c, g in zip(columns, guess, strict=True)]
            value = _objective(p, full)
            if value > best:
                best, best_columns = value, full
            bound = min(limit, -(-_objective(p, columns) >> SHIFT) + rest)
            if bound > best >> SHIFT:
                search(i + 1, bound)
            taken.discard(j)
            columns[i] = OPEN

    search(0, ceiling)
    value = best >> SHIFT
    bound = value if nodes > 0 else ceiling
    return Outcome(value, bound, bound == value, best_columns)


# ---- scoring ---------------------------------------------------------------------------------


def compare(
    a: Graph, b: Graph, selves: tuple[int, int], value: int, share: int
) -> tuple[int, int, int]:
    """(agreement, how much a covers of b, b of a) in 1/UNIT, from the value of their matching."""
    parts = [0, 0, 0]
    if min(selves) > 0:
        parts = [
            min(UNIT, 2 * value * UNIT // sum(selves)),
            min(UNIT, value * UNIT // selves[1]),
            min(UNIT, value * UNIT // selves[0]),
        ]
    has_a, has_b = a.answer_kind != ANSWER_NONE, b.answer_kind != ANSWER_NONE
    if share and (has_a or has_b):
        if not (_computes(a) and _computes(b)):
            share = 1024  # likeness of mere words says who writes alike
        same = UNIT if has_a and has_b and a.answer == b.answer else 0
        parts = [((1024 - share) * part + share * same) // 1024 for part in parts]
    return parts[0], parts[1], parts[2]


def _computes(a: Graph) -> bool:
    """Does any step state a result?"""
    return any(node.result_kind == RESULT_STATED for node in a.nodes)


def _same_answer(a: Graph, b: Graph) -> bool:
    """Two texts make one claim only if they come to the same answer, or both to none."""
    has_a, has_b = a.answer_kind != ANSWER_NONE, b.answer_kind != ANSWER_NONE
    return has_a == has_b and (not has_a or a.answer == b.answer)


def soundness(a: Graph) -> int:
    """Does the text derive its answer, and use what it computes? See csrc/consensus.h."""
    has = a.answer_kind != ANSWER_NONE
    used = {key for node in a.nodes for key in node.numbers}
    derived = has and a.answer >= HUGE
    found, loose = False, 0
    for node in a.nodes:
        if node.result_kind == RESULT_NONE:
            continue
        is_answer, stated = has and node.result == a.answer, node.result_kind == RESULT_STATED
        if is_answer and not found:
            found = True
            derived = derived or stated
        if stated and node.operators and not is_answer and node.result not in used:
            loose += 1
    return ((UNIT if derived else 0) + UNIT // (1 + loose)) // 2


def surface_groups(graphs: Sequence[Graph], o: dict[str, int]) -> list[int]:
    """Smallest index of each rationale's group of near-identical texts with one answer."""
    group = list(range(len(graphs)))
    if not o["dedupe"]:
        return group
    sets = [set(g.shingles) for g in graphs]
    for i in range(len(sets)):
        for j in range(i + 1, len(sets)):
            n, m = len(sets[i]), len(sets[j])
            if min(n, m) < o["dedupe_min_shingles"] or not _same_answer(graphs[i], graphs[j]):
                continue
            common = len(sets[i] & sets[j])
            if 1024 * common >= o["dedupe"] * (n + m - common):
                keep, drop = min(group[i], group[j]), max(group[i], group[j])
                group = [keep if g == drop else g for g in group]
    return group


def score_groups(
    r: Matrix, covers: Matrix, sound: list[int], group: list[int], o: dict[str, int]
) -> tuple[list[float], int]:
    """(scores, flags) of one question from its agreement, coverage, soundness and groups."""
    k = len(r)
    leads = sorted(set(group))
    if len(leads) <= 1:
        return [1.0] * k, 1

    def copy(i: int, j: int) -> bool:
        return (
            group[i] == group[j]
            and r[i][j] == UNIT
            and r[i] == r[j]
            and covers[i] == covers[j]
            and all(row[i] == row[j] for row in covers)
            and sound[i] == sound[j]
        )

    counts = [not any(copy(i, j) for j in range(i)) for i in range(k)]
    members = {lead: [j for j in range(k) if group[j] == lead and counts[j]] for lead in leads}

    def mean(matrix: Matrix, i: int, lead: int) -> int:
        return sum(matrix[i][j] for j in members[lead]) // len(members[lead])

    if len(leads) == 2:
        first, other = leads
        total = sum(r[i][j] for i in members[first] for j in members[other])
        return [total // (len(members[first]) * len(members[other])) / UNIT] * k, 2
    share, others = o["soundness"], len(leads) - 1
    scores = []
    for i in range(k):
        total = 0
        for lead in leads:
            if group[i] == lead:
                continue
            agrees = mean(r, i, lead)
            if CENTRALITIES[o["centrality"]] == "cluster" and agrees < o["cluster_at"]:
                continue
            chosen = CENTRALITIES[o["centrality"]] == "agreement"
            total += agrees if chosen else mean(covers, i, lead)
        whole = (1024 - share) * total + share * others * sound[i]
        scores.append(whole / (1024 * others * UNIT))
    return scores, 0
