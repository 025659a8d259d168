"""Assignment and matching against brute force, scipy, an integer program, and each other."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from graph_support import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp

from compact_fast.graphs import GraphOptions, assign, match, match_matrices, parse_rationales
from compact_fast.graphs.options import ONE, SHIFT
from compact_fast.graphs.structure import StepGraphs

HALF = (16, 32)  # of the default edge weights, in csrc/similarity.h units
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_edges(rng: np.random.Generator, n: int) -> np.ndarray:
    edges = [(i, i + 1, 0) for i in range(n - 1)] if rng.random() < 0.8 else []
    edges += [(i, j, 1) for j in range(n) for i in range(j) if rng.random() < 0.3]
    return np.array(edges, dtype=np.int64).reshape(-1, 3)


def random_pair(rng: np.random.Generator, n: int, m: int, zeros: float = 0.4) -> Pair:
    s = rng.integers(0, ONE + 1, (n, m))
    s[rng.random((n, m)) < zeros] = 0
    if rng.random() < 0.3:  # heavy ties
        s = s // (ONE // 4) * (ONE // 4)
    return s, random_edges(rng, n), random_edges(rng, m)


def pairs_of(rng: np.random.Generator, count: int, low: int, high: int) -> list[Pair]:
    sizes = rng.integers(low, high + 1, (count, 2))
    return [random_pair(rng, int(n), int(m), rng.choice([0.0, 0.4, 0.8])) for n, m in sizes]


def call(pairs: list[Pair], mode: str, backend: str = "native", **choices: Any) -> Any:
    s, a, b = ([p[i] for p in pairs] for i in range(3))
    return match_matrices(s, a, b, mode, backend=backend, **choices)  # type: ignore[arg-type]


def objective(pair: Pair, columns: np.ndarray) -> int:
    """F in units of 1 / (ONE << SHIFT), written from the definition."""
    s, a, b = pair
    links = {tuple(e) for e in b.tolist()}
    total = sum(int(s[i, j]) << SHIFT for i, j in enumerate(columns) if j >= 0)
    for i, k, kind in a.tolist():
        j, c = columns[i], columns[k]
        if j >= 0 and c >= 0 and (int(j), int(c), kind) in links:
            total += 2 * HALF[kind] * int(s[i, j]) * int(s[k, c])
    return total


def brute_force(pair: Pair) -> int:
    """Best F over all matchings; nothing is negative, so as many rows as possible are matched."""
    s, a, b = pair
    if s.shape[0] > s.shape[1]:
        s, a, b = s.T, b, a
    n, m = s.shape
    if n == 0:
        return 0
    columns = np.array(list(permutations(range(m), n)))
    total = s[np.arange(n), columns].sum(1).astype(np.int64) << SHIFT
    kinds = np.full((m, m), False)[None].repeat(2, 0)
    for j, c, kind in b.tolist():
        kinds[kind, j, c] = True
    for i, k, kind in a.tolist():
        both = s[i, columns[:, i]].astype(np.int64) * s[k, columns[:, k]]
        total += 2 * HALF[kind] * both * kinds[kind, columns[:, i], columns[:, k]]
    return int(total.max())


def relaxed_by_scipy(pair: Pair) -> int:
    """The relaxed value from its formula, with scipy's assignment."""
    s, a, b = pair
    n, m = s.shape
    c = np.zeros((n, m), dtype=np.int64)
    for i in range(n):
        for j in range(m):
            total = 0
            for kind in (0, 1):
                for here, there in ((0, 1), (1, 0)):  # out-edges, then in-edges
                    na = a[(a[:, here] == i) & (a[:, 2] == kind), there]
                    nb = b[(b[:, here] == j) & (b[:, 2] == kind), there]
                    if len(na) and len(nb):
                        block = s[np.ix_(na, nb)]
                        total += HALF[kind] * min(int(block.max(1).sum()), int(block.max(0).sum()))
            c[i, j] = int(s[i, j]) + -(-int(s[i, j]) * total >> SHIFT)
    rows, columns = linear_sum_assignment(c, maximize=True)
    return int(c[rows, columns].sum())


