"""The loss and other ways to a weighted loss, on a CPU; shared by the benches of the loss.

The others are given the weights of all positions; `compact_loss` finds its own, in the same pass.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.gpu_peers import torch_weighted
from compact_fast.benchmark.loss import (
    METHOD,
    Problem,
    Shape,
    eager,
    make_problem,
    ours,
    own_variants,
    weighted_nll,
)

SMALL = Shape(1024, 49152, 576)
LARGE = Shape(2048, 151936, 896)
SOFTCAP = 30.0
LENGTH = 64  # positions of a rationale, four to a question


def problem(
    shape: Shape = SMALL, *, frozen: bool, unlabelled: float = 0.0, seed: int = 0
) -> Problem:
    """A batch of rationales of LENGTH positions, a share of them without a label."""
    made = make_problem(
        shape, frozen=frozen, dtype=torch.float32, device=torch.device("cpu"), length=LENGTH,
        seed=seed, spread=2.0,
    )  # fmt: skip
    made = replace(made, consensus=0.9 + made.consensus / 10)  # nobody is filtered out
    if not unlabelled:
        return made
    place = torch.arange(made.shape.rows) % LENGTH
    targets = made.layout.targets.masked_fill(place < round(unlabelled * LENGTH), -100)
    return replace(made, layout=replace(made.layout, targets=targets))


def _chunked(p: Problem) -> Tensor:
    """Autograd over chunks of rows whose logits are made again in backward."""

    def part(hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        logits = hidden @ weight.T
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return (nll * scale).sum()

    parts: list[Any] = [t.split(256) for t in (p.hidden, p.layout.targets, p.scale)]
    losses = [
        checkpoint(part, x, p.weight, y, s, use_reentrant=False)
        for x, y, s in zip(*parts, strict=True)
    ]
    return torch.stack(losses).sum()


def _cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(
        p.hidden, p.weight, p.layout.targets, reduction="none", impl="torch_compile"
    )
    total: Tensor = (nll * p.scale).sum()
    return total


def variants(p: Problem) -> dict[str, Callable[[], object]]:
    """Name -> loss and backward pass, once."""
    torch._dynamo.reset()
    losses: dict[str, Callable[[Problem], Tensor]] = {
        "eager": weighted_nll,
        "torch.compile": torch.compile(weighted_nll, dynamic=False),
        "chunked autograd": _chunked,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        losses["F.linear_cross_entropy"] = torch_weighted
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        losses["cut-cross-entropy, torch"] = _cut_cross_entropy
    others = {name: eager(p, loss) for name, loss in losses.items()}
    capped = {
        "compact_loss, softcap": ours(p, "torch", METHOD, softcap=SOFTCAP),
        "eager, softcap": eager(p, partial(weighted_nll, softcap=SOFTCAP)),
    }
    return own_variants(p, "torch") | others | capped
