"""The logits GEMM of this device in other launch configurations, beside the vendor's plain product.

    python -m bench.gpu_tiles

Times the table's choice, what autotuning may choose, and the choice with other groups of row
tiles; rows go into bench/results/gpu_tiles.csv. What is quicker belongs into
triton_kernels/launch.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from compact_fast.triton_kernels import launch
from compact_fast.triton_kernels.launch import GemmConfig
from compact_fast.triton_kernels.logits_gemm import logits_exp, new_partials, padded_width
from compact_fast.triton_kernels.tuning import milliseconds

from bench.measure import print_table, write_csv

SHAPES = ((151_936, 896, 2816), (151_936, 1536, 2816), (49_152, 576, 8192), (128_256, 4096, 2816))
GROUPS = (8, 12, 16, 20, 24, 32)


def configurations(arch: str) -> Iterator[GemmConfig]:
    """The table's choice, its groups, and the candidates."""
    chosen = launch.LOGITS_GEMM[arch]
    yield chosen
    yield from (replace(chosen, group_m=g) for g in GROUPS if g != chosen.group_m)
    yield from launch.LOGITS_GEMM_CANDIDATES[arch]


def measure(vocab: int, width: int, rows: int) -> Iterator[dict[str, Any]]:
    """One row a configuration."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x, weight = normal(rows, width).bfloat16(), (4 * normal(vocab, width) / width**0.5).bfloat16()
    targets = torch.randint(0, vocab, (rows,), generator=generator, device="cuda")
    offset = (x.float() * weight[targets].float()).sum(1)
    exps = weight.new_empty(rows, padded_width(vocab))[:, :vocab]
    bare = milliseconds(lambda: torch.mm(x, weight.T, out=exps))
    for config in configurations(launch.architecture(x)):
        partials = new_partials(rows, weight, config, statistics=False)

        def run(config: GemmConfig = config, partials: Any = partials) -> None:
            logits_exp(x, weight, None, targets, offset, exps, partials, config, statistics=False)

        took = milliseconds(run)
        yield {
            "vocab": vocab,
            "width": width,
            "rows": rows,
            "tile": f"{config.block_m}x{config.block_n}x{config.block_k}",
            "warps": config.num_warps,
            "stages": config.num_stages,
            "group_m": config.group_m,
            "ms": took,
            "times_bare": took / bare,
        }


def main() -> int:
    """0: done; 2: no device."""
    if not torch.cuda.is_available():
        print("bench.gpu_tiles: no CUDA or ROCm device", file=sys.stderr)
        return 2
    rows = []
    for shape in SHAPES:
        found = list(measure(*shape))
        print_table(found)
        rows += found
    print(write_csv("gpu_tiles", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
