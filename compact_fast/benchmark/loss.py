"""The loss beside other ways to compute it, on one batch.

Every variant makes the loss and its gradients, of the hidden states and, where it is trained, of
the head. What they are measured by are the bare products: three with a trained head, two with a
frozen one, in the dtype of the batch and without anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compact_fast.backends import CompactBackend
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.loss import CompactOutput, compact_loss
from compact_fast.softcap import capped

FIXED = (0.4, 0.3, 0.2, 0.1)  # uneven, so that nobody can do without weights
TEACHERS = len(FIXED)
LENGTH = 256  # labelled positions of a rationale, where the rows allow it


@dataclass(frozen=True)
class Shape:
    """Rows with a label, vocabulary, hidden width."""

    rows: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"T={self.rows:,} V={self.vocab:,} D={self.width:,}"


@dataclass(frozen=True)
class Problem:
    """One batch of whole questions with TEACHERS rationales each, every position labelled."""

    shape: Shape
    hidden: Tensor  # [T, D]; requires grad
    weight: Tensor  # [V, D]; requires grad unless the head is frozen
    layout: TokenLayout
    consensus: Tensor  # [S]
    scale: Tensor  # [T] float32: fixed, uneven weights of the positions; they sum to 1

    @property
    def frozen(self) -> bool:
        return not self.weight.requires_grad

    def clear(self) -> None:
        """Drop the gradients of the run before."""
        self.hidden.grad = self.weight.grad = None


def make_problem(
    shape: Shape,
    *,
    frozen: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    spread: float = 4.0,  # standard deviation of the logits
    length: int = LENGTH,
) -> Problem:
    """A random batch. Rows are cut to whole questions of equal rationales."""
    generator = torch.Generator().manual_seed(seed)
    questions = max(1, shape.rows // (TEACHERS * length))
    length = max(4, shape.rows // (TEACHERS * questions))
    S = TEACHERS * questions
    shape = replace(shape, rows=S * length)
    ends = torch.arange(1, S + 1) * length
    layout = TokenLayout(
        targets=torch.randint(0, shape.vocab, (shape.rows,), generator=generator),
        cu_seqlens=torch.arange(S + 1) * length,
        cu_teachers=torch.arange(questions + 1) * TEACHERS,
        gold_ids=torch.randint(0, shape.vocab, (2 * questions,), generator=generator),
        cu_gold=torch.arange(questions + 1) * 2,
        answer_spans=torch.stack([ends - 3, ends], 1),
    )
    size = spread / shape.width**0.5
    hidden = torch.randn(shape.rows, shape.width, generator=generator)
    weight = torch.randn(shape.vocab, shape.width, generator=generator) * size
    share = torch.tensor(FIXED)
    scale = share.repeat(questions).repeat_interleave(length) / (length * questions)
    return Problem(
        shape,
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(not frozen),
        layout.to(device),
        torch.rand(S, generator=generator).to(device),
        scale.to(device),
    )


def bare_products(problem: Problem) -> Callable[[], object]:
    """x W^T, g W and, with a trained head, g^T x."""
    x, weight = problem.hidden.detach(), problem.weight.detach()

    def run() -> object:
        g = x @ weight.T
        rows = g @ weight
        return rows if problem.frozen else (rows, g.T @ x)

    return run


def ours(
    problem: Problem,
    backend: str | CompactBackend,
    config: CompactConfig,
    *,
    softcap: float = 0.0,
) -> Callable[[], object]:
    """compact_loss and its backward pass."""

    def run() -> CompactOutput:
        problem.clear()
        out = compact_loss(
            problem.hidden,
            problem.weight,
            problem.layout,
            consensus=problem.consensus,
            config=config,
            backend=backend,
            softcap=softcap,
        )
        out.loss.backward()  # type: ignore[no-untyped-call]
        return out

    return run


def weighted_nll(problem: Problem, softcap: float = 0.0) -> Tensor:
    """The loss with fixed weights in plain torch, as a training loop would write it."""
    logits = capped((problem.hidden @ problem.weight.T).float(), softcap)
    nll = torch.nn.functional.cross_entropy(logits, problem.layout.targets, reduction="none")
    return (nll * problem.scale).sum()


def eager(
    problem: Problem, loss: Callable[[Problem], Tensor] = weighted_nll
) -> Callable[[], object]:
    """Full logits and autograd."""

    def run() -> object:
        problem.clear()
        value = loss(problem)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    return run


METHOD = CompactConfig(filter_below=0.0)
PLAIN = CompactConfig(weighting=FIXED, consistency="off", beta_mi=0.0)
"""Fixed weights and nothing else: what the others compute."""


def own_variants(
    problem: Problem, backend: str | CompactBackend, *, skip_below: Sequence[float] = ()
) -> dict[str, Callable[[], object]]:
    """The bare products, the loss with all of the method, and with fixed weights alone."""
    out = {
        "bare products": bare_products(problem),
        "compact_loss": ours(problem, backend, METHOD),
        "compact_loss, fixed weights": ours(problem, backend, PLAIN),
    }
    for eps in skip_below:
        name = f"compact_loss, skip_below {eps:.2g}"
        out[name] = ours(problem, backend, replace(METHOD, skip_below=eps))
    return out
