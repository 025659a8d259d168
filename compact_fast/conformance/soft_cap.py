"""The check of soft-capped logits, for backends that offer them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from compact_fast.backends.protocol import CompactBackend, LossResult, Needs
from compact_fast.config import CompactConfig
from compact_fast.conformance.guesses import hint
from compact_fast.conformance.judge import (
    REFERENCE,
    Subject,
    call,
    compare,
    in_float64,
    on_device,
    truth,
)
from compact_fast.reference import log_softmax
from compact_fast.testing import RandomBatch, random_batch

SOFTCAP = 5.0  # logits of these batches reach twice that
PLAIN = CompactConfig(filter_below=0.0, consistency="off")
CONFIGS = (
    PLAIN,
    CompactConfig(filter_below=0.0, consistency_weight=0.5),
    CompactConfig(filter_below=0.0, mi="logprob", consistency="all", consistency_weight=0.5),
)


def check_soft_cap(subject: Subject) -> None:
    """With softcap, scores, loss and gradients are those of the capped logits."""
    if not getattr(subject.backend, "caps_logits", False):
        return
    batch = _batch(torch.float32)
    for config in CONFIGS:
        _judge(subject, batch, config)
    for dtype in (torch.bfloat16, torch.float16):
        if subject.can_run(dtype) is True:
            _judge(subject, _batch(dtype), PLAIN)
    own, exact = (_token_logp(REFERENCE, b) for b in (batch, in_float64(batch)))
    got = _token_logp(subject.backend, on_device(batch, subject.device))
    compare("token_logp (softcap)", got, own, exact)


def _batch(dtype: torch.dtype) -> RandomBatch:
    return random_batch((3, 1, 4, 2), seed=1, dtype=dtype, scale=1.0)


def _judge(subject: Subject, batch: RandomBatch, config: CompactConfig) -> None:
    got = subject.run(batch, config, softcap=SOFTCAP)
    own, exact = call(REFERENCE, batch, config, softcap=SOFTCAP), truth(batch, config, SOFTCAP)
    free = truth(batch, config)
    for name in ("nll", "mi", "consistency", "weights", "loss"):
        g, o, e = (getattr(r, name) for r in (got, own, exact))
        guesses = {"it is that of the logits without their cap": getattr(free, name)}
        compare(f"{name} (softcap)", g, o, e, partial(hint, g, guesses))
    grads = (got.gradients, own.gradients, exact.gradients)
    for name, g, o, e in zip(Needs._fields, *grads, strict=True):
        why: Callable[[], str] = str
        if config is PLAIN and name == "hidden" and g is not None:
            why = partial(_flat, g, exact, batch)
        compare(f"gradient of {name} (softcap)", g, o, e, why)


def _token_logp(backend: CompactBackend, b: RandomBatch) -> Tensor:
    out = backend.token_logp(b.hidden, b.weight, b.bias, b.layout.targets, False, SOFTCAP)
    return out[0].cpu()


def _flat(got: Tensor, exact: LossResult, batch: RandomBatch) -> str:
    """Whether the hidden gradient takes the cap for the identity."""
    wide, layout = in_float64(batch), batch.layout
    p = log_softmax(wide.hidden, wide.weight, wide.bias, SOFTCAP).exp()
    rows = layout.labelled.nonzero().squeeze(1)
    p[rows, layout.targets[rows]] -= 1
    scale = (exact.weights / layout.label_counts.clamp(min=1))[layout.token_sequence]
    scale = torch.where(layout.labelled, scale, 0.0) / layout.num_questions
    return hint(
        got, {"the cap's slope, 1 - (c / softcap)^2, is missing": p * scale[:, None] @ wide.weight}
    )
