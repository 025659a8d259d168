"""One copy of a question's prompt, with all its rationales behind it, in one forward pass.

A token sees its own rationale up to itself and the prompt; positions count as in the separate
sequences, so the hidden states are theirs. A row is a question:

    prompt | rationale 1 | rationale 2 | ... | padding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compact_fast.students import body_and_head, causal_model, inference

PADDING = -1


def pack_shared(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Q questions as rows of N tokens.

    input_ids, position_ids, segments [Q, N] int64 (segment 0: prompt, k: rationale k - 1, PADDING)
    and gather [T] int64: where in input_ids.reshape(-1) each position of the packed layout lies,
    sequence by sequence; a prompt's places occur once for each of its rationales.
    """
    N = max(_length(row) for row in rows)
    ids = torch.full((len(rows), N), pad_id, dtype=torch.long)
    positions = torch.zeros((len(rows), N), dtype=torch.long)
    segments = torch.full((len(rows), N), PADDING, dtype=torch.long)
    gather: list[Tensor] = []
    for q, row in enumerate(rows):
        P = len(row["prompt_ids"])
        ids[q, :P] = torch.tensor(row["prompt_ids"], dtype=torch.long)
        positions[q, :P] = torch.arange(P)
        segments[q, :P] = 0
        start = P
        for k, completion in enumerate(row["completion_ids"]):
            end = start + len(completion)
            ids[q, start:end] = torch.tensor(completion, dtype=torch.long)
            positions[q, start:end] = torch.arange(P, P + len(completion))
            segments[q, start:end] = k + 1
            gather += [torch.arange(q * N, q * N + P), torch.arange(q * N + start, q * N + end)]
            start = end
    return {
        "input_ids": ids,
        "position_ids": positions,
        "segments": segments,
        "gather": torch.cat(gather),
    }


def shared_mask(segments: Tensor) -> Tensor:
    """segments [Q, N] -> [Q, 1, N, N] bool; True where the row's token may see the column's.

    Padding sees itself, as a row of nothing has no softmax.
    """
    rows, columns = segments[:, :, None], segments[:, None, :]
    N = segments.shape[1]
    causal = torch.ones((N, N), dtype=torch.bool, device=segments.device).tril()
    return (causal & ((columns == 0) | (columns == rows)))[:, None]


def is_cheaper(rows: Sequence[Mapping[str, Any]], width: int) -> bool:
    """Whether one row a question takes fewer operations than one padded row a rationale.

    Counts 24 D^2 operations a token and 4 D a pair of tokens in attention, for a body of width D;
    a plain causal mask lets kernels skip half of the pairs, this one none.
    """
    N = max(_length(row) for row in rows)
    S = sum(len(row["completion_ids"]) for row in rows)
    L = max(len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"])
    shared = len(rows) * (24 * width * N + 4 * N * N)
    return shared < S * (24 * width * L + 2 * L * L)


def _length(row: Mapping[str, Any]) -> int:
    return len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))


@torch.no_grad()
def refusal(model: Any) -> str | None:
    """Why a student cannot share prompts, or None when it can; tried on a few tokens."""
    causal = causal_model(model)
    config = causal.config.get_text_config()
    name = type(causal).__name__
    if config._attn_implementation != "sdpa":
        return f"{name} uses {config._attn_implementation} attention, which takes no mask of ours"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return f"{name} does not attend to all tokens in all layers"
    prompt, completions = [1, 2, 3], [[4, 5], [6, 1, 2]]
    row = {"prompt_ids": prompt, "completion_ids": completions}
    parts = body_and_head(model)
    device = parts.weight.device
    packed = {k: v.to(device) for k, v in pack_shared([row], 0).items()}
    with inference(causal):
        try:
            hidden = parts.body(
                packed["input_ids"],
                shared_mask(packed["segments"]),
                position_ids=packed["position_ids"],
            )
        except (TypeError, ValueError, RuntimeError) as error:
            return f"{name} takes no such mask: {str(error).splitlines()[0]}"
        together = hidden.reshape(-1, hidden.shape[-1])[packed["gather"]]
        apart = torch.cat(
            [
                parts.body(torch.tensor([prompt + completion], device=device))[0]
                for completion in completions
            ]
        )
    difference = float((together - apart).abs().max() / apart.abs().max().clamp(min=1e-6))
    if not difference < (1e-4 if apart.dtype == torch.float32 else 5e-2):
        return f"{name} makes other hidden states that way (relative difference {difference:.2g})"
    return None
