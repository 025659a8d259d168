"""Random pairs of step graphs: "planted" (the second a noisy copy of the first), or "random"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ONE = 1 << 15


@dataclass
class Pair:
    """Similarity in 1/32768 and the edges (source, target, type) of both graphs."""

    similarity: NDArray[np.int32]  # [n, m]
    edges_a: NDArray[np.int64]  # [E, 3]
    edges_b: NDArray[np.int64]


def _edges(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    """Steps in order, each using the results of one or two earlier ones."""
    edges = [(i, i + 1, 0) for i in range(n - 1)]
    for i in range(1, n):
        for j in rng.choice(i, size=min(i, int(rng.integers(1, 3))), replace=False):
            edges.append((int(j), i, 1))
    return np.array(edges, dtype=np.int64).reshape(-1, 3)


def make(kind: str, low: int, high: int, count: int, seed: int = 0) -> list[Pair]:
    """`count` pairs of graphs of `low` to `high` nodes."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        n = int(rng.integers(low, high + 1))
        m = int(np.clip(n + rng.integers(-2, 3), low, high))
        s = rng.random((n, m)) ** 2 * (0.5 if kind == "planted" else 1.0)
        a = _edges(rng, n)
        if kind == "planted":
            place = rng.permutation(max(n, m))
            for i in range(n):
                if place[i] < m and rng.random() < 0.85:
                    s[i, place[i]] = 0.6 + 0.4 * rng.random()
            kept = [
                (place[i], place[k], kind_of)
                for i, k, kind_of in a.tolist()
                if place[i] < m and place[k] < m and rng.random() < 0.85
            ]
            b = np.unique(np.array(kept, dtype=np.int64).reshape(-1, 3), axis=0)
        else:
            b = _edges(rng, m)
        pairs.append(Pair(np.round(s * ONE).astype(np.int32), a, b))
    return pairs


KINDS = [("planted", 5, 12), ("random", 5, 12), ("planted", 20, 40), ("random", 20, 40)]
