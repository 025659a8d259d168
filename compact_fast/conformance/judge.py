"""What the checks share: running a backend, the truth in float64, and the tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import compact_fast.ops  # noqa: F401 (the operators that a backend may call)
from compact_fast.backends.protocol import CompactBackend, LossResult, Needs, RunSpec
from compact_fast.backends.reference_backend import ReferenceBackend
from compact_fast.config import CompactConfig
from compact_fast.testing import RandomBatch

REFERENCE = ReferenceBackend()
ALL = Needs(True, True, True)
# Sums of a few hundred terms in another order than the reference's: a few units in the last place
FLOOR_ULPS = 16


class Fault(AssertionError):
    """A backend is wrong; the message says how."""


@dataclass(frozen=True)
class Subject:
    """A backend on a device, as the checks see it."""

    backend: CompactBackend
    device: torch.device

    def can_run(
        self,
        dtype: torch.dtype,
        vocab: int = 97,
        width: int = 16,
        head_dtype: torch.dtype | None = None,
    ) -> bool | str:
        spec = RunSpec(self.device, dtype, vocab, width, True, head_dtype)
        return self.backend.can_run(spec)

    def run(
        self,
        batch: RandomBatch,
        config: CompactConfig,
        *,
        needs: Needs = ALL,
        normalizer: float | None = None,
        statistics: bool = False,
        softcap: float = 0.0,
    ) -> LossResult:
        """The backend's answer, on the CPU."""
        there = on_device(batch, self.device)
        return to_cpu(call(self.backend, there, config, needs, normalizer, statistics, softcap))


def call(
    backend: CompactBackend,
    batch: RandomBatch,
    config: CompactConfig,
    needs: Needs = ALL,
    normalizer: float | None = None,
    statistics: bool = False,
    softcap: float = 0.0,
) -> LossResult:
    """One call of a backend's `score_and_loss`."""
    return backend.score_and_loss(
        batch.hidden,
        batch.weight,
        batch.bias,
        batch.layout,
        batch.consensus,
        batch.attention,
        config,
        normalizer,
        needs,
        statistics,
        *((softcap,) if softcap else ()),
    )


def on_device(batch: RandomBatch, device: torch.device) -> RandomBatch:
    """The same batch elsewhere."""
    return RandomBatch(
        **{
            name: getattr(batch, name).to(device)
            for name in ("hidden", "weight", "bias", "layout", "consensus", "attention")
        }
    )


def to_cpu(result: LossResult) -> LossResult:
    """The same result on the CPU."""
    moved: dict[str, Any] = {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in result._asdict().items()
    }
    moved["gradients"] = type(result.gradients)(
        *(None if g is None else g.cpu() for g in result.gradients)
    )
    return LossResult(**moved)


def in_float64(batch: RandomBatch) -> RandomBatch:
    """The very same numbers, wide."""
    names = ("hidden", "weight", "bias", "consensus", "attention")
    return replace(batch, **{n: getattr(batch, n).double() for n in names})


def truth(batch: RandomBatch, config: CompactConfig, softcap: float = 0.0) -> LossResult:
    """The reference in float64."""
    return call(REFERENCE, in_float64(batch), config, statistics=True, softcap=softcap)


def allowed(own: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """Largest error that passes: twice the reference's own in the same dtype, plus a floor of a
    few units in the last place of the result's dtype."""
    eps = torch.finfo(dtype).eps
    error = (own.double() - exact).nan_to_num().abs().max()
    return float(2 * error + FLOOR_ULPS * eps * exact.nan_to_num().abs().max() + 1e-30)


def compare(
    what: str,
    got: Tensor | None,
    own: Tensor | None,
    exact: Tensor | None,
    hint: Callable[[], str] = str,
) -> None:
    """Raise Fault unless `got` is as near to `exact` as the reference in the same dtype is.

    hint: says what may have gone wrong, when something has.
    """
    assert own is not None
    assert exact is not None
    if got is None:
        raise Fault(f"{what}: missing")
    if got.shape != exact.shape:
        raise Fault(f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    if not torch.equal(got.isnan(), exact.isnan()):
        raise Fault(_with(hint, f"{what}: NaN in other places than the reference"))
    error = (got.double() - exact).nan_to_num().abs()
    limit = allowed(own, exact, got.dtype)
    if error.numel() and float(error.max()) > limit:
        at = int(error.argmax())
        found, right = (t.reshape(-1)[at].item() for t in (got, exact))
        text = f"{what}[{at}]: {found:.8g}, expected {right:.8g} within {limit:.1e}"
        raise Fault(_with(hint, text))


def _with(hint: Callable[[], str], text: str) -> str:
    why = hint()
    return f"{text}; {why}" if why else text


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether a guess about what went wrong fits."""
    return bool(
        a.shape == b.shape
        and torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    )
