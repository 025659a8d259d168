"""An explanation as a picture: teachers beside each other, matched steps in one row."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from compact_fast.atomic import atomic_file
from compact_fast.glyphs import drawable
from compact_fast.graphs.explain import Explanation

INK, FAINT, RULE, PAPER = "#1c2733", "#5d6b78", "#d4dbe1", "#ffffff"
SHADES = LinearSegmentedColormap.from_list("agreement", ["#f7f4ee", "#9cc7bd", "#2f7f73"])
COLUMN = 3.1  # inches a teacher
LINE = 0.165  # inches a line of text
CHARACTERS = 43  # a line of a column
WORDS = 4  # lines of a step's words, at most
DPI = 110
TALLEST = 580  # inches; beyond it no rasteriser goes


def draw(found: Explanation) -> Figure:
    """The agreement of all pairs; under it a head with scores and the steps of each teacher.

    Colour says how well a teacher agrees: of a head its score, of a step whether it is matched with
    one of the best teacher's that has the same result. Raises ValueError where the steps are too
    many for one picture.
    """
    found = _drawable(found)
    teachers, rows = found.teachers, found.rows()
    k = len(teachers)
    cells = [[_lines(found, t, i) for t, i in enumerate(row)] for row in rows]
    heights = [max(len(c) for c in row) * LINE + 0.14 for row in cells]
    top = 3 * LINE + 0.35
    square = 0.46
    matrix = square * k + 0.95 + (0.3 if found.note else 0)
    width = max(COLUMN * k, 6.0) + 0.3
    height = top + sum(heights) + matrix + 0.3
    if height > TALLEST:
        raise ValueError(
            f"{len(rows)} rows of steps do not fit one picture; read them in the terminal"
        )
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    _agreement(axes, found, 0.15, square)
    _heads(axes, found, matrix, top)
    y = matrix + top
    for row, shown, tall in zip(rows, cells, heights, strict=True):
        agreed = _agreed(found, row)
        for t, lines in enumerate(shown):
            if lines:
                _cell(axes, 0.15 + t * COLUMN, y, tall - 0.05, lines, t in agreed)
        y += tall
    return figure


def save(found: Explanation, path: Path) -> None:
    """`draw` as a PNG file, whole or not at all."""
    figure = draw(found)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor=PAPER)


def _agreed(found: Explanation, row: Sequence[int | None]) -> set[int]:
    """The teachers whose steps in this row have the result of the best teacher's, and that one."""
    best = found.reference
    step = row[best]
    if step is None:
        return set()
    others = {
        t
        for t, i in enumerate(row)
        if t != best and i is not None and found.mark(t, i, best, step) == "="
    }
    return others | {best} if others else set()


def _drawable(found: Explanation) -> Explanation:
    """The same with names that the font can draw."""
    names = {t.name: drawable(t.name, i) for i, t in enumerate(found.teachers)}
    teachers = [
        replace(t, name=names[t.name], copy_of=names[t.copy_of] if t.copy_of else None)
        for t in found.teachers
    ]
    return replace(found, teachers=teachers)


def _lines(found: Explanation, teacher: int, step: int | None) -> list[str]:
    """A step's lines: number and formula, then its words."""
    if step is None:
        return []
    it = found.teachers[teacher].steps[step]
    other = found.partner(teacher, step)
    mark = ""
    if other is not None:
        best = found.reference
        sign = found.mark(teacher, step, best, other)
        mark = f"{sign} {found.teachers[best].name} {other + 1}"
    uses = f"  uses {', '.join(str(i + 1) for i in it.uses)}" if it.uses else ""
    head = textwrap.wrap(f"{step + 1}.  {it.formula}{uses}", CHARACTERS)[:2]
    words = textwrap.wrap(it.text, CHARACTERS)
    if len(words) > WORDS:
        words = [*words[: WORDS - 1], words[WORDS - 1][: CHARACTERS - 2] + " …"]
    return [*head, *([_short(mark, CHARACTERS)] if mark else []), *words]


def _heads(axes: Axes, found: Explanation, y: float, tall: float) -> None:
    for t, teacher in enumerate(found.teachers):
        x = 0.15 + t * COLUMN
        shade = SHADES(teacher.score)
        axes.add_patch(_box(x, y, COLUMN - 0.12, tall - 0.15, shade))
        ink = "#ffffff" if teacher.score > 0.75 else INK
        best = "  (best)" if t == found.reference and not found.note else ""
        second = f"score {teacher.score:.3f}    soundness {teacher.soundness:.2f}"
        third = f"answer {_short(teacher.answer, 28)}"
        if teacher.copy_of:
            third = _short(f"{third}, near-copy of {teacher.copy_of}", 42)
        name = _short(teacher.name, 30) + best
        for n, (text, size, weight) in enumerate(
            [(name, 10.5, "bold"), (second, 8.5, "normal"), (third, 8.5, "normal")]
        ):
            axes.text(
                x + 0.1, y + 0.1 + n * 0.19, _plain(text), fontsize=size, color=ink, weight=weight,
                va="top",
            )  # fmt: skip


def _cell(axes: Axes, x: float, y: float, tall: float, lines: list[str], together: bool) -> None:
    axes.add_patch(_box(x, y, COLUMN - 0.12, tall, "#e4f1ee" if together else "#f6f6f4"))
    for n, line in enumerate(lines):
        axes.text(
            x + 0.08, y + 0.05 + n * LINE, _plain(line), fontsize=7.8, va="top", family="monospace",
            color=INK if n == 0 else FAINT, weight="bold" if n == 0 else "normal",
        )  # fmt: skip


def _agreement(axes: Axes, found: Explanation, y: float, square: float) -> None:
    left = 0.15 + 0.075 * max((min(len(t.name), 30) for t in found.teachers), default=0) + 0.3
    axes.text(0.15, y, "agreement, 0 to 1", fontsize=9.5, weight="bold", color=INK, va="top")
    y += 0.3
    for a, teacher in enumerate(found.teachers):
        middle = y + (a + 0.5) * square
        axes.text(
            0.15, middle, _plain(f"{a + 1}  {_short(teacher.name, 30)}"), fontsize=8.5, color=INK,
            va="center",
        )  # fmt: skip
        for b in range(len(found.teachers)):
            value = float(found.agreement[a, b])
            axes.add_patch(_box(left + b * square, y + a * square, square, square, SHADES(value)))
            axes.text(
                left + (b + 0.5) * square, middle, f"{value:.2f}", fontsize=8, ha="center",
                va="center", color="#ffffff" if value > 0.75 else INK,
            )  # fmt: skip
    bottom = y + len(found.teachers) * square
    for b in range(len(found.teachers)):
        axes.text(
            left + (b + 0.5) * square, bottom + 0.06, str(b + 1), fontsize=8, ha="center", va="top",
            color=FAINT,
        )  # fmt: skip
    if found.note:
        axes.text(0.15, bottom + 0.3, found.note, fontsize=9, color=INK, va="top")


def _box(x: float, y: float, width: float, height: float, colour: Any) -> Rectangle:
    return Rectangle((x, y), width, height, facecolor=colour, edgecolor=RULE, linewidth=0.6)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 2] + " …"


def _plain(text: str) -> str:
    """Dollar signs are not mathematics here."""
    return text.replace("$", r"\$")
