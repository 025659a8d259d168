"""Why a question's rationales scored as they did: steps, matches and scores as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from compact_fast.graphs.fallback_match import soundness
from compact_fast.graphs.fallback_parse import Node
from compact_fast.graphs.fallback_text import HUGE, MICRO
from compact_fast.graphs.matching import match
from compact_fast.graphs.native import Backend
from compact_fast.graphs.options import (
    ANSWER_EXPLICIT,
    ANSWER_NONE,
    RESULT_NONE,
    RESULT_STATED,
    UNIT,
    GraphOptions,
)
from compact_fast.graphs.parsing import answer_keys, pack, parse_rationales, unpack
from compact_fast.graphs.scoring import score_graphs

_SIGNS = {1: "+", 2: "-", 4: "*", 8: "/"}


def explain(
    texts: Sequence[str],
    teachers: Sequence[str] | None = None,
    *,
    final_answers: Sequence[str | None] | None = None,
    options: GraphOptions | None = None,
    backend: Backend = "auto",
) -> str:
    """One question's rationales as the consensus sees them.

    Every step with its operands, operators and result; which steps of two teachers were matched;
    agreement, soundness and score. Raises ValueError as `consensus` does.
    """
    names = list(teachers) if teachers is not None else [f"teacher-{k}" for k in range(len(texts))]
    if len(names) != len(texts):
        raise ValueError(f"{len(texts)} texts, but {len(names)} teachers")
    objects = unpack(parse_rationales(texts, options=options, backend=backend))
    if final_answers is not None:
        keys, known = answer_keys(final_answers, backend)
        for graph, key, given in zip(objects, keys.tolist(), known.tolist(), strict=True):
            graph.answer, graph.answer_kind = key, ANSWER_EXPLICIT if given else ANSWER_NONE
    graphs = pack(objects)
    found = score_graphs(graphs, [0, len(objects)], options=options, backend=backend)
    shown = final_answers if final_answers is not None else [None] * len(objects)
    lines = []
    for k, graph in enumerate(objects):
        answer = shown[k] if shown[k] is not None else _number(graph.answer)
        if graph.answer_kind == ANSWER_NONE:
            answer = "none"
        copy = "" if found.groups[k] == k else f", near-copy of {names[found.groups[k]]}"
        lines.append(
            f"{names[k]}: score {found.scores[k]:.3f}, soundness {soundness(graph) / UNIT:.2f}, "
            f"final answer {answer}{copy}"
        )
        uses = {i: sorted(a + 1 for a, b, kind in graph.edges if b == i and kind) for i in
                range(len(graph.nodes))}  # fmt: skip
        for i, node in enumerate(graph.nodes):
            origin = f"   from step {', '.join(map(str, uses[i]))}" if uses[i] else ""
            lines.append(f"  {i + 1:3}. {_step(node)}{origin}")
    lines += ["", "agreement", *_matrix(names, found.agreement[0].tolist())]
    pairs = list(combinations(range(len(objects)), 2))
    matched = match(graphs, pairs, options=options, backend=backend)
    lines.append("")
    for p, (a, b) in enumerate(pairs):
        columns = matched.assigned[matched.cu_assigned[p] : matched.cu_assigned[p + 1]].tolist()
        links = [f"{i + 1}={j + 1}" for i, j in enumerate(columns) if j >= 0]
        lines.append(
            f"{names[a]} and {names[b]}: steps {matched.scores[p]:.3f}, matched "
            f"{' '.join(links) if links else 'nothing'}"
        )
    if found.no_evidence[0]:
        lines.append("no evidence: fewer than two distinct rationales")
    if found.undecidable[0]:
        lines.append("undecidable: two distinct rationales, nobody to side with either")
    return "\n".join(lines)


def _number(key: int) -> str:
    if abs(key) >= HUGE:
        return "(words)"
    return f"{key / MICRO:g}" if key % MICRO else str(key // MICRO)


def _step(node: Node) -> str:
    signs = " ".join(sign for bit, sign in _SIGNS.items() if node.operators & bit)
    text = ", ".join(map(_number, node.numbers))
    if signs:
        text = f"({signs}) {text}"
    if node.result_kind == RESULT_NONE:
        return text or "(words)"
    mark = "=" if node.result_kind == RESULT_STATED else "states"
    return f"{text} {mark} {_number(node.result)}".strip()


def _matrix(names: Sequence[str], rows: Sequence[Sequence[float]]) -> list[str]:
    width = max(map(len, names), default=0)
    head = " " * width + "".join(f"{k + 1:>7}" for k in range(len(names)))
    return [
        head,
        *(
            f"{name:{width}}" + "".join(f"{value:7.3f}" for value in row)
            for name, row in zip(names, rows, strict=True)
        ),
    ]
