"""Weightings compared in the built-in world, over seeds: `python -m bench.arithmetic_weightings`.

Every run is what `compact-fast train recipes/arithmetic.yaml` does, with another seed for the
problems, the teachers and the order of the data. Writes one row a run to
bench/results/arithmetic_weightings.csv, and prints the mean over seeds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import platform
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from compact_fast import __version__
from compact_fast.arithmetic.steps import is_affected
from compact_fast.arithmetic.styles import STYLES, style_of
from compact_fast.arithmetic.teachers import SCENARIOS, make_questions
from compact_fast.arithmetic.warm_up import KNOWN_WORDS
from compact_fast.arithmetic.world import make_problems
from compact_fast.cli.main import main as compact_fast
from compact_fast.evaluate import PromptBuilder
from compact_fast.evaluate.generate import exact_match
from compact_fast.report.read import read_run
from compact_fast.students import load_student
from compact_fast.tables import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "arithmetic_weightings.csv"
RECIPE = ROOT / "recipes" / "arithmetic.yaml"
WEIGHTINGS = ("compact", "uniform", "single", "correct", "consensus", "difficulty", "mi", "best")
TEST_SEED = 5_000_011  # no training or evaluation seed of any run
PROBLEMS, KNOWN_PROBLEMS, SAMPLES = 400, 200, 2
COLUMNS = (
    "date",
    "version",
    "torch",
    "machine",
    "threads",
    "scenario",
    "seed",
    "test_seed",
    "weighting",
    "steps",
    "train_seconds",
    "problems",
    "greedy",
    "sampled",
    "greedy_affected",
    "known_words",
    "weight_wrong",
    "filtered",
    *(f"sampled_{style}" for style in STYLES),
)


def measure(student: str, test_seed: int) -> dict[str, float]:
    """Accuracies on held-out problems: all, affected by the fault, in known words, by style."""
    loaded = load_student(student, dtype="fp32")
    prompts = PromptBuilder(loaded.tokenizer)
    problems = make_problems(PROBLEMS, test_seed)
    questions = make_questions(PROBLEMS, test_seed, scenario="clean")
    asked: dict[str, Any] = {"max_new_tokens": 110, "batch_size": 128}
    greedy = exact_match(loaded.model, questions, prompts, **asked)
    drawn = exact_match(
        loaded.model, questions, prompts, temperature=1.0, samples=SAMPLES, seed=1, **asked
    )
    known_questions = make_questions(KNOWN_PROBLEMS, test_seed, KNOWN_WORDS, scenario="clean")
    known = exact_match(loaded.model, known_questions, prompts, **asked)
    affected = [
        answer.right
        for problem, answer in zip(problems, greedy.answers, strict=True)
        if is_affected(problem.steps, "adds_losses")
    ]
    found = {
        "greedy": greedy.share.accuracy,
        "sampled": drawn.share.accuracy,
        "greedy_affected": statistics.fmean(affected),
        "known_words": known.share.accuracy,
    }
    for style in STYLES:
        right = [a.right for a in drawn.answers if style_of(a.text) == style]
        found[f"sampled_{style}"] = statistics.fmean(right) if right else math.nan
    return found


def runs(
    scenario: str, seed: int, weightings: Sequence[str], folder: Path, more: Sequence[str]
) -> Iterator[tuple[str, Path]]:
    """Train under each weighting; the folders that hold the runs."""
    first, *others = weightings
    command = ["train", str(RECIPE), "--output-dir", str(folder), "--weighting", first]
    command += ["--world-scenario", scenario, "--world-seed", str(seed), "--seed", str(seed)]
    command += ["--eval-questions", "0", "--save-steps", "100000", *more]
    if others:
        command += ["--compare", ",".join(others)]
    if (code := compact_fast(command)) != 0:
        raise SystemExit(code)
    for name in weightings:
        yield name, (folder / name if others else folder)


def row_of(
    scenario: str, seed: int, test_seed: int, weighting: str, folder: Path
) -> dict[str, Any]:
    run = read_run(folder)
    steps, times = run.series("time")

    def mean(name: str) -> float:
        values = run.series(name)[1]
        return statistics.fmean(values) if values else math.nan

    figures = measure(str(folder / "model"), test_seed)
    filtered = [mean(f"teacher/{t}/filtered") for t in run.teachers]
    figures |= {"weight_wrong": mean("weight/wrong"), "filtered": statistics.fmean(filtered)}
    return {
        **about(scenario, seed, test_seed, weighting),
        "steps": int(steps[-1]),
        "train_seconds": round(times[-1]),
        **{k: round(v, 4) for k, v in figures.items()},
    }


def about(scenario: str, seed: int, test_seed: int, weighting: str) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "scenario": scenario,
        "seed": seed,
        "test_seed": test_seed,
        "weighting": weighting,
        "problems": PROBLEMS,
    }


def append(row: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def summary(path: Path) -> str:
    """Means over seeds, and the standard deviations of accuracy between them."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = []
    keys = ("scenario", "test_seed", "weighting")
    for key in dict.fromkeys(tuple(r[k] for k in keys) for r in rows):
        these = [r for r in rows if tuple(r[k] for k in keys) == key]
        line = [*key, str(len(these))]
        for name in ("greedy", "sampled", "greedy_affected", "known_words", "weight_wrong"):
            values = [float(r[name]) for r in these if r[name]]
            line.append(f"{statistics.fmean(values):.3f}" if values else "-")
            if name in ("greedy", "sampled"):
                line[-1] += f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        lines.append(line)
    headers = ["scenario", "test problems", "weighting", "seeds", "greedy", "sampled"]
    return table([*headers, "greedy, affected", "known words", "weight on wrong"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenarios", nargs="+", default=["misleading"], choices=SCENARIOS)
    parser.add_argument("--weightings", nargs="+", default=list(WEIGHTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--test-seed", type=int, default=TEST_SEED, help="of the problems")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    options, more = parser.parse_known_args()  # what is left goes to `compact-fast train`
    folder = options.folder or Path(tempfile.mkdtemp())
    test_seed = options.test_seed
    append(
        {**about("untrained", 0, test_seed, "none"), **measure("arithmetic", test_seed)},
        options.output,
    )
    for scenario in options.scenarios:
        for seed in options.seeds:
            where = folder / f"{scenario}-{seed}"
            for weighting, run in runs(scenario, seed, options.weightings, where, more):
                append(row_of(scenario, seed, test_seed, weighting, run), options.output)
    if options.folder is None:
        shutil.rmtree(folder)
    print(summary(options.output))


if __name__ == "__main__":
    main()
