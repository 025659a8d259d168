"""For those who write backends: random batches, and a judge of a whole backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends import CompactBackend, get_backend
from compact_fast.layout import IGNORE, TokenLayout


@dataclass(frozen=True)
class RandomBatch:
    """Arguments of one call of `compact_loss`."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    layout: TokenLayout
    consensus: Tensor  # [S]
    attention: Tensor  # [S]


def random_batch(
    teachers: Sequence[int] = (3, 1, 4, 2),
    *,
    vocab: int = 97,
    width: int = 16,
    longest: int = 14,
    scale: float = 0.5,
    dtype: torch.dtype = torch.float64,
    unlabelled: bool = True,
    seed: int = 0,
) -> RandomBatch:
    """A packed batch with `teachers[q]` rationales for question q.

    Every sequence has 1-2 prompt positions, then labels up to its last position; about one in
    three never states the gold answer; with `unlabelled`, one in six has no label at all.
    `scale` is the standard deviation of the head's entries.
    """
    gen = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=gen))

    targets, spans, lengths, start = [], [], [], 0
    for s in range(sum(teachers)):
        length = draw(5, max(6, longest))
        row = torch.randint(0, vocab, (length,), generator=gen)
        empty = bool(s) and draw(0, 6) == 0 and unlabelled
        prompt = length if empty else draw(1, 3)
        row[:prompt] = IGNORE
        row[-1] = IGNORE
        stated = draw(0, 3) if prompt < length else 0
        spans.append([start + prompt, start + prompt + stated] if stated else [0, 0])
        targets.append(row)
        lengths.append(length)
        start += length
    gold = [draw(1, 4) for _ in teachers]
    S, Q, T = sum(teachers), len(teachers), start
    layout = TokenLayout(
        targets=torch.cat(targets),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        cu_teachers=torch.tensor([0, *teachers]).cumsum(0),
        thinking=torch.rand(T, generator=gen) < 0.2,
        gold_ids=torch.randint(0, vocab, (sum(gold),), generator=gen),
        cu_gold=torch.tensor([0, *gold]).cumsum(0),
        answer_spans=torch.tensor(spans),
        prior_logp=-5 * torch.rand(Q, generator=gen, dtype=torch.float64),
        question_ids=torch.arange(Q) + 7,
        correct=torch.randint(-1, 2, (S,), generator=gen),
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    return RandomBatch(
        hidden=normal(T, width),
        weight=(normal(vocab, width) * scale).to(dtype),
        bias=normal(vocab),
        layout=layout,
        consensus=torch.rand(S, generator=gen, dtype=torch.float64).to(dtype),
        attention=torch.rand(S, generator=gen, dtype=torch.float64).to(dtype),
    )


def check_backend(backend: str | CompactBackend, device: str = "cpu") -> None:
    """Judge a backend by every conformance check.

    Raises AssertionError that lists what is wrong, one line a failed check; ValueError if the
    backend cannot run on `device` at all.
    """
    from compact_fast.conformance.checks import CHECKS
    from compact_fast.conformance.judge import Subject

    subject = Subject(get_backend(backend), torch.device(device))
    verdict = subject.can_run(torch.float32)
    if verdict is not True:
        raise ValueError(f"backend {subject.backend.name!r} cannot run on {device}: {verdict}")
    faults = []
    for check in CHECKS:
        try:
            check(subject)
        except AssertionError as fault:
            faults.append(f"{check.__name__.removeprefix('check_')}: {fault}")
    if faults:
        raise AssertionError(f"backend {subject.backend.name!r} is wrong:\n" + "\n".join(faults))
