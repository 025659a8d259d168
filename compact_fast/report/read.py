"""A run directory as it lies on disk, damaged or unfinished as it may be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compact_fast.tables import counted

TEACHER_MEASURES = ("weight", "nll", "mi", "consensus", "filtered", "nonfinite")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run wrote. `notes` say, in words, what was missing, damaged or repaired on reading."""

    path: Path
    info: dict[str, Any]
    train: list[Row]
    evaluations: list[Row]
    agreement: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    teachers: list[str]
    notes: list[str] = field(default_factory=list)
    _series: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> dict[str, Any]:
        value = self.info.get("config")
        return value if isinstance(value, dict) else {}

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def series(
        self, key: str, rows: Sequence[Row] | None = None
    ) -> tuple[list[float], list[float]]:
        """(steps, values) of the finite numbers logged under `key`; default: in training rows."""
        if rows is not None:
            return _series(key, rows)
        if key not in self._series:
            self._series[key] = _series(key, self.train)
        return self._series[key]

    def total(self, key: str) -> float | None:
        """Sum over the run of a logged count; None if it was never logged."""
        values = self.series(key)[1]
        return math.fsum(values) if values else None


def _series(key: str, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    found = [(row["step"], value) for row in rows if (value := number(row.get(key))) is not None]
    return [float(step) for step, _ in found], [value for _, value in found]


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_run(run_dir: str | Path) -> Run:
    """Reads run.json, metrics.jsonl, agreement.json and evaluation.json.

    Raises ValueError if the folder holds neither run.json nor metrics.jsonl.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise ValueError(f"{path}: no such run directory")
    if not (path / "run.json").exists() and not (path / "metrics.jsonl").exists():
        raise ValueError(
            f"{path}: holds neither run.json nor metrics.jsonl; give a training run's output_dir"
        )
    notes: list[str] = []
    info = _read_object(path / "run.json", notes)
    if info is None:
        notes.append("No readable run.json: settings and versions are unknown.")
    rows = _read_metrics(path / "metrics.jsonl", notes)
    train = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if any(key.startswith("eval") for key in row)]
    agreement = _read_object(path / "agreement.json", notes)
    return Run(
        path=path,
        info=info or {},
        train=train,
        evaluations=evaluations,
        agreement=agreement,
        evaluation=_read_object(path / "evaluation.json", notes),
        teachers=_teachers(info or {}, train, agreement or {}),
        notes=notes,
    )


def _read_object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read ({error}) and was left out.")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no JSON object and was left out.")
        return None
    return value


def _read_metrics(path: Path, notes: list[str]) -> list[Row]:
    if not path.exists():
        notes.append("No metrics.jsonl: the run logged nothing.")
        return []
    lines = path.read_bytes().split(b"\n")
    whole = not lines[-1].strip()
    rows: list[Row] = []
    bad: list[int] = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or number(row.get("step")) is None:
            if n == len(lines) and not whole:
                notes.append(
                    f"The last line of metrics.jsonl (line {n}) is half written, as a killed run "
                    "leaves it; it was left out."
                )
            else:
                bad.append(n)
            continue
        rows.append(row)
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        notes.append(
            f"{len(bad)} unreadable line{'s' * (len(bad) > 1)} of metrics.jsonl "
            f"(line {shown}) left out."
        )
    return _without_overwritten(rows, notes)


def _without_overwritten(rows: list[Row], notes: list[str]) -> list[Row]:
    # A run that was resumed logs the steps after its checkpoint again: the later rows count.
    kept: list[Row] = []
    dropped, last = 0, -math.inf
    for row in rows:
        if "loss" in row:
            if row["step"] <= last:
                before = len(kept)
                kept = [r for r in kept if r["step"] < row["step"]]
                dropped += before - len(kept)
            last = row["step"]
        kept.append(row)
    if dropped:
        notes.append(
            f"The run was resumed: {counted(dropped, 'row')} {'was' if dropped == 1 else 'were'} "
            "logged again later, and what is later counts."
        )
    return kept


def _teachers(info: Mapping[str, Any], rows: list[Row], agreement: Mapping[str, Any]) -> list[str]:
    found: dict[str, None] = {}
    for source in (info.get("teachers"), agreement.get("teachers")):
        if isinstance(source, list):
            found.update(dict.fromkeys(map(str, source)))
    for row in rows:
        for key in row:
            if key.startswith("teacher/"):
                name, _, measure = key.removeprefix("teacher/").rpartition("/")
                if name and measure in TEACHER_MEASURES:
                    found[name] = None
    return list(found)