# ---- assignment -------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize(("count", "size"), [(1500, 12), (60, 60), (4, 200)])
def test_assignment_equals_scipy(count: int, size: int) -> None:
    rng = np.random.default_rng(size)
    weights = []
    for _ in range(count):
        w = rng.integers(
            0, rng.choice([2, 5, 1000, 1 << 17, 1 << 29]), rng.integers(1, size + 1, 2)
        )
        w[rng.random(w.shape) < rng.choice([0, 0.5, 1.0], p=[0.6, 0.35, 0.05])] = 0
        weights.append(w)
    values, assigned = assign(weights, backend="native")
    for p, w in enumerate(weights):
        rows, columns = linear_sum_assignment(w, maximize=True)
        assert values[p] == w[rows, columns].sum()
        used = assigned[p][assigned[p] >= 0]
        assert len(set(used.tolist())) == used.size
        assert values[p] == w[assigned[p] >= 0, used].sum()


def test_assignment_of_nothing(backend: str) -> None:
    values, assigned = assign([np.zeros((3, 2), int), np.zeros((0, 0), int)], backend=backend)  # type: ignore[arg-type]
    assert values.tolist() == [0, 0]
    assert assigned[0].tolist() == [-1, -1, -1]


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 7), st.integers(0, 7), st.integers(0, 2**32 - 1), st.sampled_from([2, 9, ONE])
)
def test_assignment_equals_rustworkx(n: int, m: int, seed: int, high: int) -> None:
    w = np.random.default_rng(seed).integers(0, high + 1, (n, m))
    assert assign([w], backend="native")[0] == assign([w], backend="rustworkx")[0]


# ---- matching ---------------------------------------------------------------------------------


@needs_native
def test_exact_is_the_best_and_relaxed_bounds_it() -> None:
    pairs = pairs_of(np.random.default_rng(1), 2500, 0, 6)
    relaxed, exact, fast = (call(pairs, mode) for mode in ("relaxed", "exact", "fast"))
    best = np.array([brute_force(p) >> SHIFT for p in pairs])
    np.testing.assert_array_equal(exact.values, best)
    assert exact.proven.all()
    assert (relaxed.values >= exact.values).all()
    assert (exact.values >= fast.values).all()
    assert (fast.values == best).mean() > 0.95
    for found in (exact, fast):
        for p, pair in enumerate(pairs):
            columns = found.assigned[found.cu_assigned[p] : found.cu_assigned[p + 1]]
            used = columns[columns >= 0]
            assert len(set(used.tolist())) == used.size
            assert objective(pair, columns) >> SHIFT == found.values[p]


@needs_native
def test_relaxed_is_its_formula() -> None:
    pairs = pairs_of(np.random.default_rng(2), 300, 1, 9)
    values = call(pairs, "relaxed").values
    np.testing.assert_array_equal(values, [relaxed_by_scipy(p) for p in pairs])


@needs_native
def test_native_equals_rustworkx() -> None:
    pairs = pairs_of(np.random.default_rng(3), 120, 0, 7)
    for mode in ("relaxed", "exact"):
        native, twin = call(pairs, mode), call(pairs, mode, "rustworkx")
        for field in ("values", "bounds", "proven", "cu_assigned"):
            np.testing.assert_array_equal(getattr(native, field), getattr(twin, field))


