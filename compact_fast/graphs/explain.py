"""Why a question's rationales scored as they did: steps, matches and scores side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from compact_fast.graphs.fallback_match import soundness
from compact_fast.graphs.fallback_parse import Graph, Node, step_texts
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
from compact_fast.graphs.parsing import answer_keys, as_list, pack, parse_rationales, unpack
from compact_fast.graphs.scoring import name_place, score_graphs

_SIGNS = {1: "+", 2: "-", 4: "*", 8: "/"}
_NARROWEST = 36  # characters a teacher's column needs on a terminal


@dataclass(frozen=True)
class Step:
    """One step as it was read."""

    text: str  # its words
    formula: str  # operands, operators and result: "(*) 4, 5 = 20"
    uses: tuple[int, ...]  # earlier steps (from 0) whose results it uses
    result: int | None  # its key; equal keys are equal results


@dataclass(frozen=True)
class Teacher:
    """One rationale."""

    name: str
    steps: list[Step]
    answer: str
    score: float
    soundness: float
    copy_of: str | None  # the teacher whose vote it shares

    def head(self) -> str:
        """Its figures in a line."""
        copy = f", near-copy of {self.copy_of}" if self.copy_of else ""
        return f"score {self.score:.3f}, soundness {self.soundness:.2f}, answer {self.answer}{copy}"


@dataclass(frozen=True, eq=False)
class Explanation:
    """One question as the consensus sees it."""

    teachers: list[Teacher]
    agreement: NDArray[np.float64]  # [K, K]
    matches: dict[tuple[int, int], list[tuple[int, int]]]  # (a, b), a < b: pairs of steps, from 0
    step_scores: dict[tuple[int, int], float]  # (a, b): agreement of the steps alone
    note: str  # "" or why nobody can be preferred

    @property
    def reference(self) -> int:
        """The teacher with the highest score, the first of equals: the others are laid beside."""
        return int(np.argmax([t.score for t in self.teachers])) if self.teachers else 0

    def partner(self, teacher: int, step: int) -> int | None:
        """The reference's step that is matched with this one."""
        a, b = sorted((teacher, self.reference))
        for pair in self.matches.get((a, b), ()):
            mine, other = pair if teacher == a else pair[::-1]
            if mine == step:
                return other
        return None

    def mark(self, a: int, i: int, b: int, j: int) -> str:
        """How step i of teacher a and step j of b, which are matched, stand to each other: "=" with
        equal results, "~" with others or none."""
        mine, other = self.teachers[a].steps[i].result, self.teachers[b].steps[j].result
        return "=" if mine is not None and mine == other else "~"

    def rows(self) -> list[list[int | None]]:
        """Steps side by side: a row has each teacher's step, or None.

        A step stands in the row of the reference's step that it is matched with; those without a
        partner stand behind their teacher's step before them, in rows without the reference.
        """
        k = len(self.teachers)
        own = len(self.teachers[self.reference].steps) if k else 0
        matched: list[list[int | None]] = [[None] * k for _ in range(own)]
        extra: list[list[list[int | None]]] = [[] for _ in range(own + 1)]
        for t, teacher in enumerate(self.teachers):
            behind = 0  # of this many rows of the reference
            for i in range(len(teacher.steps)):
                row = i if t == self.reference else self.partner(t, i)
                if row is not None:
                    matched[row][t] = i
                    behind = row + 1
                    continue
                lines = extra[behind]
                taken = next(
                    (n for n in range(len(lines), 0, -1) if lines[n - 1][t] is not None), 0
                )
                if taken == len(lines):
                    lines.append([None] * k)
                lines[taken][t] = i
        rows = list(extra[0])
        for shared, behind_it in zip(matched, extra[1:], strict=True):
            rows += [shared, *behind_it]
        return rows

    def text(self, width: int = 120) -> str:
        """For a terminal of `width` characters: as many teachers beside each other as fit, the
        best of them first in every band."""
        columns = max(1, min(len(self.teachers), width // _NARROWEST))
        each = max(_NARROWEST - 3, (width - 3 * (columns - 1)) // columns)
        best = [self.reference] if columns > 1 else []
        others = [t for t in range(len(self.teachers)) if t not in best]
        beside = columns - len(best)
        lines: list[str] = []
        for first in range(0, max(len(others), 1), beside):
            lines += [*self._band([*best, *others[first : first + beside]], each), ""]
        names = [t.name for t in self.teachers]
        lines += ["agreement", *_matrix(names, self.agreement.tolist()), ""]
        if self.matches:
            lines.append("matched steps: = with equal results, ~ with others or none")
        for (a, b), pairs in self.matches.items():
            marked = (f"{i + 1}{self.mark(a, i, b, j)}{j + 1}" for i, j in pairs)
            links = " ".join(marked) or "nothing"
            lines.append(
                f"{names[a]} and {names[b]}: steps {self.step_scores[a, b]:.3f}, matched {links}"
            )
        return "\n".join([*lines, self.note] if self.note else lines)

    def _band(self, who: list[int], width: int) -> list[str]:
        shown = [row for row in self.rows() if any(row[t] is not None for t in who)]
        cells = [[self._cell(t, i) for t, i in enumerate(row)] for row in shown]
        heads = [f"{t.name}\n{t.head()}" for t in self.teachers]
        lines: list[str] = []
        for row in [heads, *cells]:
            wrapped = [_wrap(row[t], width) for t in who]
            for n in range(max(map(len, wrapped), default=0)):
                parts = [(w[n] if n < len(w) else "").ljust(width) for w in wrapped]
                lines.append(" | ".join(parts).rstrip())
            if row is heads:
                lines.append("-+-".join("-" * width for _ in who))
        return lines

    def _cell(self, teacher: int, step: int | None) -> str:
        if step is None:
            return ""
        it = self.teachers[teacher].steps[step]
        other = self.partner(teacher, step)
        mark = ""
        if other is not None:
            mark = f" {self.mark(teacher, step, self.reference, other)}{other + 1}"
        origin = f"   from step {', '.join(str(i + 1) for i in it.uses)}" if it.uses else ""
        return f"{step + 1}.{mark} {it.formula}{origin}\n   {it.text}"


def examine(
    texts: Sequence[str],
    teachers: Sequence[str] | None = None,
    *,
    final_answers: Sequence[str | None] | None = None,
    options: GraphOptions | None = None,
    backend: Backend = "auto",
) -> Explanation:
    """One question's rationales as the consensus sees them. Raises ValueError as `consensus`."""
    texts = as_list(texts, "texts")
    names = (
        [f"teacher-{k}" for k in range(len(texts))]
        if teachers is None
        else [str(name) for name in as_list(teachers, "teachers")]
    )
    if len(names) != len(texts):
        raise ValueError(f"{len(texts)} texts, but {len(names)} teachers")
    place = np.array([0, len(texts)], dtype=np.int64)
    try:
        objects = unpack(parse_rationales(texts, options=options, backend=backend))
        if final_answers is not None:
            final_answers = as_list(final_answers, "final answers")
            if len(final_answers) != len(texts):
                raise ValueError(f"{len(texts)} texts, but {len(final_answers)} final answers")
            keys, known = answer_keys(final_answers, backend)
    except ValueError as error:
        raise ValueError(name_place(str(error), place)) from None
    if final_answers is not None:
        for graph, key, given in zip(objects, keys.tolist(), known.tolist(), strict=True):
            graph.answer, graph.answer_kind = key, ANSWER_EXPLICIT if given else ANSWER_NONE
    graphs = pack(objects)
    found = score_graphs(graphs, [0, len(objects)], options=options, backend=backend)
    pairs = list(combinations(range(len(objects)), 2))
    matched = match(graphs, pairs, options=options, backend=backend)
    limit = (options or GraphOptions()).max_steps
    shown = final_answers if final_answers is not None else [None] * len(objects)
    matches = {}
    for p, pair in enumerate(pairs):
        columns = matched.assigned[matched.cu_assigned[p] : matched.cu_assigned[p + 1]].tolist()
        matches[pair] = [(i, j) for i, j in enumerate(columns) if j >= 0]
    note = ""
    if found.no_evidence[0]:
        note = "no evidence: fewer than two distinct rationales"
    elif found.undecidable[0]:
        note = "undecidable: two distinct rationales, nobody to side with either"
    return Explanation(
        teachers=[
            Teacher(
                names[k],
                _steps(graph, step_texts(texts[k], limit)),
                _answer(graph, shown[k]),
                float(found.scores[k]),
                soundness(graph) / UNIT,
                None if found.groups[k] == k else names[found.groups[k]],
            )
            for k, graph in enumerate(objects)
        ],
        agreement=found.agreement[0],
        matches=matches,
        step_scores=dict(zip(pairs, matched.scores.tolist(), strict=True)),
        note=note,
    )


def explain(
    texts: Sequence[str],
    teachers: Sequence[str] | None = None,
    *,
    final_answers: Sequence[str | None] | None = None,
    options: GraphOptions | None = None,
    backend: Backend = "auto",
    width: int = 120,
) -> str:
    """`examine` as text: every step with its operands, operators, result and words, beside the
    step of the best teacher that it is matched with ("2. =3": my step 2 has the result of its step
    3; "2. ~3": they are alike, but the results differ or are none); then the agreement of all
    pairs. `width` is the terminal's.
    """
    found = examine(texts, teachers, final_answers=final_answers, options=options, backend=backend)
    return found.text(width)


def _steps(graph: Graph, said: Sequence[str]) -> list[Step]:
    return [
        Step(
            text.lstrip(",;:&| "),
            _formula(node),
            tuple(sorted(a for a, b, kind in graph.edges if b == i and kind)),
            None if node.result_kind == RESULT_NONE else node.result,
        )
        for i, (node, text) in enumerate(zip(graph.nodes, said, strict=True))
    ]


def _answer(graph: Graph, given: str | None) -> str:
    if graph.answer_kind == ANSWER_NONE:
        return "none"
    return given if given is not None else _number(graph.answer)


def _number(key: int) -> str:
    if abs(key) >= HUGE:
        return "(words)"
    return f"{key / MICRO:g}" if key % MICRO else str(key // MICRO)


def _formula(node: Node) -> str:
    signs = " ".join(sign for bit, sign in _SIGNS.items() if node.operators & bit)
    text = ", ".join(map(_number, node.numbers))
    if signs:
        text = f"({signs}) {text}"
    if node.result_kind == RESULT_NONE:
        return text or "(words)"
    mark = "=" if node.result_kind == RESULT_STATED else "states"
    return f"{text} {mark} {_number(node.result)}".strip()


def _wrap(text: str, width: int) -> list[str]:
    return [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, width, subsequent_indent="   ", drop_whitespace=True)
    ]


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
