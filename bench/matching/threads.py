"""One thread against two threads and against two processes, by the clock, in turns.

    python bench/matching/threads.py [--data FOLDER] [--passes 9]

Two processes of one thread each say what the machine can give at that moment; two threads of one
process should come close. Each pass takes the three in turn; kept are the best of all passes, and
the median over passes of the ratios, which other load disturbs least. Parser and consensus read
real rationales (COMPACT_FAST_DATA or --data), matchings generated pairs. Writes
bench/results/consensus_threads.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from bench_peers import packed
from pairs import machine, make

from compact_fast import _native
from compact_fast.graphs import consensus, parse_rationales
from compact_fast.graphs.matching import _edges

ROOT = Path(__file__).parents[2]
Work = Callable[[int], object]  # takes the number of threads


def pairs_work(kind: str, low: int, high: int, mode: int, count: int) -> Work:
    pairs = make(kind, low, high, count)
    flat, cu, sizes = packed(pairs)
    a = _edges("a", [p.edges_a for p in pairs], sizes[:, 0])
    b = _edges("b", [p.edges_b for p in pairs], sizes[:, 1])
    half = np.array((16, 32), dtype=np.int64)
    return lambda n: _native.match_arrays(flat, cu, sizes, a, b, half, mode, 100_000, n)


def follow(connection: Connection, work: Work) -> None:
    """The second process: does the work once at every word."""
    while connection.recv():
        work(1)
        connection.send(True)


def measure(work: Work, passes: int) -> dict[str, list[float]]:
    """Seconds of every pass. "processes": both do the whole work, until the later one ends."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    second = context.Process(target=follow, args=(there, work), daemon=True)
    second.start()
    times: dict[str, list[float]] = {"one": [], "two": [], "processes": []}
    for number in range(passes + 1):  # the first warms up
        for way, mine in times.items():
            start = time.perf_counter()
            if way == "processes":
                here.send(True)
                work(1)
                here.recv()
            else:
                work(1 if way == "one" else 2)
            if number > 0:
                mine.append(time.perf_counter() - start)
    here.send(False)
    second.join()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    default = os.environ.get("COMPACT_FAST_DATA", ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/consensus_threads.csv")
    arguments = parser.parse_args()
    file = arguments.data / "gsm8k_train_eit.jsonl"
    rows = [json.loads(x) for x in file.read_text().splitlines()]
    texts = [r["text"] for row in rows for r in row["rationales"]] * 8
    cu = np.cumsum([0] + [len(row["rationales"]) for row in rows] * 8)
    work: dict[str, tuple[Work, int]] = {
        "parse, real rationales": (lambda n: parse_rationales(texts, threads=n), len(texts)),
        "consensus, real questions": (lambda n: consensus(texts, cu, threads=n), len(cu) - 1),
        "relaxed, 5-12 planted": (pairs_work("planted", 5, 12, 0, 40000), 40000),
        "relaxed, 20-40 planted": (pairs_work("planted", 20, 40, 0, 10000), 10000),
        "exact, 5-12 planted": (pairs_work("planted", 5, 12, 1, 6000), 6000),
        "exact, 20-40 planted": (pairs_work("planted", 20, 40, 1, 1000), 1000),
    }
    lines = []
    for name, (run, count) in work.items():
        times = measure(run, arguments.passes)
        one, two, both = times["one"], times["two"], times["processes"]
        gain = statistics.median(a / b for a, b in zip(one, two, strict=True))
        machine_gain = statistics.median(2 * a / b for a, b in zip(one, both, strict=True))
        line = {
            "work": name,
            "per_second_1": round(count / min(one)),
            "per_second_2": round(count / min(two)),
            "per_second_2_processes": round(2 * count / min(both)),
            "two_threads_over_one": f"{gain:.2f}",
            "two_processes_over_one": f"{machine_gain:.2f}",
            "passes": arguments.passes,
            "load_average": round(os.getloadavg()[0], 1),
            **machine(),
        }
        lines.append(line)
        print(*line.values(), flush=True)
    with arguments.out.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
