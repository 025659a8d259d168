"""The report of one run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from compact_fast.atomic import atomic_write_text
from compact_fast.evaluate.results import Measure, format_value, measures
from compact_fast.report import page
from compact_fast.report.before_after import before_after
from compact_fast.report.page import Cell
from compact_fast.report.plots import PICTURES, Picture
from compact_fast.report.read import Run, number, read_run
from compact_fast.report.render import show
from compact_fast.report.style import Theme
from compact_fast.report.summary import duration_of, edges, summary

BEFORE_AFTER = Picture(
    "before_after",
    "Before and after",
    "Held-out figures of the student before and after training.",
    before_after,
)

ALL_PICTURES = (PICTURES[0], BEFORE_AFTER, *PICTURES[1:])


def write_report(run_dir: str | Path) -> Path:
    """Writes RUN/report/index.html, one self-contained page, and the pictures as PNG beside it.

    Whatever the run lacks is said in words on the page; damaged files are noted there. Returns
    the page's path. Raises ValueError if the folder is not a run's.
    """
    run = read_run(run_dir)
    folder = run.path / "report"
    folder.mkdir(parents=True, exist_ok=True)
    shown = [show(p.key, p.heading, p.caption, _drawing(p.draw, run), folder) for p in ALL_PICTURES]
    body = [
        page.sentences(summary(run)),
        page.notes(run.notes),
        page.pictures(shown),
        "<h2>Teachers</h2>",
        teacher_table(run),
        "<h2>Evaluation</h2>",
        evaluation_table(run.evaluation),
        "<h2>Configuration</h2>",
        _config_table(run),
        "<h2>Environment</h2>",
        _environment_table(run),
        "<footer>Written by compact-fast report from run.json, metrics.jsonl, agreement.json and "
        "evaluation.json of this run.</footer>",
    ]
    path = folder / "index.html"
    atomic_write_text(path, page.document(f"Run {run.name}", body))
    return path


def _drawing(
    draw: Callable[[Run, Theme], Figure | str], run: Run
) -> Callable[[Theme], Figure | str]:
    return lambda theme: draw(run, theme)


def teacher_table(run: Run) -> str:
    """A row a teacher: start and end of what is logged over time, totals of counts."""
    if not run.teachers:
        return '<p class="absent">No teachers are named in this run\'s files.</p>'
    shares = (run.agreement or {}).get("share_right") or {}
    head = ["teacher", "right answers"]
    for words in ("weight", "NLL (nats)", "MI", "consensus"):
        head += [f"{words}, start", "end"]
    head += ["filtered", "not finite"]
    rows: list[list[Cell | str]] = []
    for i, teacher in enumerate(run.teachers):
        share = number(shares.get(teacher))
        row: list[Cell | str] = [
            Cell(f"{i + 1}. {teacher}", words=True),
            number_cell(f"share_right/{teacher}", share, percent=True, missing="unknown"),
        ]
        for measure in ("weight", "nll", "mi", "consensus"):
            key = f"teacher/{teacher}/{measure}"
            values = run.series(key)[1]
            start, end = edges(values) if values else (None, None)
            row += [number_cell(f"{key}/start", start), number_cell(f"{key}/end", end)]
        filtered = run.series(f"teacher/{teacher}/filtered")[1]
        mean = sum(filtered) / len(filtered) if filtered else None
        row.append(number_cell(f"teacher/{teacher}/filtered", mean, percent=True))
        count = run.total(f"teacher/{teacher}/nonfinite")
        text = "–" if count is None else f"{count:,.0f}"
        row.append(Cell(text, f"teacher/{teacher}/nonfinite", count))
        rows.append(row)
    words = (
        "Start and end: means over the first and last tenth of the log. Filtered: mean share over "
        "the log. A dash: not logged."
    )
    return page.table("teachers", head, rows) + f'<p class="muted">{words}</p>'


def number_cell(
    key: str, value: float | None, *, percent: bool = False, missing: str = "–"
) -> Cell:
    if value is None:
        return Cell(missing)
    shown = f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return Cell(f"{100 * value:.1f} %" if percent else shown, key, value)


def evaluation_table(evaluation: dict[str, Any] | None) -> str:
    """A row a measure, one column an evaluation."""
    stages = [
        (when, {m.key: m for m in measures(found)})
        for when in ("before", "after")
        if isinstance(found := (evaluation or {}).get(when), dict)
    ]
    labels = {m.key: m.label for _, found in stages for m in found.values()}
    if not labels:
        return '<p class="absent">The student was not evaluated before and after training.</p>'
    rows = [
        [
            Cell(label, words=True),
            *(measure_cell(f"{when}/{key}", f.get(key)) for when, f in stages),
        ]
        for key, label in labels.items()
    ]
    return page.table("evaluation", ["measure", *(when for when, _ in stages)], rows)


def measure_cell(key: str, m: Measure | None) -> Cell:
    if m is None or m.value is None:
        return Cell("–")
    text = format_value(m.kind, m.value)
    if m.interval is not None:
        text += f" ({100 * m.interval[0]:.1f} to {100 * m.interval[1]:.1f} %)"
    elif m.standard_error is not None:
        text += f" ± {m.standard_error:.4f}"
    if m.count is not None:
        text += f", {m.count:,} {m.counted}"
    return Cell(text, key, m.value)


def _config_table(run: Run) -> str:
    if not run.config:
        return '<p class="absent">The configuration of this run is unknown.</p>'
    return page.table(
        "config", ["key", "value"], [[k, page.plain(v)] for k, v in run.config.items()]
    )


def _environment_table(run: Run) -> str:
    rows: list[list[Cell | str]] = []
    backend = run.info.get("backend")
    if isinstance(backend, dict):
        rows.append(["loss backend", page.plain(backend.get("name"))])
        rows.append(["why this one", page.plain(backend.get("reason"))])
    for key, words in (
        ("consensus_backend", "consensus backend"),
        ("device", "device"),
        ("started", "started"),
        ("finished", "ended"),
        ("status", "status"),
    ):
        if run.info.get(key) is not None:
            rows.append([words, page.plain(run.info[key])])
    if duration := duration_of(run):
        rows.append(["wall-clock time", duration])
    versions = run.info.get("versions")
    if isinstance(versions, dict):
        rows += [[name, page.plain(version)] for name, version in versions.items()]
    if not rows:
        return '<p class="absent">Versions, device and backend of this run are unknown.</p>'
    return page.table("environment", ["what", "value"], rows)
