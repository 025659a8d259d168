"""Attention by segments on a GPU: one call of torch's flash kernels for a whole packed row.

Each segment of a row (a prompt, or a rationale behind it) is a sequence of its own to the kernel:
its queries are the segment, its keys the prompt and the segment, causal from the end. Nothing is
padded, no pair of strangers is computed, and grouped heads are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compact_fast.lean.attention import Tree, segments
from compact_fast.transfer import send


@dataclass(frozen=True)
class Lengths:
    """Where the segments of a row of N tokens find their keys; tensors on the device."""

    keys: Tensor  # [M] int64; the row's places, segment by segment: its prompt's, then its own
    roots: Tensor  # [R] int64; the places of the prompts that rationales see
    copies: Tensor  # [R, most] int64; where in `keys` each of them stands; M: nowhere
    own: Tensor  # [N] int64; where in `keys` each token stands in its own segment
    cu_queries: Tensor  # [segments + 1] int32
    cu_keys: Tensor  # [segments + 1] int32
    most_queries: int
    most_keys: int


@lru_cache(maxsize=4)
def lengths_of(trees: tuple[Tree, ...], device: torch.device) -> Lengths:
    """Made once for all layers of a pass; the host does not wait for the device."""
    keys: list[range] = []
    own: list[range] = []
    starts: dict[range, list[int]] = {}  # a prompt: where in `keys` its copies begin
    queries_at, keys_at = [0], [0]
    for s in segments(trees):
        at, root = keys_at[-1], range(s.root.start, s.root.stop)
        if root:
            starts.setdefault(root, []).append(at)
        keys += [root, range(s.own.start, s.own.stop)]
        own.append(range(at + len(root), at + s.sees))
        queries_at.append(s.own.stop)
        keys_at.append(at + s.sees)
    most, nowhere = max(map(len, starts.values()), default=0), keys_at[-1]
    copies = np.full((sum(map(len, starts)), most), nowhere, dtype=np.int64)
    row = 0
    for root, places in starts.items():
        for k, at in enumerate(places):
            copies[row : row + len(root), k] = np.arange(at, at + len(root))
        row += len(root)
    host = {
        "keys": _joined(keys),
        "roots": _joined(list(starts)),
        "copies": torch.from_numpy(copies),
        "own": _joined(own),
        "cu_queries": torch.tensor(queries_at, dtype=torch.int32),
        "cu_keys": torch.tensor(keys_at, dtype=torch.int32),
    }
    return Lengths(
        **send(host, device),
        most_queries=int(np.diff(queries_at).max()),
        most_keys=int(np.diff(keys_at).max()),
    )


def _joined(parts: Sequence[range]) -> Tensor:
    arrays = [np.arange(p.start, p.stop, dtype=np.int64) for p in parts]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *arrays]))


def flash_takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has flash kernels for queries of this dtype on this device."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if not (torch.cuda.is_available() and hasattr(torch.ops.aten, "_flash_attention_forward")):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def attend_by_flash(
    query: Tensor,  # [1, heads, N, d]
    key: Tensor,  # [1, kv_heads, N, d]
    value: Tensor,  # [1, kv_heads, N, d]
    trees: Sequence[Tree],
    window: int | None,
    scale: float | None,
) -> Tensor | None:  # [1, N, heads, d]
    """Attention of each segment over what it sees; None where the kernels do not take it.

    `window`: of so many tokens at most.
    """
    device, dtype = query.device, query.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    head = query.shape[-1]
    if head > 256 or head % 8 or not key.shape[-1] == value.shape[-1] == head:
        return None
    if torch.compiler.is_compiling() or not flash_takes(device, dtype):
        return None
    places = lengths_of(tuple(trees), device)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [N, heads, d]
    k, v = (_Spread.apply(x, places) for x in (k, v))  # type: ignore[no-untyped-call]
    return _flash(q, k, v, places, window, scale)[None]


def _flash(
    query: Tensor,  # [N, heads, d]
    key: Tensor,  # [M, kv_heads, d]
    value: Tensor,  # [M, kv_heads, d]
    places: Lengths,
    window: int | None,
    scale: float | None,
) -> Tensor:  # [N, heads, d]
    """Causal attention of every segment, whose last query sees its last key."""
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, places.cu_queries, places.cu_keys,
        places.most_queries, places.most_keys, 0.0, True, False, scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]  # fmt: skip
    return out


class _Spread(torch.autograd.Function):
    """Rows of keys or values to where the segments read them; a prompt's once for each reader.

    Their gradients come together in float32 and in one order, which index_add would not promise.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Lengths) -> Tensor:
        ctx.places = places
        return x.index_select(0, places.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        places: Lengths = ctx.places
        out = grad.index_select(0, places.own)
        if places.roots.numel():
            nowhere = grad.new_zeros((1, *grad.shape[1:]))
            read = torch.cat([grad, nowhere])[places.copies].sum(1, dtype=torch.float32)
            total = out.index_select(0, places.roots).float() + read
            out.index_copy_(0, places.roots, total.to(out.dtype))
        return out, None
