"""The `triton` backend: the fused pass on CUDA and ROCm devices.

Constructible everywhere: triton is imported when it is needed, and `can_run` says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from compact_fast.backends.assembly import TokenStatistics
from compact_fast.backends.protocol import ABI, Gradients, LossResult, Needs, RunSpec
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.transfer import send

# 3,500 rows of a 151,936-word vocabulary in bfloat16: the 2-4 thousand that a GPU needs to keep
# its matrix units busy in the head's gradient
CHUNK_BYTES = 1 << 30
HOLD_BYTES = 4 << 30

Tier = Literal["auto", "fused", "library"]


@dataclass(frozen=True)
class TritonBackend:
    """Log-likelihoods, scores, weights, loss and gradients in one pass over the logits.

    chunk_bytes: memory for exponentials held at once; chunks hold whole questions when the head is
        trained.
    hold_bytes: the same for one question that does not fit a chunk; beyond it, that question is
        passed over twice.
    tier: "fused": a GEMM with exp in its epilogue, for bfloat16; "library": the vendor's GEMM and
        a pass over each row; "auto": fused where it can run.

    Hidden states and head may differ in dtype: products are then float32.
    """

    chunk_bytes: int = CHUNK_BYTES
    hold_bytes: int = HOLD_BYTES
    tier: Tier = "auto"
    name: str = "triton"
    abi: int = ABI
    takes_host_layout: bool = True
    skips_blocks: bool = True
    caps_logits: bool = True

    def can_run(self, spec: RunSpec) -> bool | str:
        """True, or what is missing."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return (
            _device_refusal(spec.device, interpreted)
            or self._dtype_refusal(spec)
            or _toolchain_refusal(interpreted)
            or _product_refusal(spec)
            or True
        )

    def _dtype_refusal(self, spec: RunSpec) -> str | None:
        for name, dtype in (("hidden states", spec.dtype), ("the head", spec.weight_dtype)):
            if dtype not in (torch.bfloat16, torch.float16, torch.float32):
                return f"dtype {dtype} of {name} is none of bfloat16, float16, float32"
        if self.tier == "fused" and {spec.dtype, spec.weight_dtype} != {torch.bfloat16}:
            return (
                f"tier='fused' needs bfloat16; hidden states are {spec.dtype}, the head "
                f"{spec.weight_dtype}"
            )
        return None

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
        """See CompactBackend. With a layout on the CPU nothing waits for the device."""
        from compact_fast.backends.triton_pass import TritonPass
        from compact_fast.backends.triton_plan import make_plan
        from compact_fast.backends.triton_rows import DeviceHead
        from compact_fast.backends.triton_skip import SkippingProducts

        if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "compact_loss cannot be captured in a CUDA graph: how many rows it multiplies "
                "depends on the layout; capture the student alone"
            )
        hidden = hidden.detach()
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        with _device_of(hidden):
            head = DeviceHead.of(self, hidden, weight, bias, softcap)
            skipping = None
            if config.skip_below > 0:
                skipping = SkippingProducts.of(config.skip_below, head, layout.num_tokens)
            work = TritonPass(
                head=head,
                plan=make_plan(layout.to("cpu"), config, hidden.device, head.max_rows),
                consensus=None if consensus is None else consensus.contiguous(),
                attention=None if attention is None else attention.contiguous(),
                config=config,
                normalizer=normalizer,
                statistics=statistics,
                skipping=skipping,
            )
            return work.run(hidden, weight, bias, needs)

    def token_logp(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        statistics: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See CompactBackend. With targets on the CPU nothing waits for the device."""
        from compact_fast.backends.triton_rows import DeviceHead

        with _device_of(hidden):
            head = DeviceHead.of(self, hidden, weight, bias, softcap)
            there, labelled = _labelled(targets, hidden.device)
            stats = TokenStatistics.empty(there, torch.float32, full=statistics)
            for rows in head.chunks(labelled):
                x, y = head.take(hidden, rows), there[rows]
                stats.record(rows, head.measure(x, y, keep=False, statistics=statistics)[1])
        return stats.logp, stats.entropy, stats.correct

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
        """See CompactBackend; logits are made again, and nothing waits as in `token_logp`."""
        from compact_fast.backends.triton_rows import DeviceHead, GradientSums
        from compact_fast.triton_kernels.gradient_rows import clear_rows

        upstream = grad_logp.float()
        with _device_of(hidden):
            head = DeviceHead.of(self, hidden, weight, bias, softcap)
            there, labelled = _labelled(targets, hidden.device)
            unit = head.unit_on_device(upstream)
            grads = GradientSums.zeros(hidden, weight, bias, needs, unit)
            for rows in head.chunks(labelled):
                x, own = head.take(hidden, rows), upstream[rows]
                exps, out = head.measure(x, there[rows], keep=True, statistics=False)
                assert exps is not None
                factor = torch.where(own != 0, -own / out.total, 0.0)
                clear_rows(exps, factor, out.total)  # a row whose gradient nobody wants may be NaN
                head.add_gradients(grads, rows, x, exps, factor, add=False)
        return grads.finish(1.0, hidden, weight, bias)


def can_launch(device: torch.device) -> bool:
    """Whether Triton kernels run on a device, the CPU's interpreter left aside."""
    return _device_refusal(device, False) is None and _toolchain_refusal(False) is None


def _device_refusal(device: torch.device, interpreted: bool) -> str | None:
    if device.type != "cuda":
        if interpreted and device.type == "cpu":
            return None
        return f"no Triton kernels for device {device.type!r}; it needs CUDA or ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor} is below 8.0"
    return None


@cache
def _toolchain_refusal(interpreted: bool) -> str | None:
    """What Triton itself lacks: its launchers are compiled by the C compiler on first use."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install compact-fast[triton])"
    try:
        import triton

        if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
            return f"triton {triton.__version__} is too old; 3.4 or newer is needed"
    except Exception as error:  # whatever a broken installation raises, here it is a reason
        return f"triton cannot be imported: {error}"
    if not (interpreted or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc or clang, or name one in CC"
    return None


def _product_refusal(spec: RunSpec) -> str | None:
    from compact_fast.triton_kernels.products import library_is_wide

    dtype = torch.promote_types(spec.dtype, spec.weight_dtype)
    if dtype.itemsize == 2 and not library_is_wide(spec.device, dtype):
        return f"torch {torch.__version__} cannot multiply {dtype} into float32 on this device"
    return None


def _labelled(targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(targets, positions with a label) on the device; it is waited for if targets lie on it."""
    rows = (targets >= 0).nonzero().squeeze(1)
    if targets.device == device:
        return targets, rows
    sent = send({"targets": targets, "rows": rows}, device)
    return sent["targets"], sent["rows"]


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
