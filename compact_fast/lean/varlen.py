"""Attention by segments on a GPU: one call of torch's flash kernels for a whole packed row.

Each segment of a row (a prompt, or a rationale behind it) is a sequence of its own to the kernel:
its queries are the segment, its keys the prompt and the segment, causal from the end. Nothing is
padded, no pair of strangers is computed, and grouped heads are not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

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
    # what was made while scoring may serve a pass that autograd records
    with torch.inference_mode(False):
        there = send(host, device)
    return Lengths(
        **there,
        most_queries=int(np.diff(queries_at).max()),
        most_keys=int(np.diff(keys_at).max()),
    )


def _joined(parts: Sequence[range]) -> Tensor:
    arrays = [np.arange(p.start, p.stop, dtype=np.int64) for p in parts]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *arrays]))


@cache
def flash_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's flash kernels do not attend by segments here, or None where they do.

    They are operators that torch keeps for itself. So they are tried on a few tokens, forward and
    backward, against attention of each segment by the public function.
    """
    if device.type != "cuda":
        return f"no flash kernels on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash kernels compute in two bytes, not in {str(dtype).removeprefix('torch.')}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "flash kernels need compute capability 8.0"
    try:
        error = trial_error(device, dtype)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as reason:
        return f"torch {torch.__version__}: {str(reason).splitlines()[0]}"
    # rounding to two bytes makes 1e-2; a wrong mask or a lost gradient makes 0.3 and more
    return None if error < 0.05 else f"torch {torch.__version__} attends otherwise ({error:.2g})"


def trial_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of output and gradients of `attend_by_flash` on two trees."""
    trees: tuple[Tree, ...] = ((3, 2, 4), (5,))
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, trees))
    given = [torch.randn(1, h, tokens, 64, generator=generator) for h in (4, 2, 2)]
    upstream = torch.randn(1, tokens, 4, 64, generator=generator).to(device, dtype)
    found: list[list[Tensor]] = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for flash in (True, False):
            leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in given]
            q, k, v = leaves if flash else [x.float() for x in leaves]
            if flash:
                out = _by_flash(q, k, v, lengths_of(trees, device), None, None)
            else:
                parts = [
                    scaled_dot_product_attention(
                        q[:, :, s.own], s.of(k), s.of(v), attn_mask=s.mask(None, device),
                        is_causal=s.mask(None, device) is None, enable_gqa=True,
                    )
                    for s in segments(trees)
                ]  # fmt: skip
                out = torch.cat(parts, 2).transpose(1, 2)
            out.backward(upstream.to(out.dtype))  # type: ignore[no-untyped-call]
            found.append([out.detach(), *(x.grad for x in leaves if x.grad is not None)])
    mine, theirs = found
    if len(mine) != len(theirs):
        return math.inf
    return max(
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(mine, theirs, strict=True)
    )


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
    if torch.compiler.is_compiling() or flash_refusal(device, dtype) is not None:
        return None
    q, k, v = (x.to(dtype) for x in (query, key, value))
    return _by_flash(q, k, v, lengths_of(tuple(trees), device), window, scale)


def _by_flash(
    query: Tensor,  # [1, heads, N, d]
    key: Tensor,  # [1, kv_heads, N, d]
    value: Tensor,  # [1, kv_heads, N, d]
    places: Lengths,
    window: int | None,
    scale: float | None,
) -> Tensor:  # [1, N, heads, d]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
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
