"""Log-likelihoods at chosen positions of many sequences, without ever holding [T, V] logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compact_fast.loss import token_logp
from compact_fast.students import body_and_head, inference

Progress = Callable[[int, int], None]
"""Called with (done, total), in units of the measure's own items."""


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; every module's own mode restored afterwards."""
    with inference(model), torch.no_grad():
        yield


def model_device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first (what does not fit fails at once).

    A batch's padded area is at most `batch_tokens`, or it is one sequence.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens}: expected at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def logp_at(
    model: Any,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 16384,
    backend: Any = "auto",
    progress: Progress | None = None,
) -> list[Tensor]:
    """For every sequence: log p(targets[i] | tokens 0..positions[i]), nats, on the CPU.

    A position may occur several times with different targets. Sequences are padded on the right,
    which a causal student cannot see. Call it inside `evaluation_mode`.
    """
    for s, (ids, where, what) in enumerate(zip(sequences, positions, targets, strict=True)):
        if len(where) != len(what):
            raise ValueError(f"sequence {s}: {len(where)} positions but {len(what)} targets")
        if where and (min(where) < 0 or max(where) >= len(ids)):
            raise ValueError(
                f"sequence {s}: positions {min(where)} to {max(where)} of {len(ids)} tokens"
            )
    parts = body_and_head(model)
    device = model_device(model)
    out: list[Tensor] = [torch.zeros(0)] * len(sequences)
    done = 0
    for batch in batches_by_length([len(s) for s in sequences], batch_tokens):
        length = len(sequences[batch[0]])
        input_ids = torch.zeros(len(batch), length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, i in enumerate(batch):
            input_ids[row, : len(sequences[i])] = torch.as_tensor(sequences[i], dtype=torch.long)
            attention_mask[row, : len(sequences[i])] = 1
        flat = [row * length + p for row, i in enumerate(batch) for p in positions[i]]
        wanted = torch.tensor([t for i in batch for t in targets[i]], dtype=torch.long)
        hidden = parts.body(input_ids.to(device), attention_mask.to(device))
        rows = torch.tensor(flat, dtype=torch.long, device=device)
        hidden = hidden.reshape(-1, hidden.shape[-1])[rows]
        logp = token_logp(
            hidden,
            parts.weight,
            wanted.to(device),
            backend=backend,
            head_bias=parts.bias,
            softcap=parts.softcap,
        )
        pieces = torch.split_with_sizes(logp.cpu(), [len(targets[i]) for i in batch])
        for i, piece in zip(batch, pieces, strict=True):
            out[i] = piece
        done += len(batch)
        if progress is not None:
            progress(done, len(sequences))
    return out
