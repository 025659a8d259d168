"""Assignment and graph matching against other packages, on the same pairs, in one process.

    OMP_NUM_THREADS=1 python bench/matching/bench_peers.py [--count 2000]

Pairs per second of one core's processor time, best of several passes; quality is the objective F
(csrc/matching.h) over the best any method found on the pair. Peers that are not installed are left
out. Batch solvers get their pairs bucketed by shape beforehand, outside the time. Writes
bench/results/assignment_peers.csv and matching_peers.csv.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from pairs import KINDS, ONE, Pair, make
from records import machine, version, write

from compact_fast import __version__, _native
from compact_fast.graphs import match_matrices
from compact_fast.graphs.matching import _edges

ROOT = Path(__file__).parents[2]
HALF = (16, 32)
Matching = list[Any]
# the distribution a method's name begins with
PACKAGES = {"lapx": "lapx", "libmgm": "pylibmgm", "POT": "POT"}


def module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def version_of(method: str) -> str:
    name = method.split()[0]
    return __version__ if name == "compact_fast" else version(PACKAGES.get(name, name))


def seconds(work: Callable[[], object], passes: int) -> float:
    best = float("inf")
    for _ in range(passes):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def objective(pair: Pair, columns: Any) -> float:
    """F in steps, from the definition."""
    s, b = pair.similarity / ONE, {tuple(e) for e in pair.edges_b.tolist()}
    total = sum(s[i, j] for i, j in enumerate(columns) if j >= 0)
    for i, k, kind in pair.edges_a.tolist():
        j, c = columns[i], columns[k]
        if j >= 0 and c >= 0 and (j, c, kind) in b:
            total += HALF[kind] / 128 * s[i, j] * s[k, c]
    return float(total)


# ---- assignment --------------------------------------------------------------------------------


def assignment_methods(pairs: list[Pair]) -> dict[str, Callable[[], object]]:
    flat, cu, sizes = packed(pairs)
    by_shape: dict[tuple[int, ...], list[Any]] = {}
    for p in pairs:
        by_shape.setdefault(p.similarity.shape, []).append(-p.similarity.astype(np.float64))
    stacks = [np.stack(found) for found in by_shape.values()]
    costs = [-p.similarity for p in pairs]
    found: dict[str, Callable[[], object]] = {
        "compact_fast": lambda: _native.assignment(flat, cu, sizes, 1),
        "scipy": lambda: [scipy.optimize.linear_sum_assignment(c) for c in costs],
    }
    for name in ("lapcpp", "laprust"):
        if peer := module(name):
            found[f"{name} (batch)"] = lambda peer=peer: [
                peer.lapjv_batch(x, extend_cost=True, n_threads=1) for x in stacks
            ]
    if lap := module("lap"):
        found["lapx (batch)"] = lambda: [
            lap.lapjvs_batch(x, extend_cost=True, n_threads=1) for x in stacks
        ]
    if rx := module("rustworkx"):

        def by_rustworkx() -> None:
            for p in pairs[: len(pairs) // 10]:
                n, m = p.similarity.shape
                graph = rx.PyGraph()
                graph.add_nodes_from(range(n + m))
                edges = [(i, n + j, int(x)) for (i, j), x in np.ndenumerate(p.similarity) if x]
                graph.add_edges_from(edges)
                rx.max_weight_matching(graph, weight_fn=int)

        found["rustworkx"] = by_rustworkx
    return found


def packed(pairs: list[Pair]) -> tuple[Any, Any, Any]:
    sizes = np.array([p.similarity.shape for p in pairs], dtype=np.int64)
    cu = np.concatenate([[0], np.cumsum(sizes.prod(1))]).astype(np.int64)
    return np.concatenate([p.similarity.ravel() for p in pairs]), cu, sizes


# ---- matching ----------------------------------------------------------------------------------


def by_native(pairs: list[Pair], mode: int, budget: int) -> Callable[[], Any]:
    flat, cu, sizes = packed(pairs)
    a = _edges("a", [p.edges_a for p in pairs], sizes[:, 0])
    b = _edges("b", [p.edges_b for p in pairs], sizes[:, 1])
    half = np.array(HALF, dtype=np.int64)
    return lambda: _native.match_arrays(flat, cu, sizes, a, b, half, mode, budget, 1)


def shared(pair: Pair) -> list[tuple[int, int, int, int, float]]:
    """Agreeing edges (i, j), (k, l) and their worth, over both types of edges."""
    s = pair.similarity / ONE
    worth: dict[tuple[int, int, int, int], float] = {}
    for i, k, kind in pair.edges_a.tolist():
        for j, c, other in pair.edges_b.tolist():
            if kind == other and s[i, j] > 0 and s[k, c] > 0:
                key = (i, j, k, c)
                worth[key] = worth.get(key, 0.0) + HALF[kind] / 128 * s[i, j] * s[k, c]
    return [(*key, value) for key, value in worth.items()]


def by_libmgm(pairs: list[Pair]) -> Callable[[], Matching] | None:
    if not (mgm := module("pylibmgm")):
        return None
    mgm.logging.getLogger("libmgm").setLevel("ERROR")

    def run() -> Matching:
        out = []
        for pair in pairs:
            n, m = pair.similarity.shape
            links = shared(pair)
            model = mgm.GmModel(mgm.Graph(0, n), mgm.Graph(1, m), n * m, len(links))
            for (i, j), x in np.ndenumerate(pair.similarity):
                model.add_assignment(i, j, -x / ONE)
            for i, j, k, c, worth in links:
                model.add_edge(i, j, k, c, -worth)
            labels = mgm.solver.solve_gm(model).labeling()
            out.append([-1 if x is None or not 0 <= x < m else int(x) for x in labels])
        return out

    return run


def by_pygmtools(pairs: list[Pair], name: str) -> Callable[[], Matching] | None:
    if not (gm := module("pygmtools")):
        return None
    gm.set_backend("numpy")

    def run() -> Matching:
        out = []
        for pair in pairs:
            n, m = pair.similarity.shape
            k_matrix = np.diag((pair.similarity / ONE).T.ravel())
            for i, j, k, c, worth in shared(pair):
                k_matrix[j * n + i, c * n + k] += worth / 2
                k_matrix[c * n + k, j * n + i] += worth / 2
            x = getattr(gm, name)(k_matrix, n, m)
            out.append(hard(np.asarray(x)))
        return out

    return run


def hard(x: Any) -> list[int]:
    rows, columns = scipy.optimize.linear_sum_assignment(x, maximize=True)
    out = [-1] * x.shape[0]
    for i, j in zip(rows, columns, strict=True):
        out[i] = int(j)
    return out


def by_gromov(pairs: list[Pair]) -> Callable[[], Matching] | None:
    if not (ot := module("ot")):
        return None

    def run() -> Matching:
        out = []
        for pair in pairs:
            n, m = pair.similarity.shape
            ca, cb = np.zeros((n, n)), np.zeros((m, m))
            for c, edges in ((ca, pair.edges_a), (cb, pair.edges_b)):
                for i, k, kind in edges.tolist():
                    c[i, k] += (0.5, 1.0)[kind]
            cost = 1 - pair.similarity / ONE
            flow = ot.fused_gromov_wasserstein(
                cost, ca, cb, np.full(n, 1 / n), np.full(m, 1 / m), alpha=0.3, symmetric=False
            )
            out.append(hard(flow))
        return out

    return run


def by_smatchpp(pairs: list[Pair]) -> Callable[[], Matching] | None:
    """Its integer program, on the weights of F."""
    if not (solvers := module("smatchpp.solvers")) or not module("mip"):
        return None

    def run() -> Matching:
        out = []
        for pair in pairs:
            n, m = pair.similarity.shape
            nodes = Counter({(i, j): x / ONE for (i, j), x in np.ndenumerate(pair.similarity)})
            edges = Counter({(i, j, k, c): worth for i, j, k, c, worth in shared(pair)})
            found, *_ = solvers.ILP().solve(nodes, edges, max(n, m))
            out.append([-1 if j >= m else int(j) for j in found[:n]])
        return out

    return run


def matching_rows(kind: str, low: int, high: int, count: int) -> list[dict[str, Any]]:
    pairs = make(kind, low, high, count)
    few = max(8, count // (100 if high < 15 else 50))
    fewest = 8 if high < 15 else 2
    budget = 100_000 if high < 15 or kind == "planted" else 0  # 0: no proof, local search only
    methods: dict[str, tuple[Any, int]] = {
        "compact_fast fast": (2, count),
        "compact_fast exact": (1, count // 4 if budget else few),
        "libmgm": (by_libmgm(pairs[:few]), few),
        "pygmtools IPFP": (by_pygmtools(pairs[:few], "ipfp"), few),
        "pygmtools RRWM": (by_pygmtools(pairs[:few], "rrwm"), few),
        "POT fused GW + assignment": (by_gromov(pairs[:few]), few),
        "smatchpp ILP": (by_smatchpp(pairs[:fewest]), fewest),
    }
    rows, values = [], {}
    relaxed = by_native(pairs, 0, 0)
    speeds = {"compact_fast relaxed": count / seconds(relaxed, 3)}
    proven: dict[str, float] = {}
    for name, (method, size) in methods.items():
        if method is None:
            continue
        if isinstance(method, int):
            run = by_native(pairs[:size], method, budget)
            speeds[name] = size / seconds(run, 3 if method == 2 else 1)
            lists = [(p.similarity, p.edges_a, p.edges_b) for p in pairs[:few]]
            result = match_matrices(
                *(list(x) for x in zip(*lists, strict=True)),
                "fast" if method == 2 else "exact",
                node_budget=budget,
            )
            matchings = np.split(result.assigned, result.cu_assigned[1:-1])
            if method == 1:
                proven[name] = float(run()[2].mean())
        else:
            made: list[Matching] = []
            speeds[name] = size / seconds(lambda: made.append(method()), 1)  # noqa: B023
            matchings = made[0]
        values[name] = np.array([objective(p, x) for p, x in zip(pairs, matchings, strict=False)])
    best = np.zeros(few)
    for found in values.values():
        best[: found.size] = np.maximum(best[: found.size], found)
    for name, speed in speeds.items():
        mine = values.get(name)
        quality = float("nan") if mine is None else (mine / best[: mine.size]).mean()
        rows.append(
            {
                "pairs": kind,
                "nodes": f"{low}-{high}",
                "method": name,
                "pairs_per_second": f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}",
                "quality": "bound" if name.endswith("relaxed") else f"{quality:.4f}",
                "proven": f"{proven[name]:.3f}" if name in proven else "",
                "quality_pairs": "" if mine is None else mine.size,
                "version": version_of(name),
                **machine(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    arguments = parser.parse_args()
    rows = []
    for kind, low, high in KINDS:
        pairs = make(kind, low, high, arguments.count)
        for name, work in assignment_methods(pairs).items():
            count = len(pairs) // 10 if name == "rustworkx" else len(pairs)
            speed = count / seconds(work, 1 if name == "rustworkx" else 5)
            rows.append(
                {"pairs": kind, "nodes": f"{low}-{high}", "method": name,
                 "pairs_per_second": f"{speed:.0f}", "version": version_of(name), **machine()}
            )  # fmt: skip
            print(*rows[-1].values())
    write(arguments.out / "assignment_peers.csv", rows)
    rows = []
    for kind, low, high in KINDS:
        for row in matching_rows(kind, low, high, arguments.count):
            rows.append(row)
            print(*row.values())
    write(arguments.out / "matching_peers.csv", rows)


if __name__ == "__main__":
    main()
