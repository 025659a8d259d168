"""Launch configurations by architecture, each with the reason for it.

Every number was checked by ahead-of-time compilation (registers, spills, shared memory). Those of
sm_90 were chosen by timing on an H200 (docs/gpu.md); the others were never timed.

GEMM tiles: M are rows (tokens), N the vocabulary, K the hidden width. The tiles that run at one
time read the fewest bytes where they cover a square of rows and words: `group_m` row tiles and as
many vocabulary tiles as make up the device's multiprocessors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Written into every launch: Triton 3.10 changes the default. Fusing a * b + c saves an instruction
# a logit in the GEMM's epilogue; where kernels promise the rounding of the plain formula it is off.
FUSED = {"enable_fp_fusion": True}
UNFUSED = {"enable_fp_fusion": False}

SHARED_MEMORY_LIMIT = {  # bytes a block may use
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
}


@dataclass(frozen=True)
class GemmConfig:
    """One launch configuration of the logits GEMM."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool  # tensor descriptors and a persistent grid; else pointers, one program a tile
    group_m: int  # row tiles, at most, that share each vocabulary tile before the next one
    why: str


LOGITS_GEMM = {
    "sm_80": GemmConfig(
        128, 128, 64, 8, 3, False, 10,
        "two of three stages live in shared memory, 64 KB: fits the 99 KB of sm_86, sm_89 and "
        "sm_120 too; a vocabulary tile of 256 spills once entropy is asked for",
    ),
    "sm_90": GemmConfig(
        128, 256, 64, 8, 3, True, 16,
        "two warp groups of 64 x 256; a fourth stage does not fit beside the 64 KB from which E "
        "is copied out, and with pointers in place of descriptors this tile spills",
    ),
    "sm_100": GemmConfig(
        128, 128, 64, 8, 4, True, 12,
        "a 128 x 128 accumulator in tensor memory; 128 x 256 spills while it is read back",
    ),
    "gfx942": GemmConfig(
        128, 128, 64, 4, 2, False, 16,
        "one stage of 32 KB out of 64 KB local memory, so that two groups share a compute unit",
    ),
    "interpreter": GemmConfig(
        32, 64, 32, 1, 1, False, 2, "small, so that ragged test sizes still make several tiles"
    ),
}  # fmt: skip

# With entropy, a bias or a cap the epilogue needs more registers: where the tile above would spill.
LOGITS_GEMM_WIDE_EPILOGUE = {
    "sm_90": GemmConfig(
        128, 128, 64, 8, 4, True, 12,
        "half the accumulators, and room for the second sum beside them",
    ),
}  # fmt: skip

# What autotuning tries beside the table's own choice; all of them compile without spills.
LOGITS_GEMM_CANDIDATES = {
    "sm_80": (
        GemmConfig(128, 128, 32, 8, 4, False, 10, "shorter steps, more of them under way"),
        GemmConfig(64, 128, 64, 4, 3, False, 14, "more programs for a chunk of few rows"),
    ),
    "sm_90": (
        GemmConfig(128, 128, 64, 8, 4, True, 12, "smaller tiles, a deeper pipeline"),
        GemmConfig(64, 256, 64, 8, 3, True, 23, "more programs for a chunk of few rows"),
    ),
    "sm_100": (
        GemmConfig(128, 64, 64, 8, 4, True, 8, "a narrower epilogue; with four warps it spills"),
    ),
    "gfx942": (
        GemmConfig(128, 128, 64, 8, 2, False, 16, "half the accumulator a wave"),
        GemmConfig(64, 128, 64, 4, 2, False, 24, "more programs for a chunk of few rows"),
    ),
    "interpreter": (GemmConfig(16, 32, 32, 1, 1, False, 3, "for the tests of the choice"),),
}  # fmt: skip


@dataclass(frozen=True)
class ProductConfig:
    """One launch configuration of the products over kept columns."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    why: str


KEPT_PRODUCT = {
    "sm_80": ProductConfig(
        128, 128, 32, 8, 3,
        "a gathered tile of 32 rows is 8 KB: with all stages 24 KB, so that registers, not shared "
        "memory, bound how many groups a multiprocessor takes",
    ),
    "sm_90": ProductConfig(
        128, 128, 64, 8, 3,
        "two warp groups of 64 x 128; a bulk copy cannot gather, so the loads are pointers, which "
        "spill with 256 columns",
    ),
    "sm_100": ProductConfig(
        128, 128, 64, 8, 3, "as sm_90: gathered loads, and an accumulator in tensor memory",
    ),
    "gfx942": ProductConfig(
        128, 128, 32, 8, 2, "32 KB of local memory with both operands, two groups a compute unit",
    ),
    "interpreter": ProductConfig(32, 32, 32, 1, 1, "small, so that test sizes make several tiles"),
}  # fmt: skip

# float32 has no matrix units here: each product is a multiplication by a thread, whose operands
# take registers twice over
KEPT_PRODUCT_FLOAT32 = ProductConfig(
    64, 64, 16, 8, 2, "16 sums a thread; with tiles of 128 the head's product spills on sm_80"
)

_assumed: list[str] = []


@contextmanager
def assume(arch: str) -> Iterator[None]:
    """Launch as for this architecture, whatever device the tensors are on (for compiling only)."""
    _assumed.append(arch)
    try:
        yield
    finally:
        _assumed.pop()


def architecture(tensor: Tensor) -> str:
    """The key of the tables above that fits the tensor's device."""
    if _assumed:
        return _assumed[-1]
    if not tensor.is_cuda:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def gemm_config(x: Tensor, *, statistics: bool, bias: bool, softcap: float = 0.0) -> GemmConfig:
    """The logits GEMM's configuration on the device of `x`."""
    arch = architecture(x)
    wide = LOGITS_GEMM_WIDE_EPILOGUE if statistics or bias or softcap else {}
    return wide.get(arch, LOGITS_GEMM[arch])


def product_config(x: Tensor) -> ProductConfig:
    """The configuration of the products over kept columns on the device of `x`."""
    arch = architecture(x)
    wide = x.dtype == torch.float32 and arch != "interpreter"
    return KEPT_PRODUCT_FLOAT32 if wide else KEPT_PRODUCT[arch]


def num_processors(tensor: Tensor) -> int:
    """Multiprocessors of the device: the size of a persistent grid."""
    if not tensor.is_cuda:
        return 132
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
