"""Several runs side by side: the same curves overlaid, their final figures in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from compact_fast.atomic import atomic_write_text
from compact_fast.evaluate.results import measures
from compact_fast.report import page, style
from compact_fast.report.before_after import compare_runs
from compact_fast.report.page import Cell
from compact_fast.report.plots import Line, over_time
from compact_fast.report.read import Run, read_run
from compact_fast.report.render import show
from compact_fast.report.single import measure_cell, number_cell
from compact_fast.report.style import Theme
from compact_fast.report.summary import edges


@dataclass(frozen=True)
class Curve:
    """What is overlaid: a logged figure, its heading and unit, and whether its axis holds 0."""

    key: str
    heading: str
    unit: str
    zero: bool = False


CURVES = (
    Curve("loss_sft", "Weighted NLL", "loss (nats a token)"),
    Curve("eval_nll", "Held-out NLL", "NLL (nats a token)"),
    Curve("weight/right", "Weight of right rationales", "mean weight", zero=True),
    Curve("weight/wrong", "Weight of wrong rationales", "mean weight", zero=True),
    Curve("tokens_per_second", "Throughput", "tokens a second", zero=True),
)


def write_comparison(
    run_dirs: Sequence[str | Path], out: str | Path, *, names: Sequence[str] | None = None
) -> Path:
    """Writes OUT/index.html and its PNGs over several runs; returns the page's path.

    `names` labels the runs; default: their folders' names, with the parent's where these are
    equal. Raises ValueError without runs, or if a folder is not a run's.
    """
    if not run_dirs:
        raise ValueError("no runs to compare: give at least one output_dir of a training run")
    runs = [read_run(path) for path in run_dirs]
    labels = list(names) if names is not None else _names(runs)
    if len(labels) != len(runs):
        raise ValueError(f"{len(labels)} names for {len(runs)} runs")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for curve in CURVES:
        draw = partial(_overlay, runs, labels, curve)
        shown.append(
            show(curve.key.replace("/", "_"), curve.heading, "One curve a run.", draw, folder)
        )

    def final(theme: Theme) -> Figure | str:
        found = [measures((run.evaluation or {}).get("after") or {}) for run in runs]
        return compare_runs(list(zip(labels, found, strict=True)), theme)

    shown.append(
        show("after", "After training", "Each run's student after training.", final, folder)
    )
    told = [
        f"{label}: {note}" for label, run in zip(labels, runs, strict=True) for note in run.notes
    ]
    body = [
        page.notes(told),
        page.pictures(shown),
        "<h2>Runs</h2>",
        _table(runs, labels),
        '<p class="muted">Loss and weights: means over the last tenth of the log.</p>',
    ]
    path = folder / "index.html"
    atomic_write_text(path, page.document(f"Comparison of {len(runs)} runs", body))
    return path


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    paths = [run.path.resolve() for run in runs]
    out = [
        f"{path.parent.name}/{name}" if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]
    return [str(p) if out.count(n) > 1 else n for n, p in zip(out, paths, strict=True)]


def _overlay(
    runs: Sequence[Run], labels: Sequence[str], curve: Curve, theme: Theme
) -> Figure | str:
    key = curve.key
    lines = []
    for i, (run, label) in enumerate(zip(runs, style.short_names(labels, noun="run"), strict=True)):
        rows = run.evaluations if key.startswith("eval") else run.train
        steps, values = run.series(key, rows)
        if steps:
            look = style.line_style(theme, i)
            lines.append(Line(label, steps, values, look, points=key.startswith("eval")))
    if not lines:
        return "None of the runs logged it."
    return over_time(curve.heading, [(curve.unit, lines)], theme, zero=curve.zero)


def _table(runs: Sequence[Run], labels: Sequence[str]) -> str:
    after = [
        {m.key: m for m in measures((run.evaluation or {}).get("after") or {})} for run in runs
    ]
    titles = {m.key: m.label for found in after for m in found.values() if "/" not in m.key}
    rows: list[list[Cell | str]] = []
    for run, label, found in zip(runs, labels, after, strict=True):
        row: list[Cell | str] = [Cell(label, words=True)]
        row.append(page.plain(run.config.get("weighting", "unknown")))
        row.append(f"{max((r['step'] for r in run.train), default=0):,}")
        for key in ("loss_sft", "weight/right", "weight/wrong", "tokens_per_second"):
            values = run.series(key)[1]
            row.append(number_cell(f"{label}/{key}", edges(values)[1] if values else None))
        row += [measure_cell(f"{label}/{key}", found.get(key)) for key in titles]
        rows.append(row)
    head = ["run", "weighting", "steps", "weighted NLL", "weight of right", "weight of wrong"]
    return page.table("runs", [*head, "tokens a second", *titles.values()], rows)
