"""One thread against two threads and against two processes, by the clock, in turns.

    python bench/matching/threads.py [--data FOLDER] [--passes 9]

Two processes of one thread each say what the machine can give at that moment; two threads of one
process should come close. A pass takes the three in turn, and counts where the two processes had
two cores (together at least 1.9 times one): up to four times --passes are tried. Kept are the best
times of these and the median of their ratios. Parser and consensus read real rationales
(COMPACT_FAST_DATA or --data), matchings generated pairs. Writes
bench/results/consensus_threads.csv.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from bench_peers import packed
from pairs import make
from records import ROOT, add_data, machine, write

from compact_fast import _native
from compact_fast.graphs import consensus, parse_rationales
from compact_fast.graphs.matching import _edges

FREE = 1.9  # two processes over one, from which both had a core of their own
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


def measure(work: Work, passes: int) -> tuple[list[tuple[float, float, float]], int]:
    """Seconds of one thread, two threads and two processes (both do the whole work, until the later
    one ends), pass by pass where the machine had two cores free; and how many passes that took."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    second = context.Process(target=follow, args=(there, work), daemon=True)
    second.start()

    def both() -> None:
        here.send(True)
        work(1)
        here.recv()

    both()  # warms up
    times: list[tuple[float, float, float]] = []
    tried = 0
    while len(times) < passes and tried < 4 * passes:
        tried += 1
        one, two, processes = (seconds(w) for w in (partial(work, 1), partial(work, 2), both))
        if 2 * one / processes >= FREE:
            times.append((one, two, processes))
    here.send(False)
    second.join()
    return times, tried


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_data(parser)
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
        times, tried = measure(run, arguments.passes)
        if not times:
            raise SystemExit(f"{name}: this machine had no two cores free in {tried} passes")
        one, two, both = (min(column) for column in zip(*times, strict=True))
        line = {
            "work": name,
            "per_second_1": round(count / one),
            "per_second_2": round(count / two),
            "per_second_2_processes": round(2 * count / both),
            "two_threads_over_one": f"{statistics.median(t[0] / t[1] for t in times):.2f}",
            "two_processes_over_one": f"{statistics.median(2 * t[0] / t[2] for t in times):.2f}",
            "passes": len(times),
            "passes_tried": tried,
            "load_average": round(os.getloadavg()[0], 1),
            **machine(),
        }
        lines.append(line)
        print(*line.values(), flush=True)
    write(arguments.out, lines)


if __name__ == "__main__":
    main()
