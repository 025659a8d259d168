"""One student trained under several weightings at one budget, and one table of the outcomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compact_fast.atomic import atomic_write_text
from compact_fast.evaluate import measures
from compact_fast.evaluate.results import format_value
from compact_fast.pipeline.inputs import Inputs, student_of
from compact_fast.pipeline.run_folder import read_json
from compact_fast.report.read import read_run
from compact_fast.run_config import SINGLE, RunConfig
from compact_fast.tables import table

COLUMNS = {
    "exact_match": "greedy",
    "exact_match_sampled": "sampled",
    "options/letter/sum": "options",
    "rationale_nll": "held-out NLL",
}


@dataclass(frozen=True)
class Variant:
    """One of the runs that are compared."""

    label: str
    config: RunConfig


def variants(inputs: Inputs) -> list[Variant]:
    """The run's own weighting first, then those of `compare`; each in a folder of its name."""
    config = inputs.config
    own = config.method.weighting if isinstance(config.method.weighting, str) else "fixed"
    folder = Path(config.run.output_dir)
    out = []
    for label in dict.fromkeys([own, *config.run.compare]):
        changes: dict[str, Any] = {"output_dir": str(folder / label), "compare": []}
        if label == SINGLE:
            changes["weighting"] = _one_hot(inputs)
        elif label != own:
            changes["weighting"] = label
        out.append(Variant(label, config.replace(**changes)))
    return out


def _one_hot(inputs: Inputs) -> list[float]:
    name = best_teacher(inputs.teachers)
    return [float(t == name) for t in inputs.corpus.teachers]


def best_teacher(teachers: Mapping[str, Any]) -> str:
    """The teacher with the largest share of right rationales, the first of equals."""
    known = {name: share for name, share in teachers["share_right"].items() if share is not None}
    if not known:
        raise ValueError(
            "compare: single needs teachers whose rationales are known to be right or wrong; the "
            "data has none"
        )
    return str(max(known, key=lambda name: known[name]))


def inputs_of(inputs: Inputs, variant: Variant) -> Inputs:
    """The same data with a fresh student, for one of the runs."""
    return replace(inputs, config=variant.config, student=student_of(variant.config))


def hand_over_before(source: Path, target: Path) -> None:
    """Let a run start from another's evaluation before training: it is of the same student."""
    record = read_json(source / "evaluation.json")
    if record and "before" in record and not (target / "evaluation.json").exists():
        target.mkdir(parents=True, exist_ok=True)
        kept = {"asked": record.get("asked"), "before": record["before"]}
        atomic_write_text(target / "evaluation.json", json.dumps(kept, indent=1) + "\n")


def comparison_table(folders: Mapping[str, Path]) -> str:
    """One line a run: accuracies with their 95 % interval, NLL, weight on wrong rationales."""
    records = {label: read_json(path / "evaluation.json") or {} for label, path in folders.items()}
    before = next((r["before"] for r in records.values() if r.get("before")), None)
    results = {"before training": before} if before else {}
    results.update({label: r.get("after") for label, r in records.items()})
    lines = {label: {m.key: m for m in measures(r or {})} for label, r in results.items()}
    shown = [key for key in COLUMNS if any(key in found for found in lines.values())]
    rows = []
    for label, found in lines.items():
        row = [label]
        for key in shown:
            m = found.get(key)
            cell = "-" if m is None else format_value(m.kind, m.value)
            if m is not None and m.interval is not None:
                cell += f" ({100 * m.interval[0]:.1f} to {100 * m.interval[1]:.1f})"
            row.append(cell)
        row.append(_weight_on_wrong(folders.get(label)))
        rows.append(row)
    headers = ["weighting", *(COLUMNS[key] for key in shown), "weight of a wrong rationale"]
    text = table(headers, rows)
    if "rationale_nll" in shown:
        text += "\n(held-out NLL is over every teacher's rationales, wrong ones too)"
    return text


def _weight_on_wrong(folder: Path | None) -> str:
    if folder is None:
        return "-"
    values = read_run(folder).series("weight/wrong")[1]
    return f"{sum(values) / len(values):.3f}" if values else "-"
