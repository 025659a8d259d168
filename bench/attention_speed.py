"""Attention by segments on a CPU, native and by torch: python -m bench.attention_speed

One layer's attention of a question's K rationales behind one prompt, in float32: the native call,
torch's operator for each segment, and SDPA with one mask over the row. By turns, forwards alone and
with the backward pass. Writes bench/results/attention_speed.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor

from bench.measure import interleaved, median, print_table, write_csv
from compact_fast.lean import attention
from compact_fast.trainer.packing import shared_mask

HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama 3.2 1B": (32, 8, 64), "Qwen2.5-7B": (28, 4, 128)}
TREES = {
    "short": (60, 40, 50, 60, 70),
    "GSM8K": (100, 150, 180, 200, 270),
    "long": (400, *[500] * 4),
}
VARIANTS = ("native", "torch, by segments", "SDPA, one mask")


def make(heads: int, kv_heads: int, width: int, tokens: int) -> list[Tensor]:
    """Queries, keys and values [1, heads, N, d], heads of a token together."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, tokens, n, width) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).transpose(1, 2).requires_grad_() for s in sizes]


def variants(
    tensors: list[Tensor], tree: tuple[int, ...], *, back: bool
) -> dict[str, Callable[[], Tensor]]:
    """Each way's result [1, N, heads, d]; with `back` its gradients, too."""
    part = torch.repeat_interleave(torch.arange(len(tree)), torch.tensor(tree))
    mask = shared_mask(part[None])

    def by_segments() -> Tensor:
        query, key, value = tensors
        return attention.attend(query, key, value, (tree,), None, None)

    def by_torch() -> Tensor:
        with patch.object(attention, "_native", lambda: None):
            return finished(by_segments())

    def masked() -> Tensor:
        query, key, value = tensors
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        )
        return finished(found.transpose(1, 2))

    def finished(out: Tensor) -> Tensor:
        if back:
            torch.autograd.grad(out.sum(), tensors)
        return out

    runs = (lambda: finished(by_segments()), by_torch, masked)
    return dict(zip(VARIANTS, runs, strict=True))


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    rows = []
    for student, sizes in HEADS.items():
        for lengths, tree in TREES.items():
            tensors = make(*sizes, sum(tree))
            for back in (False, True):
                runs = variants(tensors, tree, back=back)
                first, *others = (run() for run in runs.values())
                for other in others:
                    torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)
                found = interleaved(runs, rounds=rounds, warm_up=3)
                base = median(found["torch, by segments"])
                rows += [
                    {
                        "heads": student,
                        "lengths": lengths,
                        "tokens": sum(tree),
                        "back": back,
                        "variant": name,
                        "ms": round(1e3 * median(found[name]), 3),
                        "times_torch": round(median(found[name]) / base, 3),
                    }
                    for name in runs
                ]
    print_table(rows)
    print(write_csv("attention_speed", rows))


if __name__ == "__main__":
    main()
