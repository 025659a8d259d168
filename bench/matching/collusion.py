"""Consensus when 1 to 3 of 4 to 7 teachers push the same wrong rationale.

    python bench/matching/collusion.py [--data FOLDER] [--out bench/results/consensus_collusion.csv]

Honest rationales are real: several teachers' solutions of gsm8k_train_eit, and plain rewordings of
them to reach four. The lie is a real wrong rationale of another question, given by every colluder
verbatim, with a word in twelve changed, or in another order of sentences and other words
("paraphrase"). AUC: right above wrong, mean over questions, ties 1/2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from records import ROOT, add_data, auc, write

from compact_fast.graphs import GraphOptions, consensus

SWAPS = {
    "so": "hence", "then": "next", "has": "owns", "is": "equals", "total": "sum", "each": "every",
    "and": "also", "she": "the girl", "he": "the boy", "they": "these people", "makes": "earns",
    "for": "per", "a": "one", "the": "that", "in": "inside", "of": "out of", "more": "further",
}  # fmt: skip


def verbatim(text: str, rng: random.Random) -> str:
    return text


def near(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    for _ in range(max(1, len(words) // 12)):
        words.insert(rng.randrange(len(words)), rng.choice(["indeed", "clearly", "now"]))
    return " ".join(words)


def paraphrase(text: str, rng: random.Random) -> str:
    words = re.sub(r"\w+", lambda m: SWAPS.get(m.group().lower(), m.group()), text)
    return "Let us reason about it. " + words.replace("\n", ". After that, ")


def reworded(text: str) -> str:
    """One more honest voice: the same steps in other words."""
    return paraphrase(text, random.Random(0)).replace("Let us reason about it", "My own way")


SCORES: dict[str, dict[str, Any]] = {
    "default": {},
    "default, answers hidden": {"options": GraphOptions(answer_share=0.0)},
    "raw degree (no dedupe, symmetric)": {
        "options": GraphOptions(dedupe=None, soundness=0.0),
        "centrality": "agreement",
    },
    "cluster": {"centrality": "cluster"},
}


def mean_auc(values: np.ndarray, right: np.ndarray, bounds: list[int]) -> float:
    found = []
    for a, b in itertools.pairwise(bounds):
        mine, good = values[a:b], right[a:b]
        found.append(auc(mine, good))
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    add_data(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/consensus_collusion.csv")
    arguments = parser.parse_args()

    def rows(name: str) -> list[dict[str, Any]]:
        text = (arguments.data / f"{name}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    blind = [r for row in rows("gsm8k_test_openai") for r in row["rationales"]]
    lies = [r["text"] for r in blind if len(r["text"].split()) > 25]
    honest = rows("gsm8k_train_eit")[:500]
    changes: dict[str, Callable[[str, random.Random], str]] = {
        "verbatim": verbatim, "near-verbatim": near, "paraphrase": paraphrase,
    }  # fmt: skip
    lines = []
    for how, change in changes.items():
        for colluders in (1, 2, 3):
            for voices in (3, 4):
                rng = random.Random(colluders)
                texts: list[str] = []
                right: list[bool] = []
                bounds = [0]
                for row in honest:
                    own = [r["text"] for r in row["rationales"]]
                    own = [*own, reworded(own[0])][:voices]
                    lie = rng.choice(lies)
                    copies = [lie, *(change(lie, rng) for _ in range(colluders - 1))]
                    texts += own + copies
                    right += [True] * len(own) + [False] * colluders
                    bounds.append(len(texts))
                for label, choices in SCORES.items():
                    found = consensus(texts, bounds, **choices).scores
                    lines.append(
                        {
                            "copies": how,
                            "colluders": colluders,
                            "teachers": voices + colluders,
                            "honest_majority": voices > colluders,
                            "score": label,
                            "auc": f"{mean_auc(found, np.array(right), bounds):.3f}",
                        }
                    )
                    print(*lines[-1].values())
    write(arguments.out, lines)


if __name__ == "__main__":
    main()
