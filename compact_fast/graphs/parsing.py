"""Rationale texts to step graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NoReturn

import numpy as np

from compact_fast.graphs.fallback_parse import Graph, Node, parse_text
from compact_fast.graphs.fallback_parse import answer_key as answer_key_python
from compact_fast.graphs.native import Backend, choose
from compact_fast.graphs.options import (
    ANSWER_EXPLICIT,
    ANSWER_NONE,
    GraphOptions,
    check_options,
)
from compact_fast.graphs.structure import StepGraphs

_WORD = (1 << 64) - 1


class BeyondLimitsError(ValueError):
    """A text has more steps or bytes than the options allow."""


def parse_rationales(
    texts: Sequence[str],
    *,
    options: GraphOptions | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
) -> StepGraphs:
    """One step graph a text; rules in csrc/parse.h. `threads`: None = all cores (native only).

    Raises ValueError naming the text for what is not a string or not valid Unicode, and
    BeyondLimitsError, a ValueError as well, beyond `options.max_bytes` / `options.max_steps`.
    """
    options = check_options(options)
    count = check_threads(threads)
    texts = check_texts(texts)
    native, _ = choose(backend)
    if native is None:
        return pack(parse_python(texts, options))
    try:
        arrays = native.parse(texts, options.integers(), count)
    except OverflowError as error:
        raise_parse_error(error)
    return StepGraphs.unchecked(arrays)


def check_threads(threads: int | None) -> int:
    """As csrc wants it: 0 = all cores."""
    if threads is None:
        return 0
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise ValueError(
            f"threads={threads!r}: expected an integer from 1 to 1024, or None for all"
        )
    return threads


def as_list(items: Any, names: str) -> list[Any]:
    """The items of anything ordered. Raises ValueError for one string and for what has no order."""
    if isinstance(items, (str, bytes)):
        raise ValueError(f"expected a list of {names}, got one string")
    if not isinstance(items, (Mapping, AbstractSet)):
        try:
            return list(items)
        except TypeError:
            pass
    raise ValueError(f"expected a list of {names}, got {type(items).__name__}")


def check_texts(
    texts: Sequence[str | None], name: str = "text", *, optional: bool = False
) -> list[Any]:
    """A list of valid strings (or None where `optional`)."""
    out = as_list(texts, name + "s")
    for s, text in enumerate(out):
        if text is None and optional:
            continue
        if not isinstance(text, str):
            raise ValueError(f"{name} {s}: expected a string, got {type(text).__name__}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{name} {s}: not valid Unicode at character {error.start} (a lone surrogate)"
                ) from None
    return out


def raise_parse_error(error: OverflowError) -> NoReturn:
    """(index, reason) from either parser, as a BeyondLimitsError."""
    index, reason = error.args
    raise BeyondLimitsError(
        f"text {index}: {reason}; shorten it or raise the limit in GraphOptions"
    ) from None


def parse_python(texts: Sequence[str], options: GraphOptions) -> list[Graph]:
    """The fallback's graphs, as objects."""
    graphs = []
    for s, text in enumerate(texts):
        size = len(text.encode())
        if size > options.max_bytes:
            error = OverflowError(s, f"too many bytes ({size}); the limit is {options.max_bytes}")
            raise_parse_error(error)
        try:
            graphs.append(parse_text(text, options.max_steps))
        except ValueError:
            error = OverflowError(s, f"too many steps; the limit is {options.max_steps}")
            raise_parse_error(error)
    return graphs


def answer_keys(answers: Sequence[str | None], backend: Backend = "auto") -> tuple[Any, Any]:
    """Canonical keys of final answers given by themselves: (int64 [S], given bool [S])."""
    answers = check_texts(answers, "final answer", optional=True)
    native, _ = choose(backend)
    if native is not None:
        keys, given = native.answer_keys(answers)
        return keys, given.astype(bool)
    found = [None if a is None else answer_key_python(a) for a in answers]
    return (
        np.array([k or 0 for k in found], dtype=np.int64),
        np.array([k is not None for k in found], dtype=bool),
    )


def set_answers(graphs: Sequence[Graph], answers: Sequence[str | None]) -> None:
    """Replace the answers found in the texts."""
    for graph, answer in zip(graphs, answers, strict=True):
        key = None if answer is None else answer_key_python(answer)
        graph.answer = key or 0
        graph.answer_kind = ANSWER_NONE if key is None else ANSWER_EXPLICIT


def _offsets(sizes: Sequence[int]) -> Any:
    return np.concatenate([[0], np.cumsum(np.array(sizes, dtype=np.int64))]).astype(np.int64)


def pack(graphs: Sequence[Graph]) -> StepGraphs:
    """Objects to flat arrays."""
    nodes = [node for graph in graphs for node in graph.nodes]
    edges = [edge for graph in graphs for edge in graph.edges]
    signature = [[n.signature >> (64 * w) & _WORD for w in range(8)] for n in nodes]
    return StepGraphs(
        cu_nodes=_offsets([len(g.nodes) for g in graphs]),
        cu_edges=_offsets([len(g.edges) for g in graphs]),
        cu_shingles=_offsets([len(g.shingles) for g in graphs]),
        answer=np.array([g.answer for g in graphs], dtype=np.int64),
        answer_kind=np.array([g.answer_kind for g in graphs], dtype=np.uint8),
        result=np.array([n.result for n in nodes], dtype=np.int64),
        result_kind=np.array([n.result_kind for n in nodes], dtype=np.uint8),
        operators=np.array([n.operators for n in nodes], dtype=np.uint8),
        signature=np.array(signature, dtype=np.uint64).reshape(len(nodes), 8),
        cu_numbers=_offsets([len(n.numbers) for n in nodes]),
        numbers=np.array([x for n in nodes for x in n.numbers], dtype=np.int64),
        edge_source=np.array([e[0] for e in edges], dtype=np.int32),
        edge_target=np.array([e[1] for e in edges], dtype=np.int32),
        edge_type=np.array([e[2] for e in edges], dtype=np.uint8),
        shingles=np.array([x for g in graphs for x in g.shingles], dtype=np.uint64),
    )


def unpack(graphs: StepGraphs) -> list[Graph]:
    """Flat arrays to objects."""
    out = []
    words = graphs.signature.tolist()
    for g in range(len(graphs)):
        a, b = int(graphs.cu_nodes[g]), int(graphs.cu_nodes[g + 1])
        nodes = [
            Node(
                graphs.numbers[graphs.cu_numbers[i] : graphs.cu_numbers[i + 1]].tolist(),
                int(graphs.result[i]),
                int(graphs.result_kind[i]),
                int(graphs.operators[i]),
                sum(word << (64 * w) for w, word in enumerate(words[i])),
            )
            for i in range(a, b)
        ]
        e = slice(int(graphs.cu_edges[g]), int(graphs.cu_edges[g + 1]))
        edges = list(
            zip(
                graphs.edge_source[e].tolist(),
                graphs.edge_target[e].tolist(),
                graphs.edge_type[e].tolist(),
                strict=True,
            )
        )
        shingles = graphs.shingles[graphs.cu_shingles[g] : graphs.cu_shingles[g + 1]].tolist()
        kind = int(graphs.answer_kind[g])
        out.append(Graph(nodes, edges, int(graphs.answer[g]), kind, shingles))
    return out
