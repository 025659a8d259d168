"""The parser in Python: the twin of csrc/parse.cpp, used where the native module is missing.

Both read the same bytes by the same rules and give the same integers; see csrc/parse.h for the
rules in words. Nothing is ever evaluated, and time is linear in the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compact_fast.graphs.fallback_text import (
    ABBREVIATIONS,
    HUGE,
    LIST_MARK,
    MICRO,
    NUMBER_WORDS,
    OPERATORS,
    SKIP_LINE,
    STOP,
    TOKEN,
    TRANSLATE,
    fnv,
    mix,
    number_key,
    pair,
)
from compact_fast.graphs.options import (
    ANSWER_EXPLICIT,
    ANSWER_IMPLIED,
    ANSWER_NONE,
    EDGE_NEXT,
    EDGE_USES,
    RESULT_IMPLIED,
    RESULT_NONE,
    RESULT_STATED,
)


@dataclass
class Node:
    """One step."""

    numbers: list[int]  # sorted, distinct; everything but the result
    result: int
    result_kind: int
    operators: int
    signature: int  # 512-bit set of hashed words and word pairs


@dataclass
class Graph:
    """One rationale's step graph."""

    nodes: list[Node] = field(default_factory=list)
    edges: list[tuple[int, int, int]] = field(default_factory=list)  # source, target, type
    answer: int = 0
    answer_kind: int = ANSWER_NONE
    shingles: list[int] = field(default_factory=list)  # sorted, distinct 3-word hashes


class _Step:
    """What has been read of the step that is being read."""

    __slots__ = (
        "comma", "cut", "cut_at", "equation", "last_word", "numbers", "operators", "word",
        "words",
    )  # fmt: skip

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.words: list[int] = []
        self.operators = 0
        self.comma = self.word = False  # seen at all
        self.equation: int | None = None  # result after "="
        self.last_word = 0
        self.cut: _Step | None = None  # what followed a finished equation
        self.cut_at = 0  # where that begins

    def begins_equation(self) -> bool:
        """Found between two "=": a new equation, rather than a link of a chain?"""
        return (bool(self.numbers) and (self.word or self.comma)) or (self.word and self.comma)

    def merge(self) -> None:
        """Take back what followed the equation."""
        if self.cut is not None:
            self.numbers += self.cut.numbers
            self.words += self.cut.words
            self.operators |= self.cut.operators
            self.cut = None

    def retract(self) -> None:
        """What looked like a result was the start of an expression."""
        if self.equation is not None:
            self.numbers.append(self.equation)
            self.equation = None
        self.merge()


