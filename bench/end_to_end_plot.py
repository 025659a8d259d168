"""The picture of bench/end_to_end.py: seconds a question of every variant, a panel a case, on the
device that most is known of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw(rows: Sequence[Mapping[str, Any]], words: Mapping[str, str], path: Path) -> Path:
    """Write the picture and return its path; rows without a time are left out."""
    timed = [row for row in rows if row.get("seconds_a_question")]
    if not timed:
        raise SystemExit("no times are kept: run python -m bench.end_to_end --data FOLDER first")
    ((device, _),) = Counter(row["device"] for row in timed).most_common(1)
    timed = [row for row in timed if row["device"] == device]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, 0.6 + 1.9 * len(cases)), squeeze=False, layout="constrained"
    )
    for ax, case in zip(axes[:, 0], cases, strict=True):
        these = [row for row in timed if row["case"] == case]
        seconds = [float(row["seconds_a_question"]) for row in these]
        names = [words[row["variant"]] for row in these]
        colors = ["#0072b2" if "compact_fast" in name else "#9a9a9a" for name in names]
        bars = ax.barh(names, seconds, color=colors)
        ax.bar_label(bars, [f"{value:.2f}" for value in seconds], padding=3)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_title(f"{case}, {device}", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds a question of one optimizer step (less is better)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
