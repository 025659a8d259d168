"""The picture of docs/consensus.md, from the data that the other benches here have written.

    python bench/matching/speed_plot.py

Reads assignment_peers, matching_peers, consensus_parser and consensus_threads of bench/results/;
writes docs/consensus_speed.png.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
OURS, OTHERS = "#0072b2", "#8a8a8a"
CASES = {  # pairs, nodes: what the legend says, marker
    ("planted", "5-12"): ("5-12 steps, noisy copy", "o"),
    ("random", "5-12"): ("5-12 steps, random", "s"),
    ("planted", "20-40"): ("20-40 steps, noisy copy", "^"),
    ("random", "20-40"): ("20-40 steps, random", "D"),
}
GOOD = 0.999  # quality from which a marker is filled
Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    with (ROOT / f"bench/results/{name}.csv").open() as file:
        return list(csv.DictReader(file))


def color(name: str) -> str:
    return OURS if name.startswith("compact_fast") else OTHERS


def pairs_panel(ax: Any, rows: Rows, title: str) -> None:
    """A line a method, the quickest on top; a marker a kind of pairs."""
    methods: dict[str, float] = {}
    for row in rows:
        name = row["method"]
        methods[name] = max(methods.get(name, 0.0), float(row["pairs_per_second"]))
    order = sorted(methods, key=lambda name: methods[name])
    for row in rows:
        quality = row.get("quality", "bound")
        good = quality == "bound" or float(quality) >= GOOD
        mark = color(row["method"])
        ax.plot(
            float(row["pairs_per_second"]),
            order.index(row["method"]),
            CASES[row["pairs"], row["nodes"]][1],
            color=mark,
            markerfacecolor=mark if good else "white",
        )
    lines(ax, order, title, "pairs a second, one core")


def parser_panel(ax: Any, rows: Rows) -> None:
    columns = {
        "compact_fast": "rationales_per_second",
        "sentencex (sentences only)": "sentencex_rationales_per_second",
        "Python twin": "rationales_per_second_python",
    }
    for y, row in enumerate(reversed(rows)):
        for mark, (name, column) in zip("o^s", columns.items(), strict=True):
            if row[column]:
                ax.plot(float(row[column]), y, mark, color=color(name), label=name if not y else "")
    names = [f"{r['file']} ({r['mean_characters']} characters)" for r in reversed(rows)]
    ax.legend(fontsize=7, frameon=False)
    lines(ax, names, "Parser, real texts", "rationales a second, one core")


def threads_panel(ax: Any, rows: Rows) -> None:
    rows = rows[::-1]
    for y, row in enumerate(rows):
        ax.barh(y, float(row["two_threads_over_one"]), color=OURS, height=0.5)
        ax.text(0.05, y, row["two_threads_over_one"], color="white", va="center", fontsize=8)
    ax.axvline(2, color="black", linewidth=0.8)
    lines(ax, [r["work"] for r in rows], "Two threads", "times the speed of one", log=False)


def lines(ax: Any, names: Sequence[str], title: str, unit: str, log: bool = True) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(-0.6, len(names) - 0.4)
    if log:
        ax.set_xscale("log")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(unit, fontsize=8)


def main() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
    pairs_panel(axes[0, 0], read("assignment_peers"), "Assignment")
    matching = "Matching (hollow: below 99.9 % of the best value)"
    pairs_panel(axes[0, 1], read("matching_peers"), matching)
    parser_panel(axes[1, 0], read("consensus_parser"))
    threads_panel(axes[1, 1], read("consensus_threads"))
    handles = [
        plt.Line2D([], [], marker=mark, linestyle="", color="black", label=words)
        for words, mark in CASES.values()
    ]
    axes[0, 0].legend(handles=handles, fontsize=7, frameon=False, loc="lower right")
    figure.savefig(ROOT / "docs/consensus_speed.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
