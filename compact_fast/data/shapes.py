"""The record shapes people have, made into questions; every fault is named with its field."""

from __future__ import annotations

import difflib
import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compact_fast.data.extract import option_index, truth_options
from compact_fast.data.records import Question, Rationale

SHAPES = (
    '{"question", "answer", "rationales": [{"teacher", "text"}]}, '
    '{"Question", "CoT", "Answer"}, {"prompt" or "messages", "answer", "teacher", "completion"} '
    'or {"prompt" or "messages", "answer", "teachers", "completions"}'
)
MAX_CHOICES = len(string.ascii_uppercase)


@dataclass
class Parsed:
    """What one row says; unusable where `problems` is not empty."""

    question: Question | None = None
    partial: bool = False
    """The row holds one teacher's completion of a question that other rows may continue."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(field, what is wrong with it)."""


def parse_row(row: Any, place: str, *, need_rationales: bool) -> Parsed:
    """One raw row as a question. `id` stays empty where the row has none."""
    return _RowParser(row, place, need_rationales).parse()


class _RowParser:
    def __init__(self, row: Any, place: str, need_rationales: bool) -> None:
        self.row: Mapping[str, Any] = row if isinstance(row, Mapping) else {}
        self.is_row = isinstance(row, Mapping)
        self.place = place
        self.need_rationales = need_rationales
        self.problems: list[tuple[str, str]] = []

    def parse(self) -> Parsed:
        if not self.is_row:
            self.fault("", "expected a record of named fields")
            return Parsed(problems=self.problems)
        row = self.row
        partial = False
        if "CoT" in row or "Question" in row:
            question, messages = self.text("Question"), None
            rationales = self.numbered("CoT")
            answer = self.gold("Answer")
        elif "rationales" in row or (
            "question" in row and not {"completion", "completions"} & set(row)
        ):
            question, messages = self.text("question", needed="messages" not in row), None
            if row.get("messages") is not None:
                messages = self.conversation("messages")
            rationales = self.rationales("rationales")
            answer = self.gold("answer")
        elif "prompt" in row or "messages" in row or "question" in row:
            question, messages = self.prompt()
            if "completions" in row:
                rationales = self.aligned()
            else:
                partial = "completion" in row or self.need_rationales
                rationales = self.single() if partial else []
            answer = self.gold("answer")
        else:
            columns = ", ".join(map(str, list(row)[:12])) or "none"
            self.fault("", f"no known kind of record; it has the fields {columns}; known: {SHAPES}")
            return Parsed(problems=self.problems)
        if self.need_rationales and not rationales and not self.problems:
            self.fault("rationales", "has none")
        self.teachers_differ(rationales)
        choices = self.choices()
        if choices and answer:
            answer = self.among(answer, choices)
        identity = self.identity()
        if self.problems:
            return Parsed(problems=self.problems)
        if messages and not question:
            question = str(messages[-1]["content"])
        return Parsed(
            Question(
                identity or "",
                question or "",
                answer or "",
                rationales,
                choices,
                messages,
                self.place,
            ),
            partial,
        )

    # ---- fields ------------------------------------------------------------------------------

    def fault(self, where: str, what: str) -> None:
        self.problems.append((where, what))

    def hint(self, name: str) -> str:
        """The field that was perhaps meant by a missing one."""
        others = [str(k) for k in self.row if k != name]
        close = difflib.get_close_matches(name, others, n=1, cutoff=0.75)
        return f"; did you mean {close[0]!r} for it?" if close else ""

    def string(self, value: Any, where: str) -> str | None:
        """A text that is there and not blank."""
        if value is None:
            self.fault(where, f"is missing{self.hint(where)}")
        elif isinstance(value, float) and math.isnan(value):
            self.fault(where, "is NaN, expected text")
        elif not isinstance(value, str):
            self.fault(where, f"expected text, got {_kind(value)}")
        elif not value.strip():
            self.fault(where, "is empty")
        elif not _encodable(value):
            self.fault(where, "holds half a surrogate pair, which no UTF-8 text can")
        else:
            return value
        return None

    def text(self, name: str, *, needed: bool = True) -> str | None:
        if not needed and self.row.get(name) is None:
            return None
        return self.string(self.row.get(name), name)

    def gold(self, name: str) -> str | None:
        """The gold answer; of a worked solution in GSM8K's form only what follows "####"."""
        answer = self.string(_as_text(self.row.get(name)), name)
        if answer is not None and "####" in answer:
            answer = answer.rpartition("####")[2]
            if not answer.strip():
                self.fault(name, 'nothing follows "####"')
                return None
        return answer.strip() if answer is not None else None

    def identity(self) -> str | None:
        value = self.row.get("id")
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.string(value, "id")

    def choices(self) -> list[str] | None:
        value = self.row.get("choices")
        if isinstance(value, Mapping) and "text" in value:
            value = value["text"]  # {"text": [...], "label": [...]}, in letter order as well
        if value is None or value == []:
            return None
        if not isinstance(value, list):
            self.fault("choices", f"expected a list of texts, got {_kind(value)}")
            return None
        if not 2 <= len(value) <= MAX_CHOICES:
            self.fault("choices", f"expected 2 to {MAX_CHOICES} options, got {len(value)}")
        texts = [self.string(_as_text(c), f"choices[{i}]") for i, c in enumerate(value)]
        return [t.strip() for t in texts if t is not None]

    def among(self, answer: str, choices: list[str]) -> str:
        """The gold answer as a letter, or as the option's text for True/False and Yes/No."""
        index = option_index(answer, choices)
        if index is None:
            self.fault("answer", f"{answer!r} is none of the {len(choices)} options in choices")
            return answer
        return choices[index] if truth_options(choices) else string.ascii_uppercase[index]

    # ---- prompts -----------------------------------------------------------------------------

    def prompt(self) -> tuple[str | None, list[dict[str, Any]] | None]:
        name = next(n for n in ("messages", "prompt", "question") if n in self.row)
        if isinstance(self.row[name], list):
            return None, self.conversation(name)
        if name == "messages":
            self.fault(name, f"expected a list of messages, got {_kind(self.row[name])}")
            return None, None
        return self.text(name), None

    def conversation(self, name: str) -> list[dict[str, Any]]:
        value = self.row[name]
        if not isinstance(value, list) or not value:
            self.fault(name, f"expected a list of messages, got {_kind(value)}")
            return []
        messages = []
        for i, message in enumerate(value):
            if not isinstance(message, Mapping):
                self.fault(f"{name}[{i}]", f"expected role and content, got {_kind(message)}")
                continue
            role = self.string(message.get("role"), f"{name}[{i}].role")
            content = self.string(message.get("content"), f"{name}[{i}].content")
            if role and content:
                messages.append({"role": role, "content": content})
        if messages and len(messages) == len(value) and messages[-1]["role"] != "user":
            self.fault(name, f"must end in the user's turn, ends in {messages[-1]['role']!r}")
        return messages

    # ---- rationales --------------------------------------------------------------------------

    def list_of(self, name: str) -> list[Any]:
        value = self.row.get(name)
        if value is None:
            if self.need_rationales:
                self.fault(name, f"is missing{self.hint(name)}")
            return []
        if isinstance(value, Mapping) and all(isinstance(v, list) for v in value.values()):
            # how `datasets` gives a sequence of structures: a structure of sequences
            return [
                dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)
            ]
        if not isinstance(value, list):
            self.fault(name, f"expected a list, got {_kind(value)}")
            return []
        return value

    def rationales(self, name: str) -> list[Rationale]:
        found = []
        for i, item in enumerate(self.list_of(name)):
            where = f"{name}[{i}]"
            if not isinstance(item, Mapping):
                self.fault(where, f"expected teacher and text, got {_kind(item)}")
                continue
            teacher = self.string(item.get("teacher"), f"{where}.teacher")
            text = self.string(item.get("text"), f"{where}.text")
            judged = self.judged(item, f"{where}.")
            if teacher and text:
                found.append(Rationale(teacher, text, *judged))
        return found

    def numbered(self, name: str) -> list[Rationale]:
        texts = [self.string(t, f"{name}[{i}]") for i, t in enumerate(self.list_of(name))]
        return [Rationale(f"teacher-{i + 1}", t) for i, t in enumerate(texts) if t]

    def aligned(self) -> list[Rationale]:
        completions, teachers = self.list_of("completions"), self.list_of("teachers")
        if len(completions) != len(teachers):
            self.fault("teachers", f"{len(teachers)} names for {len(completions)} completions")
        found = []
        for i, (completion, teacher) in enumerate(zip(completions, teachers, strict=False)):
            name = self.string(teacher, f"teachers[{i}]")
            text = self.completion(completion, f"completions[{i}]")
            if name and text:
                found.append(Rationale(name, text))
        return found

    def single(self) -> list[Rationale]:
        teacher = self.text("teacher")
        text = self.completion(self.row.get("completion"), "completion")
        correct = self.judged({"correct": self.row.get("correct")}, "")[1]
        return [Rationale(teacher, text, None, correct)] if teacher and text else []

    def completion(self, value: Any, where: str) -> str | None:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
            return self.string(value[0].get("content"), f"{where}[0].content")
        return self.string(value, where)

    def judged(self, item: Mapping[str, Any], prefix: str) -> tuple[str | None, bool | None]:
        """A rationale's own `answer` and `correct`, both optional."""
        answer = _as_text(item.get("answer"))
        if answer is not None and not isinstance(answer, str):
            self.fault(f"{prefix}answer", f"expected text or a number, got {_kind(answer)}")
            answer = None
        correct = item.get("correct")
        if isinstance(correct, str) and correct.lower() in ("true", "false"):
            correct = correct.lower() == "true"  # a cell of a CSV file
        if correct is not None and correct not in (True, False):
            self.fault(f"{prefix}correct", f"expected true or false, got {_kind(correct)}")
            correct = None
        return answer, None if correct is None else bool(correct)

    def teachers_differ(self, rationales: list[Rationale]) -> None:
        seen: set[str] = set()
        for r in rationales:
            if r.teacher in seen:
                self.fault("rationales", f"teacher {r.teacher!r} occurs twice")
            seen.add(r.teacher)


def group_key(question: Question) -> str:
    """What rows of one question share: the id where there is one, else the prompt."""
    if question.id:
        return f"id {question.id}"
    return json.dumps([question.question, question.messages])


def _as_text(value: Any) -> Any:
    """Numbers and truth values as text: 18, 2.5 and true are fine answers."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)
    return value


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return f"{value}".lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    names = {"str": "text", "list": "a list", "dict": "a record", "NoneType": "nothing"}
    return names.get(type(value).__name__, type(value).__name__)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
