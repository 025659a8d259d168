"""Looks: two themes, colours that colour-blind readers tell apart, smoothing, line labels."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FuncFormatter, MaxNLocator

from compact_fast.glyphs import drawable

WIDTH = 5.4  # inches; on a telephone the type stays legible
DPI = 170
FONT = 9.5  # points
SMALL = 8.0
RAW_POINTS = 80  # more logged rows than this are shown as means over stretches
STRETCHES = 50
MAX_NAME = 22  # characters of a teacher's name inside a picture


@dataclass(frozen=True)
class Theme:
    """One set of colours. `series` comes in fours: lines 5 to 8 are dashed, later ones dotted."""

    name: str
    face: str
    text: str
    muted: str
    grid: str
    good: str
    bad: str
    heat: str
    series: tuple[str, ...]


# Chosen so that within each four the smallest OKLab distance under normal, protan, deutan and
# tritan sight stays above 8 (x100), at 3:1 contrast or more against the page.
LIGHT = Theme(
    name="light",
    face="#FFFFFF",
    text="#1C2229",
    muted="#5A6570",
    grid="#DDE2E7",
    good="#0072B2",
    bad="#D55E00",
    heat="cividis",
    series=(
        "#0072B2", "#D55E00", "#2B2B2B", "#009E73",
        "#B0418F", "#A88400", "#3796D6", "#6B3A1E",
    ),
)  # fmt: skip
DARK = Theme(
    name="dark",
    face="#161B21",
    text="#E8ECF0",
    muted="#9BA6B1",
    grid="#303841",
    good="#3E97DB",
    bad="#F58A4B",
    heat="cividis",
    series=(
        "#3E97DB", "#F58A4B", "#F2F2F2", "#38C79A",
        "#D977C0", "#E8CB4B", "#8FC7FF", "#A9713F",
    ),
)  # fmt: skip
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))


def line_style(theme: Theme, index: int) -> dict[str, Any]:
    """Colour and dashes of the line number `index`."""
    color = theme.series[index % len(theme.series)]
    if index < len(theme.series):
        return {"color": color, "linestyle": _DASHES[index // 4]}
    return {"color": color, "linestyle": _DASHES[2 + (index // len(theme.series) - 1) % 2]}


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Matplotlib settings of a theme, for the pictures made inside."""
    settings: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": FONT,
        "text.color": theme.text,
        "text.parse_math": False,  # a "$" in a teacher's name is a dollar
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.text,
        "axes.facecolor": theme.face,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": SMALL + 0.5,
        "ytick.labelsize": SMALL + 0.5,
        "figure.facecolor": theme.face,
        "savefig.facecolor": theme.face,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(settings):
        yield


@dataclass(frozen=True)
class Smoothed:
    """A curve to draw. `window` rows a point (1: as logged); low/high: 10th, 90th percentile."""

    x: np.ndarray  # [n]
    mid: np.ndarray  # [n]
    low: np.ndarray | None  # [n]
    high: np.ndarray | None  # [n]
    window: int


def smooth(steps: Sequence[float], values: Sequence[float]) -> Smoothed:
    """As logged up to RAW_POINTS rows; else means over about STRETCHES stretches of equally many.

    A stretch's x is the mean of its steps.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    window = stretch(len(x))
    if window == 1:
        return Smoothed(x, y, None, None, 1)
    whole = len(x) // window * window
    low, high = np.percentile(y[:whole].reshape(-1, window), (10, 90), axis=1)
    xs, mids = (v[:whole].reshape(-1, window).mean(1) for v in (x, y))
    if whole < len(x):  # the last, shorter stretch
        rest = y[whole:]
        xs, mids = np.append(xs, x[whole:].mean()), np.append(mids, rest.mean())
        low, high = (
            np.append(low, np.percentile(rest, 10)),
            np.append(high, np.percentile(rest, 90)),
        )
    return Smoothed(xs, mids, low, high, window)


def stretch(rows: int) -> int:
    """How many of `rows` log rows make one point of a curve."""
    return 1 if rows <= RAW_POINTS else math.ceil(rows / STRETCHES)


def smoothing_words(windows: Collection[int], band: bool = True) -> str:
    """How curves of these windows were made, for the line under a title."""
    window = max(windows, default=1)
    if window <= 1:
        return "as logged"
    words = f"line: mean of {'up to ' if len(set(windows)) > 1 else ''}{window:,} log rows"
    return f"{words}; band: 10th to 90th percentile" if band else words


def draw_curve(
    ax: Axes,
    steps: Sequence[float],
    values: Sequence[float],
    style: dict[str, Any],
    *,
    band: bool = True,
    zorder: float = 3,
) -> Smoothed:
    """One series with its band; few points get markers so that a single one is seen."""
    curve = smooth(steps, values)
    if band and curve.low is not None and curve.high is not None:
        ax.fill_between(
            curve.x, curve.low, curve.high, color=style["color"], alpha=0.16, linewidth=0, zorder=2
        )
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(curve.x) <= 25 else {}
    ax.plot(curve.x, curve.mid, zorder=zorder, **style, **marker)
    return curve


def short_names(names: Sequence[str], limit: int = MAX_NAME, noun: str = "teacher") -> list[str]:
    """Names that fit a picture: cut in the middle, numbered where the cut makes two equal."""
    flat = [drawable(name, i, noun) for i, name in enumerate(names)]
    cut = [_cut(name, limit) for name in flat]
    return [
        f"{i + 1}. {_cut(flat[i], limit - 3)}" if cut.count(name) > 1 else name
        for i, name in enumerate(cut)
    ]


def _cut(name: str, limit: int) -> str:
    if len(name) <= limit:
        return name
    head = (limit - 1) * 3 // 5
    return f"{name[:head]}…{name[len(name) - (limit - 1 - head) :]}"


def new_figure(title: str, sub: str, height: float, theme: Theme) -> Figure:
    """An empty figure with its title and the line under it; axes go below `top(figure)`."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    left = 0.1 / WIDTH
    figure.text(left, 1 - 0.08 / height, title, va="top", fontsize=FONT + 1.5, weight="bold")
    figure.text(left, 1 - 0.31 / height, sub, va="top", fontsize=SMALL, color=theme.muted)
    return figure


