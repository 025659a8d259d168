"""StepGraphs: the step graphs of many rationales as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compact_fast.graphs.options import MOST_STEPS

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StepGraphs:
    """G graphs, N nodes (steps), E edges. Node numbers inside edges count from the graph's first.

    The arrays are kept as read-only copies: what has been checked stays true. Raises ValueError
    naming the array, the place and the value when arrays contradict each other.
    """

    cu_nodes: Int64  # [G+1]; graph g has nodes cu_nodes[g]..cu_nodes[g+1]-1
    cu_edges: Int64  # [G+1]
    cu_shingles: Int64  # [G+1]
    answer: Int64  # [G]; canonical key of the final answer
    answer_kind: NDArray[np.uint8]  # [G]; 0 none, 1 implied by the last result, 2 explicit
    result: Int64  # [N]; millionths, or a tagged hash beyond 12 digits
    result_kind: NDArray[np.uint8]  # [N]; 0 none, 1 implied, 2 stated
    operators: NDArray[np.uint8]  # [N]; bit set: 1 +, 2 -, 4 *, 8 /
    signature: NDArray[np.uint64]  # [N, 8]; 512-bit set of hashed words and word pairs
    cu_numbers: Int64  # [N+1]
    numbers: Int64  # operands, sorted and distinct inside a node
    edge_source: NDArray[np.int32]  # [E]
    edge_target: NDArray[np.int32]  # [E]
    edge_type: NDArray[np.uint8]  # [E]; 0 follows, 1 uses the result of
    shingles: NDArray[np.uint64]  # 3-word hashes, sorted and distinct inside a graph

    def __len__(self) -> int:
        return self.answer.size

    @classmethod
    def unchecked(cls, arrays: dict[str, NDArray[Any]]) -> StepGraphs:
        """From the core's own arrays, which need no check."""
        graphs = object.__new__(cls)
        for array in arrays.values():
            array.flags.writeable = False
        graphs.__dict__.update(arrays)
        return graphs

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __post_init__(self) -> None:
        for name, array in self.arrays().items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"graphs.{name}: expected an array, got {type(array).__name__}")
            if array.dtype != _DTYPES[name]:
                raise ValueError(f"graphs.{name}: expected {_DTYPES[name]}, got {array.dtype}")
            if name != "signature" and array.ndim != 1:
                raise ValueError(f"graphs.{name}: expected one dimension, got shape {array.shape}")
            kept = np.array(array, order="C")
            kept.flags.writeable = False
            object.__setattr__(self, name, kept)
        graphs, nodes, edges = self.answer.size, self.result.size, self.edge_source.size
        for name, size in (
            ("answer_kind", (graphs,)),
            ("result_kind", (nodes,)),
            ("operators", (nodes,)),
            ("signature", (nodes, 8)),
            ("edge_target", (edges,)),
            ("edge_type", (edges,)),
        ):
            if getattr(self, name).shape != size:
                raise ValueError(
                    f"graphs.{name}: expected shape {size}, got {getattr(self, name).shape}"
                )
        check_offsets("graphs.cu_nodes", self.cu_nodes, graphs, nodes)
        check_offsets("graphs.cu_edges", self.cu_edges, graphs, edges)
        check_offsets("graphs.cu_shingles", self.cu_shingles, graphs, self.shingles.size)
        check_offsets("graphs.cu_numbers", self.cu_numbers, nodes, self.numbers.size)
        long = np.flatnonzero(np.diff(self.cu_nodes) > MOST_STEPS)
        if long.size:
            steps = np.diff(self.cu_nodes)[long[0]]
            raise ValueError(f"graph {long[0]} has {steps} steps; at most {MOST_STEPS}")
        check_edges(
            "graphs", self.edge_source, self.edge_target, self.edge_type, self.edge_graph,
            np.diff(self.cu_nodes)[self.edge_graph],
        )  # fmt: skip
        _check_sorted("numbers", self.numbers, self.cu_numbers)
        _check_sorted("shingles", self.shingles, self.cu_shingles)
        for name, limit in (("answer_kind", 2), ("result_kind", 2), ("operators", 15)):
            bad = np.flatnonzero(getattr(self, name) > limit)
            if bad.size:
                raise ValueError(
                    f"graphs.{name}[{bad[0]}] = {getattr(self, name)[bad[0]]}: at most {limit}"
                )

    @cached_property
    def edge_graph(self) -> Int64:
        """[E]; the graph of each edge."""
        return np.repeat(np.arange(len(self)), np.diff(self.cu_edges))


_DTYPES = {
    "answer_kind": np.dtype(np.uint8),
    "result_kind": np.dtype(np.uint8),
    "operators": np.dtype(np.uint8),
    "edge_type": np.dtype(np.uint8),
    "signature": np.dtype(np.uint64),
    "shingles": np.dtype(np.uint64),
    "edge_source": np.dtype(np.int32),
    "edge_target": np.dtype(np.int32),
    **dict.fromkeys(
        ("cu_nodes", "cu_edges", "cu_shingles", "answer", "result", "cu_numbers", "numbers"),
        np.dtype(np.int64),
    ),
}


def check_offsets(name: str, cu: NDArray[Any], count: int, total: int) -> None:
    """Offsets of `count` items that together hold `total`."""
    if cu.shape != (count + 1,):
        raise ValueError(f"{name}: expected shape ({count + 1},), got {cu.shape}")
    if cu[0] != 0 or cu[-1] != total:
        raise ValueError(f"{name}: must rise from 0 to {total}, goes from {cu[0]} to {cu[-1]}")
    bad = np.flatnonzero(cu[1:] < cu[:-1])  # a difference could wrap around
    if bad.size:
        raise ValueError(f"{name}[{bad[0] + 1}] = {cu[bad[0] + 1]}: below the entry before it")


def check_edges(
    name: str,
    source: NDArray[np.int32],
    target: NDArray[np.int32],
    kind: NDArray[np.uint8],
    owner: Int64,  # [E]; the graph of each edge
    nodes: Int64,  # [E]; how many nodes that graph has
) -> None:
    """Edges stay inside their graph, never loop, and are there once."""
    for what, ends in (("edge_source", source), ("edge_target", target)):
        bad = np.flatnonzero((ends < 0) | (ends >= nodes))
        if bad.size:
            e = bad[0]
            raise ValueError(
                f"{name}.{what}[{e}] = {ends[e]}: graph {owner[e]} has {nodes[e]} nodes"
            )
    bad = np.flatnonzero(kind > 1)
    if bad.size:
        raise ValueError(f"{name}.edge_type[{bad[0]}] = {kind[bad[0]]}: expected 0 or 1")
    bad = np.flatnonzero(source == target)
    if bad.size:
        raise ValueError(f"{name}: edge {bad[0]} leads from node {source[bad[0]]} to itself")
    if source.size:
        keys = np.stack([owner, source, target, kind])
        order = np.lexsort(keys)
        same = (keys[:, order[1:]] == keys[:, order[:-1]]).all(0)
        if same.any():
            e = max(order[:-1][same][0], order[1:][same][0])
            raise ValueError(
                f"{name}: edge {e} repeats an earlier one ({source[e]} to {target[e]})"
            )


def _check_sorted(name: str, values: NDArray[Any], cu: Int64) -> None:
    if values.size < 2:
        return
    rising = values[1:] > values[:-1]
    starts = cu[1:-1]
    rising[starts[(starts > 0) & (starts < values.size)] - 1] = True
    bad = np.flatnonzero(~rising)
    if bad.size:
        raise ValueError(f"graphs.{name}[{bad[0] + 1}]: must rise inside an item")
