"""Attention over one packed row, segment by segment: no padding, and no pair of strangers.

A row holds trees one behind another, each a prompt and the rationales behind it:

    prompt | rationale 1 | rationale 2 | prompt | rationale 1 | ...

A token sees its own prompt, and its own rationale up to itself. Each segment is one call of SDPA
over just these keys (on a GPU all segments are one call of its flash kernels), so that a row of N
tokens costs what its separate sequences cost, without the N x N pairs that a mask over the whole
row would have. The function stands in transformers' registry
of attention functions; a model that uses it behaves as with "sdpa" wherever no trees are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from compact_fast.lean.attention import Tree, attend, can_attend, segments
from compact_fast.lean.varlen import attend_by_flash
from compact_fast.students import causal_model

NAME = "compact_fast_segments"
_KNOWN = {
    *("dropout", "scaling", "is_causal", "sliding_window"),
    *("position_ids", "use_cache", "cache_position"),  # handed through, read by no attention
}
_seen_windows: ContextVar[list[int | None] | None] = ContextVar("seen_windows", default=None)
"""While a list: the sliding window of each call that had trees, for the trial of a student."""


def segment_attention(
    module: Any,
    query: Tensor,  # [1, heads, N, head_dim]
    key: Tensor,  # [1, kv_heads, N, head_dim]
    value: Tensor,  # [1, kv_heads, N, head_dim]
    attention_mask: Tensor | None,
    *,
    compact_trees: Sequence[Tree] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA, or with `compact_trees` SDPA of each segment; returns [1, N, heads, head_dim]."""
    if compact_trees is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    seen = _seen_windows.get()
    if seen is not None:
        seen.append(window)
    plain = kwargs.keys() <= _KNOWN and not kwargs.get("dropout")
    if plain and can_attend(query, key, value):
        return attend(query, key, value, compact_trees, window, kwargs.get("scaling")), None
    if plain:
        found = attend_by_flash(query, key, value, compact_trees, window, kwargs.get("scaling"))
        if found is not None:
            return found, None
    kwargs.pop("is_causal", None)
    out = []
    for s in segments(compact_trees):
        mask = s.mask(window, query.device)
        part = (query[:, :, s.own], s.of(key), s.of(value), mask)
        out.append(sdpa_attention_forward(module, *part, is_causal=mask is None, **kwargs)[0])
    return torch.cat(out, 1), None


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

NO_MASK = torch.ones((1, 1, 1, 1), dtype=torch.bool)
"""Given with trees: four-dimensional, so that the model makes no mask of its own; never read."""


def attends_by_segments(model: Any) -> bool:
    """Whether the model's attention heeds trees."""
    return bool(causal_model(model).config.get_text_config()._attn_implementation == NAME)


def attend_by_segments(model: Any) -> None:
    """From now on the model's attention heeds trees; without them nothing changes."""
    if not attends_by_segments(model):
        causal_model(model).set_attn_implementation(NAME)


@contextmanager
def attending_by_segments(model: Any) -> Iterator[None]:
    """Inside, the model's attention heeds trees."""
    causal = causal_model(model)
    before = causal.config.get_text_config()._attn_implementation
    attend_by_segments(model)
    try:
        yield
    finally:
        if before != NAME:
            causal.set_attn_implementation(before)


@contextmanager
def recording_windows() -> Iterator[list[int | None]]:
    """Inside, the list yielded collects the sliding window of every call that has trees."""
    found: list[int | None] = []
    token = _seen_windows.set(found)
    try:
        yield found
    finally:
        _seen_windows.reset(token)