HEAD = 0.62  # inches that title and sub-title take


def round_ticks(count: int, **options: Any) -> MaxNLocator:
    """Ticks at round numbers only."""
    return MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], **options)


def step_axis(ax: Axes, label: bool = True) -> None:
    """The x axis of everything that is logged over time."""
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if label:
        ax.set_xlabel("optimizer step")
    else:
        ax.tick_params(labelbottom=False)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places nearest to those wanted, at least `gap` apart, inside [low, high] where they fit."""
    n = len(wanted)
    if not n:
        return []
    gap = min(gap, (high - low) / max(n - 1, 1))
    order = sorted(range(n), key=lambda i: wanted[i])
    # Isotonic regression of (wanted - i * gap), by pooling neighbours that violate the order.
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([wanted[i] - rank * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            value, weight = blocks.pop()
            total = blocks[-1][1] + weight
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + value * weight) / total, total]
    flat = [value for value, weight in blocks for _ in range(int(weight))]
    top = high - (n - 1) * gap
    out = [0.0] * n
    for rank, i in enumerate(order):
        out[i] = min(max(flat[rank], low), top) + rank * gap
    return out


def label_ends(
    ax: Axes, ends: Sequence[tuple[float, float, str, dict[str, Any]]], theme: Theme
) -> None:
    """Names lines at their right ends: (x, y, text, style) each, moved apart, joined by a hair.

    Call it when the axes have their final place and limits.
    """
    if not ends:
        return
    height = ax.get_window_extent().height / ax.figure.dpi * 72  # points
    low, high = ax.get_ylim()
    scale = ax.transData
    pixels = [ax.transAxes.inverted().transform(scale.transform((x, y)))[1] for x, y, _, _ in ends]
    gap = (SMALL + 2.5) / height
    places = spread([min(max(p, 0.0), 1.0) for p in pixels], gap, 0.0, 1.0)
    for (x, y, text, style), place in zip(ends, places, strict=True):
        start = ax.transAxes.inverted().transform(scale.transform((x, min(max(y, low), high))))
        ax.plot(
            [max(start[0], 0) + 0.006, 1.015, 1.04],
            [start[1], place, place],
            transform=ax.transAxes,
            clip_on=False,
            color=style["color"],
            linewidth=0.7,
            # A long way from a line that ends early must not look like data.
            **({"alpha": 0.75} if start[0] > 0.9 else {"alpha": 0.5, "linestyle": (0, (1, 3))}),
            zorder=1,
        )
        ax.text(
            1.05,
            place,
            text,
            transform=ax.transAxes,
            va="center",
            ha="left",
            fontsize=SMALL,
            color=style["color"],
            clip_on=False,
        )


def text_width(texts: Sequence[str], size: float = SMALL) -> float:
    """Inches that the widest of these takes."""
    return max((_width(text) for text in texts), default=0.0) * size / 72


@cache
def _width(text: str) -> float:
    font = FT2Font(findfont("DejaVu Sans"))
    font.set_size(64, 72)  # large, so that hinting rounds little
    font.set_text(text)
    return float(font.get_width_height()[0]) / 64 / 64


def fit(text: str, width: float, size: float = SMALL) -> str:
    """The text, cut in the middle until it is at most `width` inches wide."""
    limit = len(text)
    shown = text
    while text_width([shown], size) > width and limit > 8:
        limit -= 1
        shown = _cut(text, limit)
    return shown
