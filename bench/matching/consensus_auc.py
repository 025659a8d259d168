"""How well consensus ranks right rationales above wrong ones, on real blind teachers.

    python bench/matching/consensus_auc.py [--data FOLDER] [--out bench/results/consensus_auc.csv]

Questions with right and wrong rationales only; the AUC is the mean over questions of P(right above
wrong), ties ½. Weights were chosen on half "choose" (by hash of the id); the figures of half
"report" were visible while features were tried, so read them as checked, not as blind.
Needs gsm8k_test_openai.jsonl and svamp_train_fair.jsonl (COMPACT_FAST_DATA or --data).
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from records import ROOT, add_data, auc, write

from compact_fast.graphs import GraphOptions, answer_keys, consensus, parse_rationales
from compact_fast.graphs.parsing import unpack

FILES = ("gsm8k_test_openai", "svamp_train_fair")


class Questions:
    """The mixed questions of one file."""

    def __init__(self, path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        right = [[bool(r["correct"]) for r in row["rationales"]] for row in rows]
        mixed = [q for q, marks in enumerate(right) if any(marks) and not all(marks)]
        self.right = [np.array(right[q]) for q in mixed]
        flat = [r for q in mixed for r in rows[q]["rationales"]]
        self.texts = [r["text"] for r in flat]
        self.answers = [r["answer"] for r in flat]
        self.cu = np.cumsum([0] + [len(marks) for marks in self.right])
        self.report = np.array([zlib.crc32(rows[q]["id"].encode()) % 2 == 1 for q in mixed])

    def auc(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per-question AUC of the choosing and of the reporting half."""
        values = []
        for q, right in enumerate(self.right):
            mine = scores[self.cu[q] : self.cu[q + 1]]
            values.append(auc(mine, right))
        all_values = np.array(values)
        return all_values[~self.report], all_values[self.report]

    def mean_over_others(self, pair: Callable[[int, int], float]) -> np.ndarray:
        """Score of each rationale: mean of pair(it, other) over the others of its question."""
        out = []
        for a, b in zip(self.cu[:-1], self.cu[1:], strict=True):
            out += [np.mean([pair(i, j) for j in range(a, b) if j != i]) for i in range(a, b)]
        return np.array(out)


def dice(a: set[Any], b: set[Any]) -> float:
    return 2 * len(a & b) / max(1, len(a) + len(b))


def baselines(q: Questions) -> dict[str, np.ndarray]:
    """What needs no graph."""
    keys, given = answer_keys(q.answers)
    numbers = [
        {x for n in g.nodes for x in [*n.numbers, *([n.result] if n.result_kind else [])]}
        for g in unpack(parse_rationales(q.texts))
    ]
    words = [set(t.lower().split()) for t in q.texts]
    vote = q.mean_over_others(lambda i, j: float(given[i] and given[j] and keys[i] == keys[j]))
    overlap = q.mean_over_others(lambda i, j: dice(numbers[i], numbers[j]))
    return {
        "vote on the final answer": vote,
        "overlap of numbers": overlap,
        "overlap of words": q.mean_over_others(lambda i, j: dice(words[i], words[j])),
        "vote + 0.3 overlap of numbers": vote + 0.3 * overlap,
    }


def variants(q: Questions) -> dict[str, np.ndarray]:
    """The default, and the default with one thing changed."""

    def run(answers: bool = True, centrality: Any = "coverage", **options: Any) -> np.ndarray:
        finals = q.answers if answers else None
        return consensus(
            q.texts,
            q.cu,
            final_answers=finals,
            options=GraphOptions(**options),
            centrality=centrality,
        ).scores

    only = {"result": 0.0, "numbers": 0.0, "operators": 0.0, "text": 0.0}
    return {
        "graph consensus (default)": run(),
        "answers found in the texts": run(answers=False),
        "steps without final answers": run(answer_share=0.0, soundness=0.0),
        "without soundness": run(soundness=0.0),
        "vote + soundness, no steps": run(answer_share=1.0),
        "symmetric agreement": run(centrality="agreement"),
        "cluster": run(centrality="cluster"),
        "without edges": run(edge_weight=0.0),
        "without text": run(text=0.0),
        "results only": run(**{**only, "result": 1.0}),
        "numbers only": run(**{**only, "numbers": 1.0}),
        "text only": run(**{**only, "text": 1.0}),
        "all steps weigh the same": run(step_weights=(1.0, 1.0, 1.0)),
        "without dedupe": run(dedupe=None),
        "answer share 0.5": run(answer_share=0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_data(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/consensus_auc.csv")
    arguments = parser.parse_args()
    lines = []
    for name in FILES:
        q = Questions(arguments.data / f"{name}.jsonl")
        for label, scores in {**baselines(q), **variants(q)}.items():
            halves = q.auc(scores)
            both = np.concatenate(halves)
            line = {
                "file": name,
                "score": label,
                "auc_choose": halves[0].mean(),
                "auc_report": halves[1].mean(),
                "auc_all": both.mean(),
                "standard_error_report": halves[1].std() / len(halves[1]) ** 0.5,
                "questions_choose": len(halves[0]),
                "questions_report": len(halves[1]),
            }
            lines.append({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in line.items()})
            print(f"{name:20} {label:32}", *(f"{line[k]:.3f}" for k in list(line)[2:6]))
    write(arguments.out, lines)


if __name__ == "__main__":
    main()
