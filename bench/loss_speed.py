"""Time and memory of the loss on a CPU, as multiples of the bare products.

    OMP_NUM_THREADS=2 python -m bench.loss_speed [time] [memory] [--rounds 7] [--large]

Variants run in turns (A B C C B A ...) and medians are compared; memory is how far a process of
its own grew at its peak, gradients included, after the same call on a tiny batch; `memory` alone
adds it to the times that are there. On a machine that others use, --processor-time takes the
processor's time of one thread, which does not count waiting. Writes
bench/results/loss_speed[_large][_processor].csv and, with `memory`, docs/loss_speed.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measure import (
    RESULTS,
    in_fresh_process,
    interleaved,
    median,
    print_table,
    read_csv,
    where,
    write_csv,
)

PICTURE = Path(__file__).parents[1] / "docs" / "loss_speed.png"
WHOLE, FIXED = "compact_loss", "compact_loss, fixed weights"
SLOW = ("F.linear_cross_entropy",)  # an order of magnitude: two rounds are enough


def memory(case: dict[str, Any]) -> dict[str, Any]:
    """Peak growth of this process in one call, in MB."""
    import torch

    from bench import loss_variants as lv
    from compact_fast.benchmark.loss import Shape
    from compact_fast.benchmark.memory import rise_mb

    tiny = lv.problem(Shape(256, 1000, 32), frozen=case["frozen"])
    lv.variants(tiny)[case["variant"]]()
    p = lv.problem(lv.LARGE if case["large"] else lv.SMALL, frozen=case["frozen"])
    run = lv.variants(p)[case["variant"]]
    return {"peak_mb": round(rise_mb(run, torch.device("cpu")))}


def times(
    frozen: bool, unlabelled: float, large: bool, rounds: int, processor: bool
) -> list[dict[str, Any]]:
    """One row a variant: milliseconds and multiples of the bare products."""
    from bench import loss_variants as lv

    p = lv.problem(lv.LARGE if large else lv.SMALL, frozen=frozen, unlabelled=unlabelled)
    runs = lv.variants(p)
    if unlabelled or large:  # a question of its own, of our variants and the best of the others
        runs = {n: r for n, r in runs.items() if n.startswith(("bare", "compact", "torch.comp"))}
    quick = {name: run for name, run in runs.items() if name not in SLOW}
    found = interleaved(quick, rounds=rounds, processor=processor)
    for name in runs.keys() - quick.keys():
        slow = interleaved({name: runs[name]}, rounds=2, warm_up=0, processor=processor)
        found[name] = slow[name]
    bare = median(found["bare products"])
    share = scores_share(runs, rounds, processor)
    return [
        {
            "shape": str(p.shape),
            "head": "frozen" if frozen else "trained",
            "unlabelled": unlabelled,
            "variant": name,
            "ms": round(1e3 * median(found[name]), 1),
            "times_bare": round(median(found[name]) / bare, 3),
            "least_ms": round(1e3 * min(found[name]), 1),
            "times_least_bare": round(min(found[name]) / min(found["bare products"]), 3),
            "scores_share": share if name == WHOLE else "",
        }
        for name in runs
    ]


def scores_share(runs: dict[str, Callable[[], object]], rounds: int, processor: bool) -> float:
    """What scores, weights and consistency take of the loss: the two ways alone, in turns.

    The median over turns of a share, of three times as many: a few percent are less than a
    machine's speed changes between two turns that are far apart.
    """
    pair = {name: runs[name] for name in (WHOLE, FIXED)}
    found = interleaved(pair, rounds=3 * rounds, processor=processor)
    shares = [1 - fixed / whole for whole, fixed in zip(found[WHOLE], found[FIXED], strict=True)]
    return round(median(shares), 4)


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line; without time or memory both are meant."""
    parser = argparse.ArgumentParser(description=__doc__)
    # no `choices`: before 3.12, Python takes "none given" for a wrong one
    parser.add_argument("what", nargs="*", metavar="time | memory", help="both by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="V=151,936, D=896, T=2,048")
    parser.add_argument("--processor-time", action="store_true", help="of one thread")
    chosen = parser.parse_args(given)
    chosen.what = chosen.what or ["time", "memory"]
    if unknown := set(chosen.what) - {"time", "memory"}:
        parser.error(f"neither time nor memory: {', '.join(sorted(unknown))}")
    return chosen


def main() -> None:
    """Measure, print, keep."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(memory(json.loads(sys.argv[1]))))
        return
    chosen = arguments(sys.argv[1:])
    name = "loss_speed_large" if chosen.large else "loss_speed"
    if chosen.processor_time:
        import torch

        torch.set_num_threads(1)
        name += "_processor"
    rows: list[dict[str, Any]] = []
    if "time" in chosen.what:
        for frozen in (True, False):
            for unlabelled in (0.0,) if chosen.large else (0.0, 0.35):
                rows += times(
                    frozen, unlabelled, chosen.large, chosen.rounds, chosen.processor_time
                )
    else:
        kept = read_csv(RESULTS / f"{name}.csv")
        rows += [row for row in kept if row["device"] == where()["device"]]
    if "memory" in chosen.what:
        for row in rows:
            if float(row["unlabelled"]) == 0:
                frozen = row["head"] == "frozen"
                case = {"variant": row["variant"], "frozen": frozen, "large": chosen.large}
                row |= in_fresh_process("bench.loss_speed", case)
    print_table([{k: v for k, v in row.items() if k not in where()} for row in rows])
    print(write_csv(name, rows))
    if not chosen.large and "memory" in chosen.what:
        picture(rows)
        print(PICTURE)


def picture(rows: list[dict[str, Any]]) -> None:
    """Time and memory of every variant, frozen and trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharey="row", layout="constrained")
    for line, head in zip(axes, ("frozen", "trained"), strict=True):
        chosen = [
            r for r in rows
            if r["head"] == head and float(r["unlabelled"]) == 0 and r["variant"] != "bare products"
        ][::-1]  # fmt: skip
        names = [r["variant"] for r in chosen]
        colors = ["#0072b2" if n.startswith("compact_loss") else "#999999" for n in names]
        products = 2 if head == "frozen" else 3
        for axis, key, label in (
            (line[0], "times_bare", f"time, multiples of the {products} bare products"),
            (line[1], "peak_mb", "peak memory beyond the inputs, MB"),
        ):
            values = [float(r[key]) for r in chosen]
            axis.barh(names, values, color=colors)
            longest = max(values)
            for place, value in enumerate(values):
                text = f"{value:.2f}" if key == "times_bare" else f"{value:.0f}"
                axis.text(value + longest / 80, place, text, va="center", fontsize=9)
            axis.set_xlim(0, longest * 1.12)
            axis.set_xlabel(label)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].axvline(1, color="black", linewidth=0.8, linestyle=":")
        line[0].set_title(f"{head} head", loc="left", fontsize=11)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
