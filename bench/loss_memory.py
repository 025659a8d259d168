"""Peak memory of the loss part of a training step, beyond its inputs.

    python -m bench.loss_memory            # all cases, writes bench/results/loss_memory.csv

Each case runs in a process of its own and reports how far its resident memory rose at the peak:
logits, gradients of hidden states (and of the head, where it is trained), and what the maths
library keeps for itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from bench.measure import in_fresh_process, print_table, write_csv

CASES: list[dict[str, Any]] = [
    {"T": 4096, "V": 49152, "D": 576, "K": 4, "questions": 4, "head": head, "backend": backend}
    for head in ("frozen", "trained")
    for backend in ("torch", "reference")
] + [
    {"T": 1024, "V": 49152, "D": 576, "K": 4, "questions": q, "head": head, "backend": "torch"}
    for head in ("frozen", "trained")
    for q in (4, 8)
]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process, after the same call on a tiny batch."""
    import torch

    from compact_fast.benchmark.memory import rise_mb

    tiny = {**case, "T": 256, "V": 1000, "D": 32}
    step(tiny)()
    return {"peak_extra_mb": round(rise_mb(step(case), torch.device("cpu")), 1)}


def step(case: dict[str, Any]) -> Callable[[], None]:
    """The loss and its backward pass, with the inputs made."""
    import torch

    from compact_fast import TokenLayout, compact_loss

    gen = torch.Generator().manual_seed(0)
    T, V, D = case["T"], case["V"], case["D"]
    S = case["K"] * case["questions"]
    ends = torch.arange(1, S + 1) * (T // S)
    layout = TokenLayout(
        targets=torch.randint(0, V, (T,), generator=gen),
        cu_seqlens=torch.arange(S + 1) * (T // S),
        cu_teachers=torch.arange(case["questions"] + 1) * case["K"],
        gold_ids=torch.randint(0, V, (2 * case["questions"],), generator=gen),
        cu_gold=torch.arange(case["questions"] + 1) * 2,
        answer_spans=torch.stack([ends - 3, ends], 1),
    )
    hidden = torch.randn(T, D, generator=gen).requires_grad_()
    weight = torch.randn(V, D, generator=gen).mul_(0.05).requires_grad_(case["head"] == "trained")
    consensus = 0.9 + torch.rand(S, generator=gen) / 10  # nobody is filtered out

    def run() -> None:
        out = compact_loss(hidden, weight, layout, consensus=consensus, backend=case["backend"])
        out.loss.backward()

    return run


def main() -> None:
    """Measure every case and keep the results."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
        return
    rows = []
    for case in CASES:
        found = in_fresh_process("bench.loss_memory", case)
        rows.append({**case, **found, "logits_mb": round(case["T"] * case["V"] * 4 / 1e6)})
    print_table(rows)
    print(write_csv("loss_memory", rows))


if __name__ == "__main__":
    main()
