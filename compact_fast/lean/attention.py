"""Attention by segments on a CPU, one step of autograd for a whole row.

The native module takes a row in one call each way (csrc/attention.h); what it does not take,
torch's operator does, segment by segment.

torch's attention keeps queries, keys and values of every call: with grouped heads the keys
repeated for each head, and with a shared prompt its keys again for each rationale. Here the row's
own are kept once, and each call's are put together again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compact_fast.lean.kept import keep, lasting, passing
from compact_fast.native import native_with

Tree = tuple[int, ...]
"""Lengths: of a prompt, then of each rationale behind it. A plain sequence is a tree of one."""


@dataclass(frozen=True)
class Segment:
    """Tokens that see the root before them, if any, and each other causally."""

    root: slice
    own: slice

    @property
    def sees(self) -> int:
        """So many tokens at most."""
        return _length(self.root) + _length(self.own)

    def of(self, x: Tensor) -> Tensor:  # [1, heads, N, d] -> [1, heads, sees, d]
        """What the segment sees of keys or values."""
        if self.root.stop == self.own.start:
            return x[:, :, self.root.start : self.own.stop]
        own = x[:, :, self.own]
        return torch.cat([x[:, :, self.root], own], 2) if _length(self.root) else own

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """[1, 1, own, sees] bool: what each token sees; None: those up to itself."""
        return self._mask(window, device, torch.bool)

    def added_mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """The same as it is added to scores: 0 or -inf."""
        return self._mask(window, like.device, like.dtype)

    def _mask(self, window: int | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        new, root = _length(self.own), _length(self.root)
        if not root and (window is None or new <= window):
            return None
        return masks.of(new, root, window, device, dtype)

    def add(self, into: Tensor, gradient: Tensor) -> None:
        """Add a gradient by `of(x)` to the gradient by x."""
        P = _length(self.root)
        if P:
            into[:, :, self.root] += gradient[:, :, :P]
        into[:, :, self.own] += gradient[:, :, P:]


class Masks:
    """Of every kind one matrix, of which masks are parts: who sees whom depends on the distance."""

    def __init__(self) -> None:
        self._whole: dict[tuple[int | None, torch.device, torch.dtype], Tensor] = {}

    def of(
        self, new: int, root: int, window: int | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """[1, 1, new, root + new]: bool, or 0 and -inf of another dtype."""
        kind = window, device, dtype
        whole = self._whole.get(kind, torch.empty(0, 0))
        news, roots = whole.shape[0], whole.shape[1] - whole.shape[0]
        if new > news or root > roots:
            news, roots = max(news, _rounded(new)), max(roots, _rounded(root))
            whole = self._whole[kind] = _whole_mask(news, roots, window, device, dtype)
        return whole[None, None, :new, roots - root : roots + new]


masks = Masks()


def _rounded(n: int) -> int:
    """Up, so that lengths that grow slowly make few matrices."""
    return -(-n // 64) * 64


def _whole_mask(
    new: int, root: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    seen = torch.ones((new, root + new), dtype=torch.bool, device=device).tril_(root)
    if window is not None:
        seen.triu_(root - window + 1)
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _length(places: slice) -> int:
    return int(places.stop) - int(places.start)


def segments(trees: Sequence[Tree]) -> Iterator[Segment]:
    """The segments of a row, one behind another."""
    at = 0
    for prompt, *rationales in trees:
        root = slice(at, at + prompt)
        if prompt:
            yield Segment(slice(at, at), root)
        at += prompt
        for n in rationales:
            if n:
                yield Segment(root, slice(at, at + n))
            at += n


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` takes such tensors."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
        and not torch.compiler.is_compiling()
    )


def attend(
    query: Tensor,  # [1, heads, N, d]
    key: Tensor,  # [1, kv_heads, N, d]
    value: Tensor,  # [1, kv_heads, N, d]
    trees: Sequence[Tree],
    window: int | None,
    scale: float | None,
) -> Tensor:  # [1, N, heads, d]
    """Attention of each segment over what it sees; `window`: of so many tokens at most."""
    return cast(Tensor, _Attention.apply(query, key, value, tuple(trees), window, scale))  # type: ignore[no-untyped-call]


class _How(NamedTuple):
    """Who sees whom, and what scores are multiplied by."""

    trees: tuple[Tree, ...]
    window: int | None
    scale: float | None


@dataclass(frozen=True)
class _Places:
    """Segments as the native module takes them."""

    table: Tensor  # [S, 4]: begin and end of the root and of the own tokens
    tokens: int
    sees: int  # a token, at most

    @staticmethod
    @lru_cache(maxsize=16)  # every layer of a student asks for the same ones
    def of(trees: tuple[Tree, ...]) -> _Places:
        found = list(segments(trees))
        rows = [(s.root.start, s.root.stop, s.own.start, s.own.stop) for s in found]
        table = torch.tensor(rows, dtype=torch.int64)
        return _Places(table, sum(map(sum, trees)), max((s.sees for s in found), default=0))


def _native() -> ModuleType | None:
    return native_with("attend", "attention on a CPU takes twice as long")


def _native_for(
    query: Tensor, key: Tensor, value: Tensor, trees: tuple[Tree, ...]
) -> ModuleType | None:
    """The native module, if it takes them; heads of a token lie together."""
    native = _native()
    if native is None or {x.dtype for x in (query, key, value)} != {torch.float32}:
        return None
    _, heads, N, d = query.shape
    places = _Places.of(trees)
    fit = (
        d % 16 == 0
        and d <= native.most_width
        and heads % key.shape[1] == 0
        and key.shape == value.shape == (1, key.shape[1], N, d)
        and places.tokens == N
        and places.sees <= native.most_seen
    )
    return native if fit else None


def _together(x: Tensor) -> Tensor:  # [1, N, heads, d]
    """The same, where heads of a token lie together."""
    fits = x.stride(3) == 1 and (x.stride(2) == x.shape[3] or x.shape[2] == 1)
    return x if fits else x.contiguous()


def _call(native: ModuleType, query: Tensor, key: Tensor, value: Tensor, how: _How) -> Any:
    """What the native module knows of a call."""
    _, heads, _, d = query.shape
    at = (n for x in (query, key, value) for n in (x.data_ptr(), x.stride(2)))
    table = _Places.of(how.trees).table
    return native.Attention(
        *at, table.data_ptr(), len(table), heads, key.shape[1], d, how.window or 0,
        d**-0.5 if how.scale is None else how.scale, torch.get_num_threads(),
    )  # fmt: skip


def _result(shape: tuple[int, ...], like: Tensor, lasts: bool) -> Tensor:
    return lasting(shape, like) if lasts else like.new_empty(shape)


def _zeros_like(x: Tensor) -> Tensor:  # [1, heads, N, d], where heads of a token are neighbours
    return _empty_like(x).zero_().transpose(1, 2)


def _empty_like(x: Tensor) -> Tensor:  # [1, heads, N, d] -> [1, N, heads, d]
    _, heads, N, d = x.shape
    return passing((1, N, heads, d), x)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        trees: tuple[Tree, ...],
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        rows = any(ctx.needs_input_grad)
        given = [x.transpose(1, 2) for x in (query, key, value)]
        if rows:
            given = [keep(x) for x in given]
        query, key, value = (_together(x).transpose(1, 2) for x in given)
        _, heads, N, d = query.shape
        out = _result((1, N, heads, d), query, rows)
        how = _How(trees, window, scale)
        native = _native_for(query, key, value, trees)
        if native is None:
            logsumexp = _by_torch(query, key, value, out, how)
        else:
            logsumexp = _result((1, heads, N), query, rows)
            call = _call(native, query, key, value, how)
            native.attend(call, N, out.data_ptr(), logsumexp.data_ptr())
        if rows:
            ctx.save_for_backward(*given, out, keep(logsumexp))
            ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, out, logsumexp = ctx.saved_tensors
        query, key, value = (_together(x).transpose(1, 2) for x in kept)
        native = _native_for(query, key, value, ctx.how.trees)
        if native is None:
            found = _back_by_torch(grad, query, key, value, out, logsumexp, ctx.how)
            return *found, None, None, None
        call = _call(native, query, key, value, ctx.how)
        given = [t.contiguous() for t in (grad, out, logsumexp)]
        made = [_empty_like(t) for t in (query, key, value)]
        room = passing((native.attend_back_room(call),), query)
        places = (t.data_ptr() for t in (*given, *made, room))
        native.attend_back(call, query.shape[2], *places)
        return *(t.transpose(1, 2) for t in made), None, None, None


def _by_torch(query: Tensor, key: Tensor, value: Tensor, out: Tensor, how: _How) -> Tensor:
    """Writes `out`; returns the logarithm of each sum of exponentials, [1, heads, N]."""
    sums = []
    for s in segments(how.trees):
        mask = s.added_mask(how.window, query)
        found, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, s.own], s.of(key), s.of(value), 0.0, mask is None,
            attn_mask=mask, scale=how.scale,
        )  # fmt: skip
        out[:, s.own] = found.transpose(1, 2)
        sums.append(logsumexp)
    return torch.cat(sums, 2)


def _back_by_torch(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    how: _How,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by query, key and value, by that of out."""
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    g_query, g_key, g_value = (_zeros_like(t) for t in (query, key, value))
    for s in segments(how.trees):
        mask = s.added_mask(how.window, query)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[:, :, s.own], query[:, :, s.own], s.of(key), s.of(value),
            out[:, :, s.own], logsumexp[:, :, s.own].contiguous(), 0.0, mask is None,
            attn_mask=mask, scale=how.scale,
        )  # fmt: skip
        g_query[:, :, s.own] = found[0]
        s.add(g_key, found[1])
        s.add(g_value, found[2])
    return g_query, g_key, g_value
