"""Pictures of evaluations: a row a measure before and after training, or a row a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from compact_fast.evaluate.results import Measure, measures
from compact_fast.glyphs import drawable
from compact_fast.report import style
from compact_fast.report.read import Run
from compact_fast.report.style import HEAD, WIDTH, Theme

UNITS = (("share", "right answers (%)"), ("nats", "NLL (nats a token)"), ("bits", "bits"))
BARS = "bars: 95 % interval of shares, ±1 s.e. of NLL"
ROW = 0.5  # inches
GAP = 0.62  # inches between groups


@dataclass(frozen=True)
class _Row:
    """A name and one or two marks on one axis: hollow and full, or full alone."""

    label: str
    marks: list[Measure | None]
    color: str


@dataclass(frozen=True)
class _Group:
    """Rows that share an axis."""

    unit: str
    kind: str
    rows: list[_Row]


def before_after(run: Run, theme: Theme) -> Figure | str:
    """What training changed: a hollow mark before, a full one after."""
    found = run.evaluation
    if not found:
        return "The student was not evaluated before and after training."
    names = [n for n in ("before", "after") if isinstance(found.get(n), Mapping)]
    if not names:
        return "evaluation.json holds neither “before” nor “after”."
    stages = [{m.key: m for m in measures(found[n])} for n in names]
    labels = {m.key: m for stage in stages for m in stage.values() if m.value is not None}
    groups = []
    for kind, unit in UNITS:
        rows = [
            _Row(_label(run, m), [stage.get(key) for stage in stages], theme.series[0])
            for key, m in labels.items()
            if m.kind == kind
        ]
        if rows:
            groups.append(_Group(unit, kind, rows))
    if len(names) == 2:
        return _dots(
            "Before and after training", f"hollow: before; full: after; {BARS}", groups, theme
        )
    return _dots(f"Evaluation {names[0]} training", BARS, groups, theme)


def _label(run: Run, m: Measure) -> str:
    prefix, _, teacher = m.key.partition("/")
    if prefix != "rationale_nll" or teacher not in run.teachers:
        return m.label
    return f"rationale NLL, {drawable(teacher, run.teachers.index(teacher))}"


def compare_runs(stages: Sequence[tuple[str, Sequence[Measure]]], theme: Theme) -> Figure | str:
    """One group a measure, one row a run, in the colours of the runs' curves."""
    units = {"share": "%", "nats": "nats a token", "bits": "bits"}
    titles = {m.key: m for _, found in stages for m in found if m.kind in units}
    groups = []
    for key, title in titles.items():
        if key.startswith("rationale_nll/"):
            continue  # teachers one by one are for the runs' own reports
        rows = []
        for i, (name, found) in enumerate(stages):
            mark = next((m for m in found if m.key == key and m.value is not None), None)
            if mark is not None:
                rows.append(
                    _Row(drawable(name, i, "run"), [mark], style.line_style(theme, i)["color"])
                )
        if rows:
            groups.append(_Group(f"{title.label} ({units[title.kind]})", title.kind, rows))
    if not groups:
        return "None of the runs was evaluated after training."
    return _dots("After training", BARS, groups, theme)


def _dots(title: str, sub: str, groups: Sequence[_Group], theme: Theme) -> Figure | str:
    if not groups:
        return "The evaluation holds no finite figures."
    total = sum(ROW * len(g.rows) for g in groups) + GAP * (len(groups) - 1)
    height = HEAD + total + 0.6
    figure = style.new_figure(title, sub, height, theme)
    top = height - HEAD
    for group in groups:
        size = ROW * len(group.rows)
        box = (0.25 / WIDTH, (top - size) / height, (WIDTH - 0.5) / WIDTH, size / height)
        _draw_group(figure.add_axes(box), group, theme)
        top -= size + GAP
    return figure


def _draw_group(ax: Axes, group: _Group, theme: Theme) -> None:
    scale = 100 if group.kind == "share" else 1
    for r, row in enumerate(group.rows):
        for k, m in enumerate(row.marks):
            if m is not None and m.value is not None:
                shift = 0.08 * (1 - 2 * k) if len(row.marks) > 1 else 0.0
                hollow = len(row.marks) > 1 and k == 0
                _draw_mark(ax, m, scale, -r - 0.12 - shift, row.color, hollow, theme)
        words = _change_words(group.kind, row.marks)
        # The name stands above its row, so that long ones have the whole width.
        label = style.fit(row.label, WIDTH - 0.65 - style.text_width([words]))
        place: dict[str, Any] = {
            "y": -r + 0.32,
            "transform": ax.get_yaxis_transform(),
            "fontsize": style.SMALL,
            "va": "center",
        }
        ax.text(0, s=label, **place)
        ax.text(1, s=words, ha="right", color=theme.muted, **place)
    ax.set_ylim(-len(group.rows) + 0.55, 0.55)
    ax.set_yticks([])
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    if group.kind == "share":
        ax.set_xlim(-1, 101)
        ax.set_xticks(range(0, 101, 20))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
    else:
        ax.margins(x=0.06)
        ax.xaxis.set_major_locator(style.round_ticks(6))
    ax.set_xlabel(group.unit, labelpad=2)


def _draw_mark(
    ax: Axes, m: Measure, scale: float, y: float, color: str, hollow: bool, theme: Theme
) -> None:
    assert m.value is not None
    low, high = m.interval or (m.value, m.value)
    if m.interval is None and m.standard_error is not None and math.isfinite(m.standard_error):
        low, high = m.value - m.standard_error, m.value + m.standard_error
    color = theme.muted if hollow else color
    ax.plot([scale * low, scale * high], [y, y], color=color, linewidth=1.2, zorder=2)
    look: dict[str, Any] = {"markeredgecolor": color, "markeredgewidth": 1.5, "linestyle": "none"}
    face = theme.face if hollow else color
    ax.plot([scale * m.value], [y], "o", markersize=6.5, markerfacecolor=face, zorder=4, **look)


def _change_words(kind: str, marks: Sequence[Measure | None]) -> str:
    """One value a stage, the unit once: "55.0 → 83.0 %"."""
    shown = []
    for m in marks:
        if m is None or m.value is None:
            shown.append("none")
        else:
            shown.append(f"{100 * m.value:.1f}" if kind == "share" else f"{m.value:.3f}")
    return f"{' → '.join(shown)} {'%' if kind == 'share' else kind}"
