"""Rationales beyond the limits of a step graph: they take part by their final answers alone.

One such text must not stop a run of thousands. It is compared as a text without steps is: its
final answer decides how far it agrees with the others, and no step speaks for or against it.
"""

from __future__ import annotations

from collections.abc import Sequence

from compact_fast.graphs.native import Backend
from compact_fast.graphs.options import GraphOptions, check_options
from compact_fast.graphs.parsing import BeyondLimitsError, parse_rationales

_NAMED = 3  # places that a sentence spells out
_MOST_BYTES = 4  # of a character in UTF-8


def stand_ins(
    texts: Sequence[str],
    *,
    find_answers: bool,
    options: GraphOptions | None = None,
    backend: Backend = "auto",
) -> tuple[list[str], list[int]]:
    """The texts, those beyond the options' limits without their steps, and the places of these.

    With `find_answers` what stands in for a text states the text's final answer, in the way that
    the step graphs' parser reads; else it is empty, for the answers are given beside the texts.
    """
    options = check_options(options)
    out = list(texts)
    places = [s for s, text in enumerate(out) if _is_beyond(text, options, backend)]
    for s in places:
        out[s] = _statement(out[s]) if find_answers else ""
    return out, places


def limits_sentence(places: Sequence[str], options: GraphOptions | None = None) -> str:
    """What became of the rationales at `places`, and the first of them, for people."""
    options = check_options(options)
    n = len(places)
    what = "1 rationale has" if n == 1 else f"{n:,} rationales have"
    more = f"; and {n - _NAMED:,} more" if n > _NAMED else ""
    return (
        f"{what} more than {options.max_steps:,} steps or {options.max_bytes:,} bytes and "
        f"{'is' if n == 1 else 'are'} compared by the final answer alone: "
        f"{'; '.join(places[:_NAMED])}{more}"
    )


def _is_beyond(text: str, options: GraphOptions, backend: Backend) -> bool:
    # a step takes a character at least: most texts need not be parsed
    if len(text) <= options.max_steps and _MOST_BYTES * len(text) <= options.max_bytes:
        return False
    try:
        parse_rationales([text], options=options, backend=backend, threads=1)
    except BeyondLimitsError:
        return True
    return False


def _statement(text: str) -> str:
    # imported where it is needed, which is seldom: it brings all of the readers
    from compact_fast.data.extract import extract_answer

    answer = extract_answer(text)
    return "" if answer is None else "#### " + " ".join(answer.split())
