"""The final answer a text states, where it states it, and whether two answers are the same."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from compact_fast.data.numerals import Numeral, number_words, numerals, same_number


@dataclass(frozen=True)
class Found:
    """A final answer at characters [start, end) of a text."""

    value: str
    """A number in canonical form ("1234.5", "2/3", "5%"), a letter, "Yes", "True", or text."""
    start: int
    end: int
    explicit: bool
    """Whether the text says that this is its answer, rather than merely ending in it."""


def extract_answer(text: str, choices: Sequence[str] | None = None) -> str | None:
    """The final answer that `text` states, or None.

    With `choices` (in letter order) the letter of an option, or, where the options are True and
    False or Yes and No, the option itself. Without: a number in canonical form, a letter in
    parentheses, yes/no/true/false, or the short text behind "the answer is".
    """
    found = find_answer(text, choices)
    return found.value if found else None


def answers_equal(a: str | None, b: str | None, choices: Sequence[str] | None = None) -> bool:
    """Whether two answers are the same: as options where there are `choices`, as numbers where
    both are numbers (units, currency and thousands aside), else as words. None equals nothing."""
    if a is None or b is None:
        return False
    if choices:
        i, j = option_index(a, choices), option_index(b, choices)
        if i is not None and j is not None:
            return i == j
    x, y = as_number(a), as_number(b)
    if x is not None and y is not None:
        return same_number(x, y)
    if (x is None) != (y is None):
        return False
    truth = _truth(a), _truth(b)
    if None not in truth:
        return truth[0] == truth[1]
    return _words(a) == _words(b) != ""


def find_answer(text: str, choices: Sequence[str] | None = None) -> Found | None:
    """The final answer with its place: the last explicit statement, else what the text ends in."""
    credited = _credited_option(text, choices) if choices else None
    for start, end in _statements(text):
        if credited and credited.start > start:
            break
        found = _stated(text, start, end, choices)
        if found:
            return found
    return credited or _ending(text, choices)


def find_span(text: str, gold: str, choices: Sequence[str] | None = None) -> tuple[int, int] | None:
    """Characters [start, end) at which `text` states the gold answer, or None.

    A text that says that its answer is another one does not state the gold answer, even where the
    same figure occurs on the way; one that says nothing of the kind is searched in its last
    sentence that holds a figure (the whole text where the gold answer is words).
    """
    found = find_answer(text, choices)
    if found and answers_equal(found.value, gold, choices):
        return found.start, found.end
    if found and found.explicit:
        return None
    target = as_number(gold)
    if target is None or choices:
        return None if choices or len(_words(gold)) < 2 else _last_mention(text, gold)
    for start, end in reversed(_sentences(text)):
        figures = list(numerals(text, start, end))
        if figures:
            same = [n for n in figures if same_number(n, target)]
            return (same[-1].start, same[-1].end) if same else None
    return None


# More statements than this are not read: each costs a pass over the text behind it.
MAX_STATEMENTS = 16
TAIL = 400

# ---- statements ------------------------------------------------------------------------------

_LINK = r"(?:is|are|was|be|equals|[:=]|=>|->|→)"
_MARKER = re.compile(
    rf"""
      \#\#\#\#
    | \\(?:boxed|fbox)\s*(?=\{{)
    | \b(?:answer|option|choice|result|solution)\b
      (?:\s+(?:choice|option|here|value|(?:to|for|of)\s[^.\n]{{1,80}}?))?
      [\s*_]{{0,9}} (?:(?:would|must|should|will|can\s+only|therefore|thus|hence)\s+)* {_LINK}
      (?!\s*n[o']t\b) [\s*_:]*
    | \*\*\s*(?:final\s+)?answer\s*\*\*
    """,
    re.VERBOSE | re.IGNORECASE,
)
# A sentence ends at ".", "!" or "?" before a blank or the end; "e.g. 5" is rare enough.
_SENTENCE_END = re.compile(r"[.!?][)\]\"'”*$]*(?=\s|$)|\n+")


def _statements(text: str) -> Iterator[tuple[int, int]]:
    """Ranges of text right behind "the answer is", "####" or a box; the last one first."""
    # Most texts state their answer at the end; only others are searched from the beginning.
    markers = list(_MARKER.finditer(text, max(0, len(text) - TAIL)))
    markers = markers or list(_MARKER.finditer(text))
    for marker in reversed(markers[-MAX_STATEMENTS:]):
        start = marker.end()
        if "boxed" in marker[0] or "fbox" in marker[0]:
            yield start + 1, _closing_brace(text, start)
            continue
        if re.match(r"(?:result|solution)\b", marker[0], re.IGNORECASE) and "\n" in text[start:]:
            continue  # in the middle of a working these words announce a step
        blank = re.compile(r"(?:[\s*_$:]|\\[(\[])*").match(text, start)
        first = blank.end() if blank else start
        stop = _SENTENCE_END.search(text, first)
        yield start, stop.start() if stop else len(text)


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return len(text)


def _stated(text: str, start: int, end: int, choices: Sequence[str] | None) -> Found | None:
    """The answer inside a statement's range."""
    if choices:
        place = _stated_option(text, start, end, choices)
        return Found(_option_name(place[0], choices), *place[1:], explicit=True) if place else None
    box = text.find("\\boxed{", start, end)
    if box >= 0:
        start, end = box + 7, _closing_brace(text, box + 6)
    letter = re.compile(r"[\s*_$\"'“]*(?:\\text\{)?\(?([A-J])(?:[).:]|[*\"'”}\s]*$)").match(
        text, start, end
    )
    if letter:
        return Found(letter[1], letter.start(1), letter.end(1), explicit=True)
    truth = re.compile(r"[\s*_\"'“(]*(yes|no|true|false)\b", re.IGNORECASE).match(text, start, end)
    if truth:
        return Found(truth[1].capitalize(), truth.start(1), truth.end(1), explicit=True)
    number = _stated_number(text, start, end)
    if number:
        return Found(str(number), number.start, number.end, explicit=True)
    return _stated_words(text, start, end)


_OPERATOR = re.compile(r"[+*/×÷]|\s[-−]\s|\\times|\\cdot|\\div|\dx\d|\sx\s")
_ASIDE = re.compile(r"[;(]|, |because|since")


def _stated_number(text: str, start: int, end: int) -> Numeral | None:
    figures = list(numerals(text, start, end))
    if not figures:
        return next(number_words(text, start, end), None)
    first = figures[0]
    equals = text.rfind("=", start, end)
    between = text[first.end : equals]
    # "the answer is 20 * 15 = 300": a working, whose result stands behind the last "=".
    if equals > first.end and _OPERATOR.search(between) and not _ASIDE.search(between):
        return next((n for n in figures if n.start > equals), first)
    return first


_REFUSAL = re.compile(
    r"\b(?:cannot|can't|can not|could not|couldn't|impossible|unknown|unclear|undetermined|"
    r"undefined|indeterminate|not\s+(?:given|known|clear|possible|enough|provided|stated)|"
    r"insufficient|none of)\b",
    re.IGNORECASE,
)


def _stated_words(text: str, start: int, end: int) -> Found | None:
    edge = string.whitespace + "*_$\"'“”.:,;!?"
    while start < end and text[start] in edge:
        start += 1
    while end > start and text[end - 1] in edge:
        end -= 1
    words = text[start:end]
    if not words or len(words.split()) > 10 or _REFUSAL.search(words):
        return None
    return Found(words, start, end, explicit=True)


# ---- what a text ends in ----------------------------------------------------------------------


def _sentences(text: str) -> list[tuple[int, int]]:
    bounds = [0, *(m.end() for m in _SENTENCE_END.finditer(text)), len(text)]
    return [(a, b) for a, b in pairwise(bounds) if text[a:b].strip()]


def _ending(text: str, choices: Sequence[str] | None) -> Found | None:
    sentences = _sentences(text)
    if not sentences:
        return None
    start, end = sentences[-1]
    if choices:
        place = _ending_option(text, sentences, choices)
        return Found(_option_name(place[0], choices), *place[1:], explicit=False) if place else None
    letter = re.search(r"\(([A-J])\)[\s.*]*$", text)
    if letter:
        return Found(letter[1], letter.start(1), letter.end(1), explicit=False)
    truth = re.match(r"\W*(yes|no|true|false)(?=[,.!:;]|\W*$)(?!\.\s+of\b)", text, re.IGNORECASE)
    truth = truth or re.search(r"\b(yes|no|true|false)\W*$", text, re.IGNORECASE)
    if truth:
        return Found(truth[1].capitalize(), truth.start(1), truth.end(1), explicit=False)
    *_, worded = [None, *number_words(text, start, end)]
    if worded and not text[worded.end : end].strip(" .!*\n"):
        return Found(str(worded), worded.start, worded.end, explicit=False)
    bold = re.findall(r"\*\*[^*\n]+\*\*", text[start:end])
    if len(bold) == 1:  # the one thing the last sentence stresses
        at = text.find(bold[0], start)
        for n in numerals(text, at, at + len(bold[0])):
            return Found(str(n), n.start, n.end, explicit=False)
    number = _concluded_number(text, sentences)
    return Found(str(number), number.start, number.end, explicit=False) if number else None


_CONCLUSION = re.compile(r"\b(?:therefore|thus|so|hence|in conclusion|finally)\b", re.IGNORECASE)


def _concluded_number(text: str, sentences: Sequence[tuple[int, int]]) -> Numeral | None:
    """The result of the last "=" at its last mention, unless a sentence that concludes from it
    ("Therefore, ...") holds other figures: then its first. Without "=" the last figure."""
    figures = list(numerals(text))
    if not figures:
        return None
    start = sentences[-1][0]
    *_, conclusion = [None, *_CONCLUSION.finditer(text, start)]
    concludes = conclusion is not None or len(sentences) == 1
    since = conclusion.end() if conclusion else start
    concluded = [n for n in figures if n.start >= since] or [n for n in figures if n.start >= start]
    equals = text.rfind("=")
    result = next((n for n in figures if n.start > equals), None) if equals >= 0 else None
    if result:
        again = [n for n in figures if n.start >= result.start and same_number(n, result)]
        if again[-1].start >= start or not concludes or not concluded:
            return again[-1]
    if concludes and concluded:
        return concluded[0]
    return figures[-1]


def _last_mention(text: str, words: str) -> tuple[int, int] | None:
    pattern = r"\W+".join(re.escape(w) for w in re.findall(r"\w+", words))
    if not pattern:
        return None
    places = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE))
    return places[-1].span() if places else None


# ---- options ----------------------------------------------------------------------------------

_TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def _truth(answer: str) -> bool | None:
    return _TRUTH.get(_words(answer))


def _words(answer: str) -> str:
    words = re.findall(r"[\w.%/+-]*\w[\w%]*", answer.casefold())
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def truth_options(choices: Sequence[str]) -> bool:
    """Whether the options are True and False, or Yes and No; their answer is then named by text."""
    return len(choices) == 2 and {_truth(c) for c in choices} == {True, False}


def _option_name(index: int, choices: Sequence[str]) -> str:
    return choices[index] if truth_options(choices) else string.ascii_uppercase[index]


def option_index(answer: str, choices: Sequence[str]) -> int | None:
    """The option that an answer names: by letter, text, truth value or number; None: no option."""
    answer = answer.strip()
    texts = [_words(c) for c in choices]
    if truth_options(choices) and (truth := _truth(answer)) is not None:
        return [_truth(c) for c in choices].index(truth)
    letter = re.fullmatch(r"[(\[]?([A-Za-z])[)\].:]*", answer)
    if letter and ord(letter[1].upper()) - ord("A") < len(choices):
        return ord(letter[1].upper()) - ord("A")
    labelled = re.match(r"[(\[]?([A-Z])[)\].:]+\s*(.+)", answer, re.DOTALL)
    if labelled and ord(labelled[1]) - ord("A") < len(choices):
        return ord(labelled[1]) - ord("A")
    if texts.count(_words(answer)) == 1:
        return texts.index(_words(answer))
    number = as_number(answer)
    if number is not None:
        same = [
            i
            for i, c in enumerate(choices)
            if (n := as_number(c)) is not None and same_number(n, number)
        ]
        return same[0] if len(same) == 1 else None
    return None


Place = tuple[int, int, int]  # option, start, end


def _stated_option(text: str, start: int, end: int, choices: Sequence[str]) -> Place | None:
    if truth_options(choices):
        return _truth_place(text, start, end, choices, last=False)
    last = string.ascii_uppercase[len(choices) - 1]
    letter = re.compile(
        rf"[\s*_$\"'“:]*(?:(?:option|choice|letter)\s+)?(?:\\(?:boxed|text|textbf|mathrm)\{{)*"
        rf"(?:[(\[]\s?([A-{last}a-{last.lower()}])(?=[)\].:\s]|$)|"
        rf"([A-{last}a-{last.lower()}])(?=[).:,*\"'”}}\]<>]|\s*$)|([A-{last}])(?=\s|[-–—]))"
    ).match(text, start, end)
    mention = _option_mention(text, start, end, choices)
    if letter:
        group = next(g for g in (1, 2, 3) if letter[g])
        # "the answer is A dull green marble": an article, where that is what an option says.
        if not (group == 3 and letter[3] == "A" and mention and mention[1] <= letter.end() + 1):
            return ord(letter[group].upper()) - ord("A"), letter.start(group), letter.end(group)
    if mention:
        return mention
    inner = re.compile(
        rf"\b(?:option|choice)\s+\(?([A-{last}])\b|\(([A-{last}])\)", re.IGNORECASE
    ).search(text, start, end)
    if inner:
        group = 1 if inner[1] else 2
        return ord(inner[group].upper()) - ord("A"), inner.start(group), inner.end(group)
    return None


def _credited_option(text: str, choices: Sequence[str]) -> Found | None:
    """The last "option B is correct", "(B) is the answer"."""
    if truth_options(choices):
        return None
    last = string.ascii_uppercase[len(choices) - 1]
    credited = list(
        re.finditer(
            rf"(?:\b(?:option|choice)\s+\(?([A-{last}])\)?|\(([A-{last}])\))(?:\s+[^.\n]{{0,60}}?)?"
            rf"\s+is\s+(?:the\s+)?(?:only\s+)?(?:correct|right|best|answer)\b",
            text,
            re.IGNORECASE,
        )
    )
    if not credited:
        return None
    match = credited[-1]
    group = match.lastindex or 0
    name = _option_name(ord(match[group].upper()) - ord("A"), choices)
    return Found(name, match.start(group), match.end(group), explicit=True)


def _option_mention(text: str, start: int, end: int, choices: Sequence[str]) -> Place | None:
    """The option whose text is mentioned first; the longest one where several begin there."""
    places = []
    for i, choice in enumerate(choices):
        words = re.findall(r"\w+", choice)
        if words:
            pattern = r"\W+".join(re.escape(w) for w in words)
            match = re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE).search(text, start, end)
            if match:
                places.append((match.start(), -match.end(), i))
    if not places:
        return None
    at, minus_end, i = min(places)
    return i, at, -minus_end


def _truth_place(
    text: str, start: int, end: int, choices: Sequence[str], *, last: bool
) -> Place | None:
    found = list(re.compile(r"\b(true|false|yes|no)\b", re.IGNORECASE).finditer(text, start, end))
    if not found:
        return None
    match = found[-1 if last else 0]
    index = [_truth(c) for c in choices].index(_truth(match[1]))
    return index, match.start(), match.end()


def _ending_option(
    text: str, sentences: Sequence[tuple[int, int]], choices: Sequence[str]
) -> Place | None:
    start, end = sentences[-1]
    if truth_options(choices):
        opening = re.match(r"\W*(yes|no|true|false)\b", text, re.IGNORECASE)
        place = _truth_place(text, start, end, choices, last=True)
        if place or not opening:
            return place
        return _truth_place(text, 0, opening.end(), choices, last=False)
    last = string.ascii_uppercase[len(choices) - 1]
    letters = list(
        re.compile(
            rf"\(([A-{last}])\)|\b(?:option|choice)\s+([A-{last}])\b|^\s*([A-{last}])[).:]?\s*$"
            rf"|\b([A-{last}])\s+is\s+(?:the\s+)?(?:correct|right|best)",
            re.MULTILINE,
        ).finditer(text, start, end)
    )
    letters = letters or list(re.compile(rf"^\W*([A-{last}])(?:[).:]|\W*$)").finditer(text))
    named = {m[m.lastindex or 0] for m in letters}
    if len(named) == 1:
        match = letters[-1]
        group = match.lastindex or 0
        return ord(match[group]) - ord("A"), match.start(group), match.end(group)
    mentioned = [
        (i, place[1], place[2])
        for i, choice in enumerate(choices)
        if (place := _option_mention(text, start, end, [choice]))
    ]
    # An option inside a longer one ("metal" in "a metal ring") is no mention of its own.
    outer = [
        p for p in mentioned if not any(q != p and q[1] <= p[1] and p[2] <= q[2] for q in mentioned)
    ]
    return outer[0] if len(outer) == 1 else None


def as_number(answer: str) -> Numeral | None:
    """The number that an answer is, or None where it is something else.

    A currency sign, a unit ("18 dollars"), LaTeX or markdown dress and a final period do not
    matter; a second figure does ("3 or 4").
    """
    figures = list(numerals(answer)) or list(number_words(answer))
    if len(figures) != 1:
        return None
    before = answer[: figures[0].start].strip(" \t\n$€£¥*_\\({[=:-−")
    return (
        figures[0]
        if not re.search(r"\w", before)
        or re.fullmatch(
            r"(?:text|boxed|approximately|about|approx\.?|[a-z]\s*=?|USD|Rs\.?)",
            before.strip("{} ="),
        )
        else None
    )
