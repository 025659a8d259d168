"""How the rationales of whole questions become the input of one forward pass.

    segments   one row without padding, the prompt of a question once for all its rationales (or,
               not shared, every rationale behind a copy of its own); attention by segments
    mask       a row a question, prompt once, padded to the longest question; a mask keeps the
               rationales apart. For students whose attention takes a mask but no segments
    padded     a row a rationale, padded to the longest

A token sees its own rationale up to itself and the prompt; positions count as in the separate
sequences, so the hidden states are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compact_fast.data.collate import int_tensor
from compact_fast.lean.varlen import flash_refusal
from compact_fast.students import body_and_head, causal_model, inference
from compact_fast.tables import counted
from compact_fast.trainer.batching import Ints
from compact_fast.trainer.segments import (
    NO_MASK,
    attending_by_segments,
    attends_by_segments,
    recording_windows,
)

PADDING = -1
Kind = Literal["segments", "mask", "padded"]


@dataclass(frozen=True)
class Packing:
    """What a student's forward passes look like, and why not better."""

    kind: Kind = "padded"
    shared: bool = False
    """Whether the prompt is read once for all rationales of a question."""

    reason: str | None = None
    """Why prompts are not shared, or why they are shared through a mask; None: nothing to say."""

    width: int = 0
    """Hidden width of the body, for what costs less."""

    def sizes(
        self, prompt: Ints, completions: Ints, longest: Ints, count: Ints
    ) -> tuple[Ints, Ints | None]:
        """What questions take in a pass: tokens, or where they are padded length and rows; [n].

        Given are the lengths of prompts, the sums and the longest of the completions, and how many.
        """
        if self.kind == "segments":
            return (prompt if self.shared else prompt * count) + completions, None
        if self.kind == "mask":
            return prompt + completions, np.ones_like(count)
        return prompt + longest, count

    def positions(self, prompt: Ints, completions: Ints, longest: Ints, count: Ints) -> Ints:
        """Tokens the body reads for each question alone in its pass, padding included, [n].

        Given is what `sizes` takes.
        """
        sizes, rows = self.sizes(prompt, completions, longest, count)
        read = sizes if rows is None else sizes * rows
        if self.kind != "mask":
            return read
        length = prompt + longest
        masked = _operations(sizes, self.width, 4)
        return np.where(masked < count * _operations(length, self.width, 2), read, length * count)

    def describe(self, rows: int, tokens: int, saved: int) -> str:
        """One line for people: what is read, and what sharing saves."""
        if self.shared:
            share = saved / max(tokens, 1)
            how = "" if self.kind == "segments" else f", through a mask ({self.reason})"
            return (
                f"prompts read once for all rationales of a question{how}: {saved:,} of {tokens:,} "
                f"tokens of {counted(rows, 'question')} saved ({share:.1%})"
            )
        form = "packed without padding" if self.kind == "segments" else "padded"
        return f"every rationale read behind its own prompt, {form} ({self.reason})"


def choose_packing(
    model: Any,
    *,
    share: bool = True,
    keep_padding: bool = False,
    masked: str | None = None,
    autocast: torch.dtype | None = None,
) -> Packing:
    """The packing that suits a student best, tried on a few tokens.

    `share` false: prompts are not shared. `keep_padding`: the loss reads padding, as
    mode="reference" does. `masked`: why a mask is wanted rather than segments, if it is.
    `autocast`: the dtype that training computes in, if not that of the weights.
    """
    width = body_and_head(model).weight.shape[1]
    if keep_padding:
        return Packing(reason="mode='reference' reads padding", width=width)
    if masked is not None and share and _refusal(model, "mask", autocast=autocast) is None:
        return Packing("mask", shared=True, reason=masked, width=width)
    refused = _refusal(model, "segments", share=share, autocast=autocast)
    if refused is None:
        reason = None if share else "share_prompts is off"
        return Packing("segments", shared=share, reason=reason, width=width)
    if share and _refusal(model, "mask", autocast=autocast) is None:
        return Packing("mask", shared=True, reason=refused, width=width)
    return Packing(reason=refused, width=width)


def packing_on(
    model: Any,
    device: torch.device,
    *,
    share: bool = True,
    keep_padding: bool = False,
    compiled: bool = False,
    autocast: torch.dtype | None = None,
) -> Packing:
    """The packing for a device: segments where its attention has kernels for them.

    `compiled`: the body will be. The rest is as in `choose_packing`.
    """
    dtype = autocast or body_and_head(model).weight.dtype
    return choose_packing(
        model,
        share=share,
        keep_padding=keep_padding,
        masked=mask_wanted(device, dtype, compiled=compiled),
        autocast=autocast,
    )


def refusal(model: Any) -> str | None:
    """Why a student cannot share prompts, or None when it can."""
    packing = choose_packing(model)
    return None if packing.shared else packing.reason


def mask_wanted(
    device: torch.device, dtype: torch.dtype = torch.float32, *, compiled: bool = False
) -> str | None:
    """Why one masked call a layer suits better than segments, if it does; dtype: of attention."""
    if compiled:
        return "a compiled body wants shapes that do not change"
    return None if device.type == "cpu" else flash_refusal(device, dtype)


