"""Errors against float64 from the same low-precision inputs, beside those of plain torch.

Allowed: in bfloat16 torch's own error in the same dtype and half a unit in the last place of the
largest value; in float32 twice torch's own, as sums run in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from compact_fast.backends.protocol import CompactBackend, LossResult, Needs, RunSpec
from compact_fast.backends.reference_backend import ReferenceBackend
from compact_fast.benchmark.loss import TEACHERS, Problem, Shape, make_problem
from compact_fast.config import CompactConfig

FIGURES = ("loss", "token_logp", "nll", "mi", "weights", "consistency")
GRADIENTS = ("hidden", "weight")


def judge(backend: CompactBackend, device: torch.device, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """One row a figure: the largest error, torch's own, what is allowed, the verdict."""
    shape = Shape(48, 509, 24) if tiny else Shape(1024, 32_003, 512)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        verdict = backend.can_run(RunSpec(device, dtype, shape.vocab, shape.width))
        if verdict is not True:
            continue
        for confident in (False, True):
            problem = make_problem(shape, frozen=False, dtype=dtype, device=device)
            if confident:
                problem = sure_of_its_labels(problem)
            yield from _errors(backend, problem, "p > 0.99" if confident else "random")


def sure_of_its_labels(problem: Problem) -> Problem:
    """The same batch with hidden states that give every label more than 0.99.

    Every teacher is sure to another degree: equal NLLs would make weights of rounding errors.
    """
    layout = problem.layout
    with torch.no_grad():
        rows = torch.nn.functional.normalize(problem.weight.float())
        weight = rows.to(problem.weight.dtype)
        size = 20.0 + 1.5 * (layout.token_sequence % TEACHERS)
        hidden = (size[:, None] * rows[layout.targets]).to(problem.hidden.dtype)
    return replace(problem, hidden=hidden, weight=weight)


def _errors(backend: CompactBackend, problem: Problem, labels: str) -> Iterator[dict[str, Any]]:
    dtype = problem.hidden.dtype
    got, own = _run(backend, problem), _run(ReferenceBackend(), problem)
    exact = _run(ReferenceBackend(), problem, wide=True)
    for name in (*FIGURES, *(f"gradient of {n}" for n in GRADIENTS)):
        mine, theirs, truth = (_figure(r, name) for r in (got, own, exact))
        error, plain = (float((v.double() - truth).abs().max()) for v in (mine, theirs))
        eps = torch.finfo(mine.dtype).eps
        # figures are float32 whatever the inputs are, and sums of thousands of terms; a likelihood
        # near 1 is itself no finer than two units
        size = float(truth.abs().max())
        ulp = eps * (size / 2 if name.startswith("gradient") else max(16 * size, 2))
        allowed = (2 if dtype == torch.float32 else 1) * plain + ulp
        tier = getattr(backend, "tier", "")
        yield {
            "backend": backend.name + (f" ({tier})" if tier else ""),
            "dtype": str(dtype).removeprefix("torch."),
            "labels": labels,
            "figure": name,
            "error": f"{error:.1e}",
            "torch's own": f"{plain:.1e}",
            "allowed": f"{allowed:.1e}",
            "verdict": "good" if error <= allowed else "TOO LARGE",
        }


def _figure(result: LossResult, name: str) -> torch.Tensor:
    found = (
        getattr(result.gradients, name.removeprefix("gradient of "))
        if name.startswith("gradient")
        else getattr(result, name)
    )
    assert isinstance(found, torch.Tensor)
    return found


def _run(backend: CompactBackend, problem: Problem, *, wide: bool = False) -> LossResult:
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    if wide:
        hidden, weight = hidden.double(), weight.double()
    needs = Needs(True, True, False)
    # a floor under standard deviations: near-ties would turn rounding into weights
    config = CompactConfig(filter_below=0.0, z_floor=0.05)
    return backend.score_and_loss(
        hidden, weight, None, problem.layout, problem.consensus, None, config, None, needs, False
    )
