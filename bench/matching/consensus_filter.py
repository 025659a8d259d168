"""What the default filter (scores below 0.8 of the question's largest) removes, on real rationales.

    python bench/matching/consensus_filter.py [--data FOLDER]

Writes bench/results/consensus_filter.csv: share of right rationales before and after, and the share
of right and of wrong ones that is removed.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from records import ROOT, add_data, write

from compact_fast.graphs import consensus

BELOW = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_data(parser)
    lines = []
    for path in sorted(parser.parse_args().data.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if row.get("rationales")]
        if not rows:
            continue
        flat = [r for row in rows for r in row["rationales"]]
        sizes = [len(row["rationales"]) for row in rows]
        cu = np.concatenate([[0], np.cumsum(sizes)])
        right = np.array([bool(r["correct"]) for r in flat])
        found = consensus([r["text"] for r in flat], cu, final_answers=[r["answer"] for r in flat])
        largest = np.repeat(np.maximum.reduceat(found.scores, cu[:-1]), sizes)
        removed = found.scores < BELOW * largest
        shares = {
            "right_before": right.mean(),
            "right_after": right[~removed].mean(),
            "removed_of_right": removed[right].mean(),
            "removed_of_wrong": removed[~right].mean(),
        }
        head = {"file": path.stem, "questions": len(rows), "rationales": len(flat)}
        lines.append({**head, **{k: f"{v:.3f}" for k, v in shares.items()}})
        print(*lines[-1].values())
    write(ROOT / "bench/results/consensus_filter.csv", lines)


if __name__ == "__main__":
    main()
