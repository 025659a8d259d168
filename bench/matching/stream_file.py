"""End to end: a generated JSONL file of many questions through consensus into parquet.

    python bench/matching/stream_file.py [--questions 1000000] [--teachers 5] [--folder /tmp]

The input is made first, if it is not there, and left there; --write-only stops then, so that it
can be scored on a quiet machine later. --command measures `compact-fast consensus` in place of
score_file. Appends one line to bench/results/consensus_stream.csv: seconds, questions/s, peak
memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from records import machine

from compact_fast import __version__
from compact_fast.graphs.stream import score_file

ROOT = Path(__file__).parents[2]
THINGS = [
    "pens",
    "apples",
    "books",
    "coins",
    "cards",
    "shells",
    "stamps",
    "marbles",
    "boxes",
    "tickets",
]
NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas"]


def write(path: Path, questions: int, teachers: int) -> None:
    """A file of word problems, each solved by `teachers` in their own words."""
    rng = random.Random(0)
    with path.open("w") as file:
        for q in range(questions):
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            a, b, c, d = (rng.randint(2, 60) for _ in range(4))
            rationales = []
            for k in range(teachers):
                slip = rng.choice((0, 0, 0, 1, -1, 10))
                first = a * b + slip
                second, last = first + c, first + c - d
                text = (
                    f"{name} buys {a} boxes of {b} {thing} each, so {a} * {b} = {first} {thing}.\n"
                    f"Then a friend adds {c} more: {first} + {c} = {second} {thing}.\n"
                    f"After giving {d} away there are {second} - {d} = {last} {thing} left.\n"
                    f"The answer is {last}."
                    if k % 2
                    else f"First {a} * {b} = {first}, because every box holds {b} {thing}.\n"
                    f"Now {first} + {c} = {second} and {second} - {d} = {last}.\n"
                    f"So {name} has {last} {thing}.\n#### {last}"
                )
                rationales.append({"teacher": f"teacher-{k}", "text": text, "answer": str(last)})
            row: dict[str, Any] = {"id": f"q{q}", "question": "", "answer": str(a * b + c - d)}
            row["rationales"] = rationales
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--teachers", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--command", action="store_true", help="by the command, from its start")
    parser.add_argument("--write-only", action="store_true", help="make the input, score nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/consensus_stream.csv")
    arguments = parser.parse_args()
    name = f"consensus_stream_{arguments.questions}x{arguments.teachers}.jsonl"
    source = arguments.folder / name
    if not source.exists():
        part = source.with_suffix(".part")
        write(part, arguments.questions, arguments.teachers)
        part.rename(source)
    size = source.stat().st_size
    if arguments.write_only:
        return
    output = arguments.folder / "consensus_stream.parquet"
    start = time.perf_counter()
    if arguments.command:
        command = [
            sys.executable,
            "-m",
            "compact_fast",
            "consensus",
            str(source),
            "-o",
            str(output),
        ]
        subprocess.run(command, check=True)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    else:
        score_file(source, output)
        usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = time.perf_counter() - start
    done = pq.ParquetFile(output).metadata.num_rows
    line = {
        "way": "compact-fast consensus" if arguments.command else "score_file",
        "questions": done,
        "teachers": arguments.teachers,
        "input_bytes": size,
        "cores": os.cpu_count(),
        "seconds": round(spent, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "questions_per_second": round(done / spent),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "load_average": round(os.getloadavg()[0], 1),
        "version": __version__,
        **machine(),
    }
    print(line)
    new = not arguments.out.exists()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(line))
        if new:
            writer.writeheader()
        writer.writerow(line)


if __name__ == "__main__":
    main()