@needs_native
def test_exact_equals_an_integer_program() -> None:
    rng = np.random.default_rng(4)
    for n, m in ((8, 8), (9, 7), (10, 10), (12, 12)):
        pair = s, a, b = random_pair(rng, n, m, 0.5)
        links = [
            (i * m + j, k * m + c, 2 * HALF[kind] * int(s[i, j]) * int(s[k, c]) / 2**SHIFT)
            for i, k, kind in a.tolist()
            for j, c, other in b.tolist()
            if kind == other and s[i, j] and s[k, c]
        ]
        size = n * m + len(links)
        gain = np.concatenate([s.ravel(), [w for _, _, w in links]])
        rows = np.zeros((n + m + 2 * len(links), size))
        for i in range(n):
            for j in range(m):
                rows[i, i * m + j] = rows[n + j, i * m + j] = 1
        for e, (x, y, _) in enumerate(links):
            for end, node in enumerate((x, y)):
                rows[n + m + 2 * e + end, [n * m + e, node]] = 1, -1
        limit = np.concatenate([np.ones(n + m), np.zeros(2 * len(links))])
        best = milp(
            -gain,
            constraints=LinearConstraint(rows, -np.inf, limit),
            integrality=np.concatenate([np.ones(n * m), np.zeros(len(links))]),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        found = call([pair], "exact")
        assert found.proven.all()
        assert abs(found.values[0] - -best.fun) <= 1.5


@needs_native
def test_numbering_of_nodes_and_order_of_graphs_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    pairs = pairs_of(rng, 200, 1, 8)
    other = []
    for s, a, b in pairs:
        p, q = rng.permutation(s.shape[0]), rng.permutation(s.shape[1])
        to_p, to_q = np.argsort(p), np.argsort(q)
        shuffled = s[np.ix_(p, q)]
        ea, eb = a.copy(), b.copy()
        ea[:, :2], eb[:, :2] = to_p[a[:, :2]], to_q[b[:, :2]]
        other.append((shuffled.T, rng.permutation(eb), rng.permutation(ea)))
    for mode in ("relaxed", "exact"):
        np.testing.assert_array_equal(call(pairs, mode).values, call(other, mode).values)


@needs_native
def test_threads_batches_and_instructions_do_not_matter() -> None:
    from compact_fast import _native

    pairs = pairs_of(np.random.default_rng(6), 400, 0, 24)
    for mode in ("relaxed", "fast"):
        one = call(pairs, mode, threads=1)
        many = call(pairs, mode, threads=7)
        half = [call(pairs[:137], mode), call(pairs[137:], mode)]
        _native.force_simd_level(0)
        try:
            plain = call(pairs, mode, threads=1)
        finally:
            _native.force_simd_level(-1)
        for other in (many, plain):
            np.testing.assert_array_equal(one.values, other.values)
            np.testing.assert_array_equal(one.assigned, other.assigned)
        np.testing.assert_array_equal(one.values, np.concatenate([h.values for h in half]))


@needs_native
def test_node_budget_gives_bounds() -> None:
    rng = np.random.default_rng(7)
    pairs = [random_pair(rng, 25, 25, 0.0) for _ in range(3)]
    found = call(pairs, "exact", node_budget=50)
    assert not found.proven.any()
    assert (found.bounds > found.values).all()
    assert (found.bounds <= call(pairs, "relaxed").values).all()
    assert (found.values >= call(pairs, "fast").values).all()


def test_what_rustworkx_cannot_do_it_says() -> None:
    pair = random_pair(np.random.default_rng(8), 11, 12)
    with pytest.raises(ValueError, match="stops at 10 steps in the smaller graph, here 11"):
        call([pair], "exact", "rustworkx")
    with pytest.raises(ValueError, match="mode='fast' needs the native module"):
        call([pair], "fast", "rustworkx")


BAD_PAIRS = [
    (np.array([[0.5]]), [], [], "pair 0: expected a matrix of integers, got float64"),
    (np.array([1]), [], [], "pair 0: expected a matrix of integers"),
    (np.array([[-1]]), [], [], r"entry \[0, 0\] = -1: expected 0 to 32768"),
    (np.array([[ONE + 1]]), [], [], r"entry \[0, 0\] = 32769"),
    (np.array([[np.nan]]), [], [], "expected a matrix of integers"),
    (np.ones((2, 2), int), [[0, 2, 0]], [], "graph 0 has 2 nodes"),
    (np.ones((2, 2), int), [], [[0, 1, 2]], "a type of 0 or 1"),
    (np.ones((2, 2), int), [[1, 1, 0]], [], "to itself"),
    (np.ones((2, 2), int), [[0, 1, 0], [0, 1, 0]], [], "repeats an earlier one"),
    (np.ones((2, 2), int), [[0, 1]], [], r"expected integers \[E, 3\]"),
    (np.ones((2, 2), int), [[-1, 1, 0]], [], "node numbers >= 0"),
]


@pytest.mark.parametrize(("s", "a", "b", "message"), BAD_PAIRS)
def test_bad_matrices(s: Any, a: Any, b: Any, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_matrices([s], [a], [b], backend=backend)  # type: ignore[arg-type]


def test_non_contiguous_arrays(backend: str) -> None:
    s, a, b = random_pair(np.random.default_rng(9), 6, 6)
    strided = [np.asfortranarray(s), a[:, ::-1].copy()[:, ::-1], b.astype(np.uint16)]
    plain = match_matrices([s], [a], [b], backend=backend)  # type: ignore[arg-type]
    other = match_matrices([strided[0]], [strided[1]], [strided[2]], backend=backend)  # type: ignore[arg-type]
    assert plain.values == other.values


# ---- graphs -----------------------------------------------------------------------------------


def three(backend: str) -> StepGraphs:
    return parse_rationales(
        [
            "2 + 3 = 5\n5 * 4 = 20\n20 - 6 = 14",
            "2 + 3 = 5\n5 * 4 = 20\n20 - 6 = 14",
            "birds have wings\nwings make things fly",
            "",
        ],
        backend=backend,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("mode", ["relaxed", "exact", "fast"])
def test_identical_disjoint_empty(mode: str, backend: str) -> None:
    if (mode, backend) == ("fast", "rustworkx"):
        pytest.skip("native only")
    pairs = [(0, 1), (1, 0), (0, 0), (0, 2), (2, 2), (0, 3), (3, 3)]
    found = match(three(backend), pairs, mode, backend=backend)  # type: ignore[arg-type]
    assert found.scores.tolist() == [1, 1, 1, 0, 1, 0, 0]
    assert found.assigned[:3].tolist() == [0, 1, 2]


@needs_native
@pytest.mark.parametrize("name", ["gsm8k_test_openai", "strategyqa_train_eit"])
def test_real_graphs(name: str, real) -> None:
    _, texts, cu, _ = real(name)
    graphs = parse_rationales(texts[: cu[60]])
    pairs = [
        (a, b) for q in range(60) for a in range(cu[q], cu[q + 1]) for b in range(a, cu[q + 1])
    ]
    relaxed, exact, fast = (match(graphs, pairs, m) for m in ("relaxed", "exact", "fast"))  # type: ignore[arg-type]
    back = match(graphs, [(b, a) for a, b in pairs])
    np.testing.assert_array_equal(relaxed.values, back.values)
    assert (relaxed.values >= exact.values).all()
    assert (exact.values >= fast.values).all()
    empty = np.diff(graphs.cu_nodes) == 0
    same = [a == b and not empty[a] for a, b in pairs]
    for found in (relaxed, exact, fast):
        assert ((found.scores >= 0) & (found.scores <= 1)).all()
        assert (found.scores[same] == 1).all()
    twin = match(graphs, pairs[:80], backend="rustworkx")
    np.testing.assert_array_equal(twin.values, relaxed.values[:80])
    np.testing.assert_array_equal(twin.scores, relaxed.scores[:80])


def test_embeddings_join_the_similarity(backend: str) -> None:
    graphs = three(backend)
    rng = np.random.default_rng(10)
    rows = rng.standard_normal((graphs.result.size, 32)).astype(np.float32)
    plain = match(graphs, [(0, 1), (0, 2)], backend=backend)  # type: ignore[arg-type]
    assert plain.scores.tolist() == [1, 0]
    mixed = match(graphs, [(0, 1), (0, 2)], embeddings=rows, backend=backend)  # type: ignore[arg-type]
    assert mixed.scores[0] < 1
    rows[3:6] = rows[:3]
    rows[6:8] = rows[:2]
    options = GraphOptions(embedding=10.0)
    alike = match(graphs, [(0, 1), (0, 2)], embeddings=rows, options=options, backend=backend)  # type: ignore[arg-type]
    assert alike.scores[0] == 1
    assert alike.scores[1] > 0


@needs_native
def test_embeddings_are_the_same_integers_everywhere() -> None:
    graphs = three("native")
    rows = np.random.default_rng(11).standard_normal((graphs.result.size, 16))
    pairs = [(a, b) for a in range(4) for b in range(4)]
    native, twin = (
        match(graphs, pairs, embeddings=rows, backend=b) for b in ("native", "rustworkx")
    )  # type: ignore[arg-type]
    np.testing.assert_array_equal(native.values, twin.values)
    np.testing.assert_array_equal(native.scores, twin.scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": [(0, 4)]}, r"pairs\[0, 1\] = 4: there are 4 graphs"),
        ({"pairs": [(-1, 0)]}, r"pairs\[0, 0\] = -1"),
        ({"pairs": [(0.0, 1.0)]}, "expected integers"),
        ({"pairs": [0, 1]}, r"expected integers \[P, 2\]"),
        ({"mode": "best"}, "mode='best': expected one of relaxed, exact, fast"),
        ({"node_budget": -1}, "node_budget=-1"),
        ({"backend": "cuda"}, "backend='cuda': expected auto, native or rustworkx"),
        ({"threads": 0}, "threads=0"),
        ({"embeddings": np.zeros((3, 4))}, "one row a step"),
        ({"embeddings": np.zeros((8, 4), int)}, "expected floats"),
        ({"embeddings": np.full((8, 4), np.inf)}, r"embeddings\[0, 0\] = inf: must be finite"),
    ],
)
@needs_native
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(three("native"), **{"pairs": [(0, 1)], "backend": "native", **arguments})
