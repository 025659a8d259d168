"""Start-up and throughput over the number of questions in the data file.

    python -m bench.file_size                       # 1,000, 10,000 and 100,000 questions
    python -m bench.file_size --questions 1000      # others

Writes files of the built-in world's word problems with its teachers' rationales (5,000 problems,
repeated under new ids), and measures for each: seconds until the first step can be taken, with
nothing kept and once more with what the first start kept, each in a process of its own; then, in
one process and in turns, optimizer steps of the built-in student through the trainer's own loader:
questions a second, and the share of the time spent waiting for the next batch.
bench/results/file_size.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.measure import in_fresh_process, median, print_table, write_csv

QUESTIONS_A_STEP = 4
DISTINCT = 5_000


def write_file(path: Path, questions: int) -> None:
    """Questions of the built-in world as JSON lines; beyond DISTINCT under new ids again."""
    from compact_fast.arithmetic import make_questions

    made = make_questions(min(questions, DISTINCT), 0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(questions):
            q = made[i % len(made)]
            rationales = [
                {"teacher": r.teacher, "text": r.text, "answer": r.answer, "correct": r.correct}
                for r in q.rationales
            ]
            record = {"id": f"{q.id}-{i}", "question": q.question, "answer": q.answer}
            file.write(json.dumps({**record, "rationales": rationales}) + "\n")


def trainer_of(folder: str, questions: int) -> tuple[Any, dict[str, float]]:
    """A trainer as `compact-fast train` makes it, and the seconds that took."""
    from compact_fast.cli.train import read
    from compact_fast.flat_yaml import Setting
    from compact_fast.pipeline.training import make_trainer
    from compact_fast.run_config import build

    values = {
        "student": "arithmetic",
        "data": str(Path(folder) / f"{questions}.jsonl"),
        "cache_dir": str(Path(folder) / "cache"),
        "output_dir": str(Path(folder) / "run"),
        "holdout": 0.0,
        "lora": False,
        "questions_per_step": QUESTIONS_A_STEP,
        "gradient_accumulation_steps": 1,
        "progress": "none",
    }
    config = build({k: Setting(v, f"--{k}") for k, v in values.items()})
    started = time.perf_counter()
    inputs = read(config, write=True)
    read_at = time.perf_counter()
    trainer = make_trainer(inputs)
    next(iter(trainer.get_train_dataloader()))
    ended = time.perf_counter()
    return trainer, {
        "read": read_at - started,
        "trainer": ended - read_at,
        "start": ended - started,
    }


def start(folder: str, questions: int) -> dict[str, float]:
    """Seconds until the first batch is at hand, libraries' import included."""
    started = time.perf_counter()
    _, parts = trainer_of(folder, questions)
    return {**parts, "start": time.perf_counter() - started}


def throughput(folder: str, sizes: list[int], turns: int, steps: int) -> list[dict[str, Any]]:
    """Optimizer steps on files of each size, in turns."""
    runs = {n: _Run(trainer_of(folder, n)[0]) for n in sizes}
    for turn in range(1 + turns):
        for run in runs.values():
            run.take(steps, counts=turn > 0)  # the first turn warms up
    return [
        {
            "questions": n,
            "questions_a_second": round(median([r for r, _ in run.found]), 2),
            "fastest": round(max(r for r, _ in run.found), 2),
            "slowest": round(min(r for r, _ in run.found), 2),
            "data_wait_share": round(median([w for _, w in run.found]), 4),
            "turns": turns,
            "steps": steps,
        }
        for n, run in runs.items()
    ]


class _Run:
    """Steps of one trainer, taken up again where they were left."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.found = trainer, list[tuple[float, float]]()
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        self.batches = self._endless()

    def _endless(self) -> Iterator[Any]:
        loader = self.trainer.get_train_dataloader()
        while True:
            yield from loader

    def take(self, steps: int, *, counts: bool) -> None:
        trainer, waited, started = self.trainer, 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited += time.perf_counter() - asked
            trainer.training_step(trainer.model, batch, QUESTIONS_A_STEP)
            trainer.optimizer.step()
            trainer.model.zero_grad()
        seconds = time.perf_counter() - started
        if counts:
            self.found.append((steps * QUESTIONS_A_STEP / seconds, waited / seconds))


def main() -> None:
    """Measure and keep the results."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print("\n" + json.dumps(start(**json.loads(sys.argv[1]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--questions", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="in a turn")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        starts = {}
        for n in given.questions:
            write_file(Path(folder) / f"{n}.jsonl", n)
            for which in ("first", "second"):
                found = in_fresh_process("bench.file_size", {"folder": folder, "questions": n})
                starts[n, which] = round(found["start"], 1)
        rows = [
            {
                **row,
                "first_start_seconds": starts[row["questions"], "first"],
                "second_start_seconds": starts[row["questions"], "second"],
            }
            for row in throughput(folder, given.questions, given.turns, given.steps)
        ]
    print_table(rows)
    print(write_csv("file_size", rows))


if __name__ == "__main__":
    main()
