"""Other ways to the same loss, for `bench.gpu`.

Whoever takes a weight a token computes the weighted loss; whoever only averages computes less, and
its name says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.benchmark.loss import Problem, eager, weighted_nll

Loss = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Peer:
    """A package that may be installed."""

    name: str
    distribution: str
    module: str
    losses: dict[str, Loss]


def torch_weighted(p: Problem) -> Tensor:
    nll = torch.nn.functional.linear_cross_entropy(
        p.hidden, p.weight, p.layout.targets, reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(),
    )  # fmt: skip
    return (nll * p.scale).sum()


def _torch_mean(p: Problem) -> Tensor:
    loss: Tensor = torch.nn.functional.linear_cross_entropy(
        p.hidden, p.weight, p.layout.targets, options=torch.nn.LinearCrossEntropyOptions()
    )
    return loss


def _liger(p: Problem, reduction: str) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    value: Tensor = loss(p.hidden, p.weight, p.layout.targets, reduction=reduction)
    return value


def _liger_weighted(p: Problem) -> Tensor:
    return (_liger(p, "none") * p.scale).sum()


def _liger_mean(p: Problem) -> Tensor:
    return _liger(p, "mean")


def _cce_weighted(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(p.hidden, p.weight, p.layout.targets, reduction="none")
    total: Tensor = (nll * p.scale).sum()
    return total


def _quack_mean(p: Problem) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(p.hidden, p.weight, p.layout.targets)
    return loss


PEERS = (
    Peer(
        "liger-kernel",
        "liger-kernel",
        "liger_kernel",
        {"liger-kernel": _liger_weighted, "liger-kernel, mean only": _liger_mean},
    ),
    Peer(
        "cut-cross-entropy",
        "cut-cross-entropy",
        "cut_cross_entropy",
        {"cut-cross-entropy": _cce_weighted},
    ),
    Peer("quack", "quack-kernels", "quack", {"quack, mean only": _quack_mean}),
)


def peer_variants(problem: Problem) -> dict[str, Callable[[], object]]:
    """Eager torch, torch.compile, torch's own fused loss, and the peers that are installed."""
    torch._dynamo.reset()  # or after a few shapes it would give up compiling, and say nothing
    compiled = torch.compile(weighted_nll, dynamic=False)
    losses: dict[str, Loss] = {"eager": weighted_nll, "torch.compile": compiled}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        losses["F.linear_cross_entropy"] = torch_weighted
        losses["F.linear_cross_entropy, mean only"] = _torch_mean
    for peer in PEERS:
        if importlib.util.find_spec(peer.module) is not None:
            losses |= peer.losses
    return {name: eager(problem, loss) for name, loss in losses.items()}
