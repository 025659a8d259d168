"""Parser and whole consensus on real texts, one thread: native, the Python twin, and sentencex,
which only splits sentences (left out where it is not installed).

    python bench/matching/bench_parser.py [--data FOLDER]

Rationales and questions per second of processor time, best of five passes (the twin: one pass over
400 rationales). Writes bench/results/consensus_parser.csv.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from records import ROOT, add_data, machine, version, write

from compact_fast import __version__
from compact_fast.graphs import consensus, parse_rationales

try:
    import sentencex
except ImportError:
    sentencex = None

FILES = (
    "gsm8k_test_openai", "gsm8k_train_eit", "svamp_train_fair", "svamp_train_eit",
    "math_train_eit", "strategyqa_train_eit", "obqa_train_eit_tinyllm",
)  # fmt: skip


def seconds(work: Callable[[], object], passes: int) -> float:
    best = float("inf")
    for _ in range(passes):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_data(parser)
    arguments = parser.parse_args()
    lines = []
    for name in FILES:
        rows = [json.loads(x) for x in (arguments.data / f"{name}.jsonl").read_text().splitlines()]
        texts = [r["text"] for row in rows for r in row["rationales"]]
        cu = np.cumsum([0] + [len(row["rationales"]) for row in rows])
        native = seconds(partial(parse_rationales, texts, backend="native", threads=1), 5)
        twin = seconds(partial(parse_rationales, texts[:400], backend="rustworkx"), 1)
        split = ""
        if sentencex is not None:
            segment = sentencex.segment
            spent = seconds(lambda: [list(segment("en", t)) for t in texts], 3)  # noqa: B023
            split = str(round(len(texts) / spent))
        whole = seconds(partial(consensus, texts, cu, backend="native", threads=1), 5)
        lines.append(
            {
                "file": name,
                "mean_characters": round(np.mean([len(t) for t in texts])),
                "rationales_per_second": round(len(texts) / native),
                "rationales_per_second_python": round(400 / twin),
                "sentencex_rationales_per_second": split,
                "questions_per_second": round(len(rows) / whole),
                "version": __version__,
                "sentencex": version("sentencex"),
                **machine(),
            }
        )
        print(*lines[-1].values())
    write(ROOT / "bench/results/consensus_parser.csv", lines)


if __name__ == "__main__":
    main()
