"""Numbers as people write them: found in text, parsed exactly, printed in one canonical form."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

# Beyond this many digits a figure is no quantity; it also bounds the cost of exact arithmetic.
MAX_DIGITS = 60
MAX_WORDS = 20


@dataclass(frozen=True)
class Numeral:
    """A number at characters [start, end) of a text: sign and digits, no currency, no unit."""

    value: Fraction
    start: int
    end: int
    percent: bool = False
    decimals: int | None = None
    """Digits after the point, where written as a decimal; None for integers and fractions."""

    def __str__(self) -> str:
        return canonical(self.value) + ("%" if self.percent else "")


def canonical(value: Fraction) -> str:
    """ "18", "-0.5", "2/3": a decimal where it ends, a reduced fraction where it does not."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest //= prime
            count += 1
        places = max(places, count)
    if rest != 1 or places > MAX_DIGITS:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * (10**places // value.denominator)).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[:-places]}.{digits[-places:]}"


_THOUSANDS = r"\d{1,3}(?:(?:,\\!|\{,\}|\\,|,)\d{3}(?!\d))+(?:\.\d+)?"
_DECIMAL = rf"(?:{_THOUSANDS}|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
_PATTERN = re.compile(
    rf"""
    (?<![\w^_]) (?<!\d\.)
    (?P<sign> (?<![\w)\]%])[-−–] )?
    (?P<currency> \\?[$€£¥]\s? )?
    (?P<sign2> (?<=[$€£¥])[-−–] )?
    (?:
        (?: (?P<whole> \d+ ) \s* )? \\[dt]?frac \s*
            (?: \{{ (?P<fn>[-−]?\d+) \}} | (?P<fn1>\d) ) \s* (?: \{{ (?P<fd>\d+) \}} | (?P<fd1>\d) )
      | (?P<mixed> \d+ ) (?:\s+|-|\s+and\s+) (?P<mn> \d+ ) / (?P<md> \d+ ) (?![\d/])
      | (?P<number> {_DECIMAL} )
        (?: [eE] (?P<exp> [-+]?\d{{1,3}} ) (?![\w.]) )?
        (?: \s* (?:×|\\times|\\cdot|\*|x) \s* 10 \s* (?:\^|\*\*) \s*
            \{{?\(? (?P<power> [-−]?\d{{1,3}} ) \)?\}}? )?
        (?: \s?/\s? (?P<over> {_DECIMAL} ) (?! \s?/\s?\d ) )?
    )
    (?! (?:st|nd|rd|th)\b )
    (?P<percent> \s* (?: \\?% | \s percent\b | \s per\s cent\b ) )?
    """,
    re.VERBOSE,
)


def numerals(text: str, start: int = 0, end: int | None = None) -> Iterator[Numeral]:
    """Every number written in digits, left to right; digits inside words and ordinals are none."""
    for match in _PATTERN.finditer(text, start, len(text) if end is None else end):
        if (found := _numeral(match)) is not None:
            yield found


def _numeral(match: re.Match[str]) -> Numeral | None:
    if match.end() - match.start() > 4 * MAX_DIGITS:
        return None
    part = match.groupdict()
    decimals = None
    try:
        if part["fn"] or part["fn1"]:
            value = Fraction(
                int((part["fn"] or part["fn1"]).replace("−", "-")), int(part["fd"] or part["fd1"])
            )
            if part["whole"]:
                value += int(part["whole"])
        elif part["mixed"]:
            value = int(part["mixed"]) + Fraction(int(part["mn"]), int(part["md"]))
        else:
            digits = _plain(part["number"])
            value = Fraction(digits)
            decimals = len(digits.partition(".")[2]) or None
            for power in (part["exp"], part["power"]):
                if power:
                    exponent = int(power.replace("−", "-"))
                    if abs(exponent) > MAX_DIGITS:
                        return None
                    value *= Fraction(10) ** exponent
                    decimals = None
            if part["over"]:
                value, decimals = value / Fraction(_plain(part["over"])), None
    except ZeroDivisionError:
        return None
    start = match.start()
    if part["currency"]:
        start = match.end("currency")  # the sign, if it stands before it, is not next to digits
    if part["sign"] or part["sign2"]:
        value = -value
    end = match.start("percent") if part["percent"] else match.end()
    return Numeral(value, start, end, percent=bool(part["percent"]), decimals=decimals)


def _plain(digits: str) -> str:
    return re.sub(r",\\!|\{,\}|\\,|,", "", digits)


_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_WORDS = {
    **{word: value for value, word in enumerate(_SMALL)},
    **{word: 10 * (i + 2) for i, word in enumerate(_TENS)},
}
_ANY_WORD = "|".join(sorted([*_WORDS, *_SCALES], key=len, reverse=True))
_WORD_PATTERN = re.compile(
    rf"\b(?:(?P<minus>minus|negative)\s+)?"
    rf"(?P<words>(?:{_ANY_WORD})(?:(?:[\s-]+|\s+and\s+)(?:{_ANY_WORD}))*)\b",
    re.IGNORECASE,
)


def number_words(text: str, start: int = 0, end: int | None = None) -> Iterator[Numeral]:
    """Numbers written as words, such as "twelve" or "one hundred and five", left to right."""
    for match in _WORD_PATTERN.finditer(text, start, len(text) if end is None else end):
        words = re.split(r"[\s-]+", match["words"].lower())
        if len(words) > MAX_WORDS:
            continue
        total = group = 0
        for word in words:
            if word in _WORDS:
                group += _WORDS[word]
            elif word == "hundred":
                group = max(group, 1) * 100
            elif word in _SCALES:
                total += max(group, 1) * _SCALES[word]
                group = 0
        value = Fraction(total + group)
        yield Numeral(-value if match["minus"] else value, match.start(), match.end())


def same_number(a: Numeral, b: Numeral) -> bool:
    """Equal in value; "5%" equals both 5 and 0.05; 0.333 equals 1/3 (three places or more)."""
    if a.value == b.value:
        return True
    if a.percent != b.percent:
        share, plain = (a, b) if a.percent else (b, a)
        return share.value / 100 == plain.value
    for decimal, exact in ((a, b), (b, a)):
        if (decimal.decimals or 0) >= 3 and exact.decimals is None and exact.value.denominator > 1:
            off = abs(decimal.value - exact.value)
            return off * 2 * Fraction(10) ** (decimal.decimals or 0) <= 1
    return False