def pack_segments(rows: Sequence[Mapping[str, Any]], *, shared: bool = True) -> dict[str, Any]:
    """Questions as one row of N tokens without padding.

    input_ids, position_ids [1, N] int64; trees, the lengths that `segment_attention` takes; gather
    [T] int64: where in the row each position of the packed layout lies, sequence by sequence; a
    shared prompt's places occur once for each of its rationales.
    """
    ids: list[int] = []
    positions: list[int] = []
    trees: list[tuple[int, ...]] = []
    gather: list[int] = []
    for row in rows:
        prompt, completions = list(row["prompt_ids"]), row["completion_ids"]
        P, root = len(prompt), len(ids)
        if shared:
            trees.append((P, *map(len, completions)))
            ids += prompt
            positions += range(P)
        for completion in completions:
            if not shared:
                trees.append((P + len(completion),))
                root = len(ids)
                ids += prompt
                positions += range(P)
            gather += range(root, root + P)
            gather += range(len(ids), len(ids) + len(completion))
            ids += completion
            positions += range(P, P + len(completion))
    return {
        "input_ids": int_tensor(ids)[None],
        "position_ids": int_tensor(positions)[None],
        "trees": tuple(trees),
        "gather": int_tensor(gather),
    }


def read_segments(
    body: Callable[..., Tensor], packed: Mapping[str, Any], device: torch.device
) -> Tensor:  # [1, N, D]
    """Hidden states of what `pack_segments` made, of a body whose attention heeds trees."""
    return body(
        packed["input_ids"].to(device),
        NO_MASK,
        position_ids=packed["position_ids"].to(device),
        compact_trees=packed["trees"],
    )


def pack_shared(
    rows: Sequence[Mapping[str, Any]], pad_id: int, *, multiple: int = 1
) -> dict[str, Tensor]:
    """Q questions as rows of N tokens, N a multiple of `multiple`.

    input_ids, position_ids, segments [Q, N] int64 (segment 0: prompt, k: rationale k - 1, PADDING)
    and gather [T] int64: where in input_ids.reshape(-1) each position of the packed layout lies,
    sequence by sequence; a prompt's places occur once for each of its rationales.
    """
    N = -(-max(_length(row) for row in rows) // multiple) * multiple
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
    """Whether one masked row a question takes fewer operations than one padded row a rationale.

    Counts 24 D^2 operations a token and 4 D a pair of tokens in attention, for a body of width D;
    a plain causal mask lets kernels skip half of the pairs, this one none.
    """
    N = max(_length(row) for row in rows)
    S = sum(len(row["completion_ids"]) for row in rows)
    L = max(len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"])
    return bool(len(rows) * _operations(N, width, 4) < S * _operations(L, width, 2))


def _operations(length: Any, width: int, pairs: int) -> Any:
    """Operations of a row, over the width and a constant; `pairs` for each pair of tokens."""
    return 24 * width * length + pairs * length * length


def _length(row: Mapping[str, Any]) -> int:
    return len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))


# ---- trials ----------------------------------------------------------------------------------

_TRIAL: dict[str, Any] = {"prompt_ids": [1, 2, 3], "completion_ids": [[4, 5], [6, 1, 2]]}


@torch.no_grad()
def _refusal(
    model: Any, kind: Kind, *, share: bool = True, autocast: torch.dtype | None = None
) -> str | None:
    """Why a student cannot take a packing, or None when it can; tried on a few tokens."""
    causal = causal_model(model)
    config = causal.config.get_text_config()
    name = type(causal).__name__
    attention = config._attn_implementation
    if attention != "sdpa" and not attends_by_segments(model):
        return f"{name} uses {attention} attention, which takes no mask of ours"
    if kind == "segments" and not causal._can_set_attn_implementation():
        return f"{name} has an attention of its own, which takes no function of ours"
    windows = _windows(config)
    if windows is None or (kind == "mask" and any(windows)):
        return f"{name} does not attend to all tokens in all layers"
    parts = body_and_head(model)
    device = parts.weight.device
    computing = torch.autocast(device.type, autocast, enabled=autocast is not None)
    with inference(causal), computing:
        try:
            if kind == "segments":
                packed = pack_segments([_TRIAL], shared=share)
                with attending_by_segments(model), recording_windows() as seen:
                    hidden = read_segments(parts.body, packed, device)
                if [w for w in seen if w] != [w for w in windows if w]:
                    return f"{name} does not hand its sliding windows to its attention function"
            else:
                packed = {k: v.to(device) for k, v in pack_shared([_TRIAL], 0).items()}
                mask, positions = shared_mask(packed["segments"]), packed["position_ids"]
                hidden = parts.body(packed["input_ids"], mask, position_ids=positions)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            return f"{name} takes no {kind}: {str(error).splitlines()[0]}"
        together = hidden.reshape(-1, hidden.shape[-1])[packed["gather"].to(device)]
        prompt = _TRIAL["prompt_ids"]
        apart = torch.cat(
            [
                parts.body(torch.tensor([prompt + completion], device=device))[0]
                for completion in _TRIAL["completion_ids"]
            ]
        )
    difference = float((together - apart).abs().max() / apart.abs().max().clamp(min=1e-6))
    # Rounding alone makes 1e-4 in SmolLM2's 30 layers; rationales that see each other make 0.7.
    wide = (autocast or apart.dtype).itemsize > 2
    if not difference < (2e-3 if wide else 5e-2):
        return f"{name} makes other hidden states that way (relative difference {difference:.2g})"
    return None


def _windows(config: Any) -> list[int | None] | None:
    """Each layer's sliding window, None where it has none; None in all for other kinds."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return None
    return [window if kind == "sliding_attention" else None for kind in kinds]
