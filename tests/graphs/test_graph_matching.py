"""Assignment and matching: odd shapes, budgets, graphs of texts, embeddings, bad arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graph_support import call, needs_native, random_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fast.graphs import GraphOptions, assign, match, match_matrices, parse_rationales
from compact_fast.graphs.options import ONE
from compact_fast.graphs.structure import StepGraphs

# ---- assignment -------------------------------------------------------------------------------


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
