"""What the benches of graph consensus share: where data lie, how scores rank, how rows are kept."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data FOLDER, where records of real rationales lie; or COMPACT_FAST_DATA."""
    default = os.environ.get("COMPACT_FAST_DATA", ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))


def auc(scores: np.ndarray, right: np.ndarray) -> float:
    """Share of a question's pairs of a right and a wrong rationale that scores [K] rank right,
    ties half. right [K] bool, some of each."""
    # compared, not subtracted: a rationale without a score has -inf
    mine, others = scores[right][:, None], scores[~right][None]
    return float(((mine > others) + 0.5 * (mine == others)).mean())


def machine() -> dict[str, str]:
    """Where and when a row was measured."""
    cpu = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else ()
    ):
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    today = datetime.date.today().isoformat()
    return {"cpu": cpu, "python": platform.python_version(), "date": today}


def version(*packages: str) -> str:
    """Of the first of these distributions that is installed."""
    for name in packages:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal columns as CSV, over what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
