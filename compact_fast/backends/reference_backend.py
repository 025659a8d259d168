"""The `reference` backend: plain torch with full logits. For judging, never chosen by "auto"."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from compact_fast import reference
from compact_fast.backends.protocol import ABI, Gradients, LossResult, Needs, RunSpec
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout

Result = TypeVar("Result")


@dataclass(frozen=True)
class ReferenceBackend:
    """`compact_fast.reference` behind the backend interface; gradients by autograd."""

    name: str = "reference"
    abi: int = ABI
    skips_blocks: bool = True
    caps_logits: bool = True

    def can_run(self, spec: RunSpec) -> bool | str:
        """Always, given the memory for [T, V] logits."""
        return True

    def score_and_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: TokenLayout,
        consensus: Tensor | None,
        attention: Tensor | None,
        config: CompactConfig,
        normalizer: float | None,
        needs: Needs,
        statistics: bool,
        softcap: float = 0.0,
    ) -> LossResult:
        """See CompactBackend."""
        out, gradients = _with_gradients(
            lambda h, w, b: reference.compact_loss(
                h,
                w,
                layout,
                consensus=consensus,
                attention=attention,
                config=config,
                normalizer=normalizer,
                head_bias=b,
                softcap=softcap,
            ),
            lambda out: out.loss,
            (hidden, weight, bias),
            needs,
        )
        bounds = out.gradient_error
        if bounds is not None:
            bounds = bounds * bounds.new_tensor([g is not None for g in gradients])
        return LossResult(
            loss=out.loss.detach(),
            loss_sft=out.loss_sft,
            loss_consistency=out.loss_consistency,
            gradients=gradients,
            weights=out.weights,
            nll=out.nll,
            mi=out.mi,
            consensus=out.consensus,
            score=out.score,
            token_logp=out.token_logp,
            consistency=out.consistency,
            filtered=out.filtered,
            nonfinite=out.nonfinite,
            skipped=out.skipped,
            token_entropy=out.token_entropy if statistics else None,
            token_correct=out.token_correct if statistics else None,
            kept_share=out.kept_share,
            gradient_error=bounds,
        )

    def token_logp(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        statistics: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See CompactBackend."""
        logp = reference.log_softmax(hidden, weight, bias, softcap)
        return (
            reference.pick_targets(logp, targets),
            reference.entropy(logp, targets) if statistics else None,
            (logp.argmax(-1) == targets) if statistics else None,
        )

    def token_logp_gradients(
        self,
        grad_logp: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        needs: Needs,
        softcap: float = 0.0,
    ) -> Gradients:
        """See CompactBackend."""
        return _with_gradients(
            lambda h, w, b: reference.token_logp(h, w, targets, head_bias=b, softcap=softcap),
            lambda logp: (logp * grad_logp).sum(),
            (hidden, weight, bias),
            needs,
        )[1]


def _with_gradients(
    compute: Callable[[Tensor, Tensor, Tensor | None], Result],
    scalar: Callable[[Result], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor | None],
    needs: Needs,
) -> tuple[Result, Gradients]:
    """`compute(inputs)` and the gradients of `scalar` of it.

    In a thread of its own: the dispatcher keeps autograd off on the thread that runs an operator.
    """

    def run() -> tuple[Result, Gradients]:
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(inputs, needs, strict=True)
        ]
        hidden, weight, bias = leaves
        assert hidden is not None
        assert weight is not None
        result = compute(hidden, weight, bias)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        if not wanted:
            return result, Gradients(None, None, None)
        found = iter(torch.autograd.grad(scalar(result), wanted, materialize_grads=True))
        grads = [next(found) if t is not None and t.requires_grad else None for t in leaves]
        return result, Gradients(*grads)

    with ThreadPoolExecutor(1) as own_thread:
        return own_thread.submit(run).result()
