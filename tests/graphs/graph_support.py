"""Shared by the graph tests: random pairs of graphs, and the objective in other words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from compact_fast.graphs import match_matrices
from compact_fast.graphs.options import ONE, SHIFT
from compact_fast.native import load_native

HAS_NATIVE = not isinstance(load_native(), str)
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")

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