class Parser:
    """Reads one text into a Graph; with `answer_only` into the key of a final answer."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.graph = Graph()
        self.last_result: dict[int, int] = {}
        self.window: list[int] = []
        self.shingles: set[int] = set()
        self.data = ""  # the normalised text, one character a byte
        self.begin = 0  # of the step that is being read
        self.spans: list[tuple[int, int]] = []  # of the steps, in `data`

    # ---- steps -------------------------------------------------------------------------------

    def _flush(self, step: _Step, end: int) -> None:
        step.merge()
        span, self.begin = (self.begin, end), end
        if not step.numbers and not step.words and step.equation is None:
            return
        if len(self.graph.nodes) >= self.max_steps:
            raise ValueError(f"more than {self.max_steps} steps")
        numbers = list(step.numbers)
        if step.equation is not None:
            kind, result = RESULT_STATED, step.equation
        elif numbers and not step.operators:
            kind, result = RESULT_IMPLIED, numbers[-1]
        else:
            kind, result = RESULT_NONE, 0
        operands = set(numbers)
        if kind == RESULT_IMPLIED:
            operands.discard(result)
        signature = 0
        for hashed in step.words:
            signature |= 1 << (hashed >> 55)
        me = len(self.graph.nodes)
        node = Node(sorted(operands), result, kind, step.operators, signature)
        self.graph.nodes.append(node)
        self.spans.append(span)
        if me:
            self.graph.edges.append((me - 1, me, EDGE_NEXT))
        sources = {self.last_result[key] for key in operands if key in self.last_result}
        self.graph.edges += [(source, me, EDGE_USES) for source in sorted(sources)]
        if kind != RESULT_NONE:
            self.last_result[result] = me

    # ---- one pass over the text --------------------------------------------------------------

    def parse(self, text: str) -> Graph:
        data = self.data = text.translate(TRANSLATE).encode().decode("latin-1")
        at = 0
        step = _Step()
        start_of_line = True
        before = ""  # kind of the token before: "", number, word, op, =, close
        before_word = ""
        answer: _Answer | None = None
        boxed: _Answer | None = None
        depth = 0
        asked = False  # the word "answer" was the last word
        while at < len(data):
            if start_of_line:
                start_of_line = False
                at = SKIP_LINE.match(data, at).end()  # type: ignore[union-attr]
                if mark := LIST_MARK.match(data, at):
                    at = mark.end()
                self.begin = at
                if at >= len(data):
                    break
            found = TOKEN.match(data, at)
            assert found is not None
            kind, token = found.lastgroup, found.group()
            here, at = at, found.end()
            if kind == "space" or kind == "bold":
                continue
            if kind == "line" or kind == "end":
                short = len(before_word) == 1 or before_word in ABBREVIATIONS
                if token == "." and before == "word" and short and data[here - 1] not in " \t":
                    continue  # "Mr." ends no sentence
                if answer is not None:
                    self._settle(answer)
                    answer = None
                else:
                    self._flush(step, here)
                step, before, asked = _Step(), "", False
                self.begin = at
                start_of_line = kind == "line"
                continue
            if kind == "note":
                if before == "=":
                    continue
                at = here + 2  # read its inside as ordinary tokens
                continue
            if kind == "hashes" or (asked and token in (":", "=")):
                answer, asked = self._begin_answer(step, answer, here), False
                step, before = _Step(), ""
                continue
            if kind == "latex":
                if token == "\\boxed":
                    boxed, depth = _Answer(), 0
                elif token in ("\\times", "\\cdot"):
                    kind, token = "op", "*"
                elif token == "\\div":
                    kind, token = "op", "/"
                else:
                    continue
                if kind == "latex":
                    continue
            if kind == "other":
                if token == "{":
                    depth += 1
                elif token == "}":
                    depth -= 1
                    if boxed is not None and depth <= 0:
                        self._settle(boxed)
                        boxed = None
                    elif data[at : at + 1] == "{":
                        kind, token = "op", "/"  # \frac{a}{b}
                elif token in ")]":
                    before = "close"
                elif token in ",:":
                    before = ""
                    if step.cut is not None:
                        step.cut.comma = True
                if kind == "other":
                    continue
            if kind == "word":
                word = token.replace("'", "").encode("latin-1").lower().decode("latin-1")
                if asked and word in ("is", "are", "be"):
                    answer, asked = self._begin_answer(step, answer, here), False
                    step, before = _Step(), ""
                    continue
                asked = word in ("answer", "answers")
                if word == "x" and before == "number":
                    kind, token = "op", "*"
                elif word == "equals":
                    kind, token = "op", "="
                elif word in NUMBER_WORDS and answer is None:
                    kind = "number"
                elif word in OPERATORS:
                    kind, token = "op", word
                self._shingle(word)
            else:
                word = ""
                if kind == "number":
                    asked = False
                    self._shingle(token)
            target = answer or boxed
            if kind == "number":
                key = NUMBER_WORDS[word] * MICRO if word else number_key(token)
                if self.negative and data[max(0, here - 2) : here].removesuffix("$")[-1:] == "-":
                    key = -key
                if target is not None:
                    target.number(key)
                if answer is None:
                    self._number(step, key, before, at)
                before = "number"
            elif kind == "op":
                if token == "-":
                    self.negative = before in ("", "op", "=")
                    if self.negative:
                        continue  # a sign
                if token == "=":
                    if target is not None:
                        target.equals()
                    tail = step.cut
                    if answer is None and tail is not None and tail.begins_equation():
                        step.cut = None
                        self._flush(step, step.cut_at)
                        step = tail
                    before = "="
                else:
                    if target is not None:
                        target.operator(token)
                    if answer is None:
                        open_tail = step.cut is not None and not step.cut.numbers
                        if open_tail and (token != "-" or before == "number"):
                            step.retract()  # "= 8 / 2" states no result
                        (step.cut or step).operators |= OPERATORS[token]
                    before = "op"
            else:
                if target is not None:
                    target.word(word)
                if answer is None:
                    self._word(step, word)
                before, before_word = "word", word
        if boxed is not None:
            self._settle(boxed)
        if answer is not None:
            self._settle(answer)
        else:
            self._flush(step, len(data))
        return self._finish()

    negative = False

    def _finish(self) -> Graph:
        graph = self.graph
        with_result = [node for node in graph.nodes if node.result_kind != RESULT_NONE]
        if graph.answer_kind == ANSWER_NONE and with_result:
            # the last result, or the last computed one if the last step speaks of it
            answer, last = with_result[-1].result, graph.nodes[-1]
            stated = [node.result for node in with_result if node.result_kind == RESULT_STATED]
            if stated and (
                stated[-1] in last.numbers
                or (last.result_kind != RESULT_NONE and last.result == stated[-1])
            ):
                answer = stated[-1]
            graph.answer, graph.answer_kind = answer, ANSWER_IMPLIED
        graph.shingles = sorted(self.shingles)
        return graph

    def _begin_answer(self, step: _Step, running: _Answer | None, here: int) -> _Answer:
        if running is None and (step.equation is not None or step.cut is not None):
            self._flush(step, here)
        return _Answer()

    def _settle(self, answer: _Answer) -> None:
        key = answer.key()
        if key is not None:
            self.graph.answer, self.graph.answer_kind = key, ANSWER_EXPLICIT

    def _number(self, step: _Step, key: int, before: str, end: int) -> None:
        if before == "=":
            step.retract()  # a chain "a = b = c", maybe with units between
            step.equation = key
            step.cut, step.cut_at = _Step(), end
        elif step.cut is not None:
            step.cut.numbers.append(key)
        else:
            step.numbers.append(key)

    def _word(self, step: _Step, word: str) -> None:
        if step.cut is not None:
            step.cut.word = True
        if word in STOP or not word:
            return
        if len(word) > 3 and word[-1] == "s" and word[-2] != "s":
            word = word[:-1]
        hashed = mix(fnv(word.encode("latin-1")))
        into = step.cut if step.cut is not None else step
        into.words.append(hashed)
        if step.last_word:
            into.words.append(pair(step.last_word, hashed))
        step.last_word = hashed

    def _shingle(self, word: str) -> None:
        self.window = [*self.window[-2:], mix(fnv(word.encode("latin-1")))]
        if len(self.window) == 3:
            self.shingles.add(pair(pair(self.window[0], self.window[1]), self.window[2]))


class _Answer:
    """A final answer as its tokens come in."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.fraction = 0  # 1: "a /" was read; 2: a / b
        self.second = 0
        self.after_equals = False
        self.words: list[str] = []
        self.tokens = 0

    def number(self, key: int) -> None:
        if self.first is None or self.after_equals:
            self.first, self.fraction, self.after_equals = key, 0, False
        elif self.fraction == 1 and self.tokens == 2:
            self.second, self.fraction = key, 2
        self.tokens += 1

    def operator(self, token: str) -> None:
        if token == "/" and self.tokens == 1 and self.first is not None:
            self.fraction = 1
        self.tokens += 1

    def equals(self) -> None:
        self.after_equals = True
        self.tokens = 0

    def word(self, word: str) -> None:
        self.tokens += 1
        if len(self.words) < 16:
            self.words.append(word)

    def key(self) -> int | None:
        if self.first is not None:
            small = abs(self.first) < HUGE and abs(self.second) < HUGE
            if self.fraction == 2 and self.second and small:
                value = abs(self.first) * MICRO // abs(self.second)
                if value < HUGE:
                    return value if (self.first < 0) == (self.second < 0) else -value
            return self.first
        if not self.words:
            return None
        first = {"yes": "true", "no": "false"}.get(self.words[0], self.words[0])
        if first in ("true", "false") or len(first) == 1:
            words = [first]
        else:
            words = [w for w in self.words if w not in STOP] or [first]
        return HUGE | (mix(fnv(" ".join(words).encode("latin-1"), 0x12345)) & (HUGE - 1))


def parse_text(text: str, max_steps: int) -> Graph:
    """The step graph of one rationale. Raises ValueError beyond `max_steps` steps."""
    return Parser(max_steps).parse(text)


def step_texts(text: str, max_steps: int) -> list[str]:
    """The words of each step of `parse_text`."""
    parser = Parser(max_steps)
    parser.parse(text)
    raw = parser.data.encode("latin-1")
    return [" ".join(raw[a:b].decode(errors="replace").split()) for a, b in parser.spans]


def answer_key(text: str) -> int | None:
    """Canonical key of a final answer given by itself ("1,200 dollars", "(B)", "yes")."""
    graph = Parser(1 << 30).parse("#### " + text.replace("\n", " "))
    return graph.answer if graph.answer_kind == ANSWER_EXPLICIT else None
