"""The core against other ways to the same truth, a few at every run and all of them at night."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from graph_support import (
    HALF,
    HAS_NATIVE,
    Pair,
    call,
    objective,
    pairs_of,
    random_pair,
    relaxed_by_scipy,
)
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import coo_array

from compact_fast.graphs import GraphOptions, assign, consensus, match, parse_rationales
from compact_fast.graphs.options import ONE, SHIFT

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
MODES = ("relaxed", "exact", "fast")


def scaled(few: int, many: int) -> Any:
    """`count` = few in every run, many at night."""
    return pytest.mark.parametrize(
        "count", [few, pytest.param(many, marks=pytest.mark.nightly)], ids=str
    )


# ---- matching ---------------------------------------------------------------------------------


def adjacency(edges: np.ndarray, n: int) -> np.ndarray:
    """[2, n, n]: is there an edge of the type?"""
    out = np.zeros((2, n, n), dtype=bool)
    out[edges[:, 2], edges[:, 0], edges[:, 1]] = True
    return out


def best_of_all(pairs: list[Pair], chunk: int = 500) -> np.ndarray:
    """Brute force over every matching: the best F of each pair, in 1 / (ONE << SHIFT)."""
    best = np.zeros(len(pairs), dtype=np.int64)
    by_size = defaultdict(list)
    for p, (s, _, _) in enumerate(pairs):
        by_size[s.shape].append(p)
    for (n, m), which in by_size.items():
        if not n or not m:
            continue
        turned = n > m  # the smaller side is matched wholly: nothing is negative
        rows, columns = min(n, m), max(n, m)
        options = np.array(list(permutations(range(columns), rows)))  # [O, rows]
        for at in range(0, len(which), chunk):
            part = which[at : at + chunk]
            chosen = [pairs[p] for p in part]
            s = np.stack([x[0].T if turned else x[0] for x in chosen]).astype(np.int64)
            small = np.stack([adjacency(x[2 if turned else 1], rows) for x in chosen])
            large = np.stack([adjacency(x[1 if turned else 2], columns) for x in chosen])
            gain = np.stack([s[:, i, options[:, i]] for i in range(rows)], axis=1)  # [B, rows, O]
            total = gain.sum(1) << SHIFT
            for kind in (0, 1):
                for i in range(rows):
                    for k in range(rows):
                        has = np.flatnonzero(small[:, kind, i, k])
                        if has.size:
                            linked = large[has, kind][:, options[:, i], options[:, k]]
                            both = gain[has, i] * gain[has, k]
                            total[has] += 2 * HALF[kind] * both * linked
            best[part] = total.max(1)
    return best


@scaled(1_500, 100_000)
def test_exact_is_the_best_of_all_matchings(count: int) -> None:
    pairs = pairs_of(np.random.default_rng(count), count, 0, 6)
    best = best_of_all(pairs) >> SHIFT
    relaxed, exact, fast = (call(pairs, mode) for mode in MODES)
    np.testing.assert_array_equal(exact.values, best)
    np.testing.assert_array_equal(exact.bounds, best)
    assert exact.proven.all()
    assert (relaxed.values >= best).all()
    assert (best >= fast.values).all()
    assert (fast.values == best).mean() > 0.95
    for found in (exact, fast):
        for p in range(0, count, 7):
            columns = found.assigned[found.cu_assigned[p] : found.cu_assigned[p + 1]]
            used = columns[columns >= 0]
            assert len(set(used.tolist())) == used.size
            assert objective(pairs[p], columns) >> SHIFT == found.values[p]


@scaled(100, 10_000)
def test_relaxed_is_its_formula_with_scipys_assignment(count: int) -> None:
    pairs = pairs_of(np.random.default_rng(count), count, 1, 12)
    np.testing.assert_array_equal(
        call(pairs, "relaxed").values, [relaxed_by_scipy(p) for p in pairs]
    )


def best_by_integer_program(pair: Pair) -> float:
    """The best F in steps: x_ij in {0, 1}, and y <= both ends for every pair of agreeing edges."""
    s, a, b = pair
    n, m = s.shape
    links = [
        (i * m + j, k * m + c, 2 * HALF[kind] * int(s[i, j]) * int(s[k, c]) / 2**SHIFT)
        for i, k, kind in a.tolist()
        for j, c, other in b.tolist()
        if kind == other and s[i, j] and s[k, c]
    ]
    x = np.arange(n * m)
    y = n * m + np.arange(len(links))
    ends = np.array([link[:2] for link in links], dtype=int).reshape(-1, 2)
    after = n + m + np.arange(2 * len(links))
    rows = np.concatenate([x // m, n + x % m, after, after])
    columns = np.concatenate([x, x, np.repeat(y, 2), ends.ravel()])
    values = np.concatenate([np.ones(2 * n * m + after.size), -np.ones(after.size)])
    shape = (n + m + after.size, n * m + len(links))
    matrix = coo_array((values, (rows, columns)), shape=shape).tocsr()
    limit = np.concatenate([np.ones(n + m), np.zeros(after.size)])
    done = milp(
        -np.concatenate([s.ravel(), [w for _, _, w in links]]),
        constraints=LinearConstraint(matrix, -np.inf, limit),
        integrality=np.concatenate([np.ones(n * m), np.zeros(len(links))]),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert done.success, done.message
    return -float(done.fun)


@scaled(6, 150)
def test_exact_is_the_best_of_an_integer_program(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(count):
        n, m = rng.integers(7, 13, 2).tolist()
        pair = random_pair(rng, n, m, float(rng.choice([0.5, 0.7, 0.9])))
        found = call([pair], "exact", node_budget=10_000_000)
        assert found.proven.all()
        assert abs(found.values[0] - best_by_integer_program(pair)) <= 1.5


@scaled(150, 6_000)
def test_native_equals_rustworkx_in_every_integer(count: int) -> None:
    pairs = pairs_of(np.random.default_rng(count), count, 0, 6)
    for mode in ("relaxed", "exact"):
        native, twin = call(pairs, mode), call(pairs, mode, "rustworkx")
        for field in ("values", "bounds", "proven", "cu_assigned"):
            np.testing.assert_array_equal(getattr(native, field), getattr(twin, field))


@scaled(300, 20_000)
def test_what_must_not_matter_does_not(count: int) -> None:
    """Threads, other pairs in the call, instruction set, which graph is first, numbering."""
    from compact_fast import _native

    rng = np.random.default_rng(count)
    pairs = pairs_of(rng, count, 0, 20)
    cut = int(rng.integers(1, count))
    back, renumbered = [], []
    for s, a, b in pairs:
        back.append((s.T, b, a))
        p, q = rng.permutation(s.shape[0]), rng.permutation(s.shape[1])
        ea, eb = a.copy(), b.copy()
        ea[:, :2], eb[:, :2] = np.argsort(p)[a[:, :2]], np.argsort(q)[b[:, :2]]
        renumbered.append((s[np.ix_(p, q)], rng.permutation(ea), rng.permutation(eb)))
    before = np.full(count, np.iinfo(np.int64).max)
    for mode in MODES:
        budget = 40  # of exact: some pairs end proven, some not
        one = call(pairs, mode, threads=1, node_budget=budget)
        assert (one.values <= before).all()
        assert (one.bounds >= one.values).all()
        before = one.values
        others = [call(pairs, mode, threads=t, node_budget=budget) for t in (2, 3, 64)]
        _native.force_simd_level(0)
        try:
            others.append(call(pairs, mode, threads=1, node_budget=budget))
        finally:
            _native.force_simd_level(-1)
        for other in others:
            for field in ("values", "bounds", "proven", "assigned"):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        halves = [call(part, mode, node_budget=budget) for part in (pairs[:cut], pairs[cut:])]
        for field in ("values", "bounds", "assigned"):
            joined = np.concatenate([getattr(h, field) for h in halves])
            np.testing.assert_array_equal(getattr(one, field), joined)
        turned = call(back, mode, node_budget=budget)
        for field in ("values", "bounds", "proven"):
            np.testing.assert_array_equal(getattr(one, field), getattr(turned, field))
        again = call(renumbered, mode, node_budget=budget)
        certain = (one.proven & again.proven) | (mode == "relaxed")
        certain &= mode != "fast"  # which depends on the order of steps, and says so
        np.testing.assert_array_equal(one.values[certain], again.values[certain])
        assert mode == "fast" or certain.mean() > 0.2


# ---- assignment -------------------------------------------------------------------------------


def any_weights(rng: np.random.Generator, size: int) -> np.ndarray:
    """Up to size x size: long or square, few distinct values, zeros, one row all alike."""
    n, m = rng.integers(1, size + 1, 2)
    if rng.random() < 0.3:
        m = n
    top = int(rng.choice([1, 2, 5, 1000, 1 << 17, (1 << 30) - 1]))
    w = rng.integers(0, top, (n, m), endpoint=True)
    w[rng.random(w.shape) < rng.choice([0, 0.5, 0.95, 1.0], p=[0.55, 0.3, 0.1, 0.05])] = 0
    if rng.random() < 0.1:
        w[:] = w[:1]
    return w


@scaled(300, 10_000)
def test_assignment_equals_scipys(count: int) -> None:
    from compact_fast import _native

    rng = np.random.default_rng(count)
    for at in range(0, count, 500):
        sizes = [12, 64, 65, 200]
        weights = [any_weights(rng, int(rng.choice(sizes))) for _ in range(min(500, count - at))]
        values, assigned = assign(weights, backend="native")
        _native.force_simd_level(0)
        try:
            plain = assign(weights, backend="native", threads=1)
        finally:
            _native.force_simd_level(-1)
        np.testing.assert_array_equal(plain[0], values)
        turned = assign([np.ascontiguousarray(w.T) for w in weights], backend="native")[0]
        np.testing.assert_array_equal(turned, values)
        for p, w in enumerate(weights):
            rows, columns = linear_sum_assignment(w, maximize=True)
            assert values[p] == w[rows, columns].sum()
            used = assigned[p][assigned[p] >= 0]
            assert len(set(used.tolist())) == used.size
            assert values[p] == w[assigned[p] >= 0, used].sum()
            np.testing.assert_array_equal(plain[1][p], assigned[p])


# ---- scores -----------------------------------------------------------------------------------

WORDS = [
    "apples", "boxes", "pens", "red", "blue", "each", "gives", "takes", "total", "left", "cost",
    "price", "hours", "miles",
]  # fmt: skip


def made_up(rng: random.Random) -> str:
    """A rationale of a few steps with numbers, words and an answer, long enough to be a copy."""
    lines = []
    for _ in range(rng.randrange(2, 9)):
        a, b = rng.randrange(1, 9), rng.randrange(1, 9)
        sign = rng.choice("+-*/")
        said = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(5, 9)))
        lines.append(f"{said} {a} {sign} {b} = {rng.choice([a + b, a * b, a - b])}")
    return "\n".join(lines) + (f"\n#### {rng.randrange(4)}" if rng.random() < 0.8 else "")


def questions(rng: random.Random, count: int) -> tuple[list[str], list[int]]:
    texts: list[str] = []
    cu = [0]
    for _ in range(count):
        for _ in range(rng.randrange(0, 8)):
            copied = texts[cu[-1] :]
            texts.append(rng.choice(copied) if copied and rng.random() < 0.2 else made_up(rng))
        cu.append(len(texts))
    return texts, cu


@pytest.mark.parametrize("mode", MODES)
@scaled(60, 3_000)
def test_order_of_teachers_and_questions_and_threads_do_not_matter(count: int, mode: str) -> None:
    rng = random.Random(count)
    texts, cu = questions(rng, count)
    for centrality in ("coverage", "agreement", "cluster"):
        choices: Any = {"mode": mode, "centrality": centrality, "node_budget": 30}
        plain = consensus(texts, cu, threads=1, **choices)
        order, bounds = [], [0]
        for q in rng.sample(range(count), count):
            order += rng.sample(range(cu[q], cu[q + 1]), cu[q + 1] - cu[q])
            bounds.append(len(order))
        other = consensus([texts[s] for s in order], bounds, threads=5, **choices)
        np.testing.assert_array_equal(other.scores, plain.scores[order])
        assert ((plain.scores >= 0) & (plain.scores <= 1)).all()
        for r in plain.agreement:
            np.testing.assert_array_equal(r, r.T)
            assert ((r >= 0) & (r <= 1)).all()


@scaled(40, 2_000)
def test_native_scores_equal_rustworkx(count: int) -> None:
    rng = random.Random(count)
    texts, cu = questions(rng, count)
    centrality: Any = rng.choice(["coverage", "agreement", "cluster"])
    native, twin = (consensus(texts, cu, centrality=centrality, backend=b) for b in (
        "native", "rustworkx"))  # type: ignore[arg-type]  # fmt: skip
    for field in ("scores", "groups", "no_evidence", "undecidable"):
        np.testing.assert_array_equal(getattr(native, field), getattr(twin, field))
    for a, b in zip(native.agreement, twin.agreement, strict=True):
        np.testing.assert_array_equal(a, b)


@scaled(80, 5_000)
def test_clones_change_nothing(count: int) -> None:
    """One to three verbatim copies of a teacher, anywhere: all scores stay, copies have it too."""
    rng = random.Random(count)
    texts, cu = questions(rng, count)
    cloned, owner, bounds = [], [], [0]
    for a, b in pairwise(cu):
        mine = list(range(a, b))
        if mine:
            mine += [rng.choice(mine)] * rng.randrange(1, 4)
            rng.shuffle(mine)
        cloned += [texts[s] for s in mine]
        owner += mine
        bounds.append(len(cloned))
    before, after = consensus(texts, cu), consensus(cloned, bounds)
    np.testing.assert_array_equal(after.scores, before.scores[owner])
    raw = GraphOptions(dedupe=None)
    changed = consensus(cloned, bounds, options=raw).scores
    assert (changed != consensus(texts, cu, options=raw).scores[owner]).any()


@pytest.mark.parametrize("mode", MODES)
@scaled(200, 10_000)
def test_identical_is_one_and_disjoint_is_zero(count: int, mode: str) -> None:
    rng = random.Random(count)
    texts = [made_up(rng) for _ in range(count)]
    other = ["zebra quokka yak\nibex okapi lemur", "tapir dingo\nvole 900001 ~ 900002"]
    graphs = parse_rationales([*texts, *other])
    same = match(graphs, [(g, g) for g in range(count)], mode)  # type: ignore[arg-type]
    assert (same.scores == 1).all()
    apart = match(graphs, [(g, count + g % 2) for g in range(count)], mode)  # type: ignore[arg-type]
    assert (apart.scores == 0).all()
    assert (apart.assigned == -1).all()
    pairs = [(rng.randrange(count), rng.randrange(count)) for _ in range(count)]
    values = [match(graphs, pairs, m).values for m in MODES]  # type: ignore[arg-type]
    assert (values[0] >= values[1]).all()
    assert (values[1] >= values[2]).all()
    assert values[0].max() > ONE
