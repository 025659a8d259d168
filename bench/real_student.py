"""Keep the figures of a training run as data: python -m bench.real_student RUN_DIR

Writes bench/results/real_student.csv (one row a log event, the report's plots are drawn from it)
and bench/results/real_student.json (what ran, where, and the held-out NLL before and after).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Figures of one machine's paths are of no use to others.
_LOCAL = ("data", "output_dir", "cache_dir", "eval_data", "forget_text", "resume")


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def collect(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and summary of a finished run; ValueError if it did not finish."""
    run = json.loads((folder / "run.json").read_text())
    if run["status"] != "finished":
        raise ValueError(f"{folder}: the run is {run['status']!r}, not finished")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    training = [row for row in rows if "loss" in row]
    config = {k: v for k, v in run["config"].items() if k not in _LOCAL}
    summary = {
        "date": run["finished"],
        "processor": processor(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        **{k: run[k] for k in ("versions", "backend", "consensus_backend", "device", "teachers")},
        "config": config,
        "steps": training[-1]["step"],
        "training_seconds": training[-1]["time"],
        "tokens_per_second_median": sorted(r["tokens_per_second"] for r in training)[
            len(training) // 2
        ],
        "before": evaluation["before"],
        "after": evaluation["after"],
    }
    return rows, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--note", help="what a reader must know, e.g. that the machine was shared")
    arguments = parser.parse_args()
    rows, summary = collect(arguments.run)
    if arguments.note:
        summary["note"] = arguments.note
    names = list(dict.fromkeys(name for row in rows for name in row))
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "real_student.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    text = json.dumps(summary, indent=1) + "\n"
    (RESULTS / "real_student.json").write_text(text)
    for when in ("before", "after"):
        found = summary[when]["rationale_nll"]
        teachers = {name: round(t["nll"], 4) for name, t in found["teachers"].items()}
        print(when, round(found["nll"], 4), teachers)


if __name__ == "__main__":
    main()
