"""Calls leave nothing behind: the process stays as large as it was."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_support import HAS_NATIVE

from compact_fast.graphs import (
    answer_keys,
    assign,
    consensus,
    match,
    match_matrices,
    parse_rationales,
    score_graphs,
)

pytestmark = [
    pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def resident() -> int:
    """Bytes of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


TEXTS = ["2 + 3 = 5\n5 × 4 = 20\n#### 20", "3 + 2 = 5. The answer is 5.", "birds fly"]
GRAPHS = parse_rationales(TEXTS)
ROWS = np.random.default_rng(0).standard_normal((GRAPHS.result.size, 8))
MATRIX, EDGES = np.array([[5, 7], [9, 1]]), [[0, 1, 0]]
CALLS: list[Callable[[], Any]] = [
    lambda: consensus(TEXTS, [0, 3], threads=1),
    lambda: consensus(TEXTS, [0, 3], final_answers=["20", None, "x"], mode="exact", threads=1),
    lambda: parse_rationales(TEXTS, threads=1),
    lambda: match(GRAPHS, [(0, 1), (1, 2)], "fast", threads=1),
    lambda: score_graphs(GRAPHS, [0, 3], embeddings=ROWS, threads=1),
    lambda: match_matrices([MATRIX], [EDGES], [EDGES], "exact", threads=1),
    lambda: assign([MATRIX], threads=1),
    lambda: answer_keys(TEXTS),
    # refused by the core, after it has begun
    lambda: consensus([*TEXTS, "one 1\n" * 600], [0, 4], threads=1),
    lambda: parse_rationales(["one 1\n" * 600], threads=1),
]


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.nightly)])
@pytest.mark.timeout(1800)
def test_calls_leave_nothing_behind(count: int) -> None:
    def run(calls: int) -> None:
        for call in islice(cycle(CALLS), calls):
            with contextlib.suppress(ValueError):
                call()

    run(count // 10)
    gc.collect()
    before = resident()
    run(count)
    gc.collect()
    grown = resident() - before
    # a leak of 16 bytes a call at night, of 200 in every run
    assert grown < max(4 << 20, 16 * count), f"{grown / count:.1f} bytes a call"


def test_threads_leave_nothing_behind() -> None:
    texts, cu = TEXTS * 400, list(range(0, 1201, 3))

    def run(calls: int) -> None:
        for _ in range(calls):
            consensus(texts, cu, threads=4)
            parse_rationales(texts, threads=4)

    run(20)
    before = resident()
    run(200)
    assert resident() - before < 4 << 20
