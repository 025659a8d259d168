"""Words, characters and numbers for the Python parser; twin of csrc/{text,lexicon,numbers}.cpp."""

from __future__ import annotations

import re

MICRO = 1_000_000
HUGE = 1 << 62  # keys of numbers beyond 12 digits, and of answers in words: this bit plus a hash
_MASK64 = (1 << 64) - 1

TRANSLATE = str.maketrans(
    {
        "×": "*", "⋅": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "—": " , ", "’": "'",
        "‘": "'", "“": '"', "”": '"', "•": "\n", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
        "≈": "=", "€": "$", "£": "$", "¥": "$", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ",
        "⅓": " 1/3 ", "⅔": " 2/3 ", "\u2028": "\n", "、": ",", "。": ". ", "，": ", ", "：": ":",
        "\ufeff": " ",
    }
)  # fmt: skip

NUMBER_WORDS = {
    "zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14,
    "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20,
    "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
OPERATORS = {"+": 1, "-": 2, "*": 4, "/": 8, "plus": 1, "minus": 2, "times": 4, "divided": 8}
_STOP_TEXT = """
a an and are as at be been by can do does for from had has have he her his if in into is it its of
on or she so that the their them then there they this to was we were will with you therefore thus
hence step first second next finally because since i our
"""
STOP = frozenset(_STOP_TEXT.split())
_ABBREVIATION_TEXT = "mr mrs ms dr st vs etc eg ie prof jr sr approx"
ABBREVIATIONS = frozenset(_ABBREVIATION_TEXT.split())

SKIP_LINE = re.compile(r"(?:[ \t*>_]|#(?!###)|-(?=[ \t]))*")
LIST_MARK = re.compile(
    r"(?:[Ss]tep[ \t]+\d{1,4}[ \t]*[:.)-]?|\(?\d{1,3}[.)](?=[ \t])|\([A-Za-z]\)(?=[ \t]))"
)
TOKEN = re.compile(
    r"(?P<space>[ \t\r\f\v\0]+)"
    r"|(?P<line>\n)"
    r"|(?P<note><<[^<>\n]{0,200}>>)"
    r"|(?P<hashes>####)"
    r"|(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"|(?P<word>[A-Za-z\x80-\xff][A-Za-z0-9'\x80-\xff]*)"
    r"|(?P<latex>\\[A-Za-z]+)"
    r"|(?P<end>[.!?;](?=[\s\"')*\]]|\Z))"
    r"|(?P<bold>\*\*+)"
    r"|(?P<op>[-+*/=])"
    r"|(?P<other>[\x00-\xff])",
    re.ASCII,
)


def fnv(data: bytes, seed: int = 0xCBF29CE484222325) -> int:
    """64-bit FNV-1a."""
    for byte in data:
        seed = ((seed ^ byte) * 0x100000001B3) & _MASK64
    return seed


def mix(value: int) -> int:
    """Finaliser of splitmix64: spreads a hash over all bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def pair(a: int, b: int) -> int:
    return mix((a * 0x9E3779B97F4A7C15 + b) & _MASK64)


def number_key(text: str) -> int:
    """Canonical integer of a number's spelling: millionths, or a tagged hash beyond 12 digits."""
    whole, _, decimals = text.replace(",", "").partition(".")
    whole = whole.lstrip("0")
    if len(whole) > 12:
        kept = decimals.rstrip("0")
        return HUGE | (mix(fnv((whole + "." + kept).encode())) & (HUGE - 1))
    micro = int((decimals[:6]).ljust(6, "0"))
    if len(decimals) > 6 and decimals[6] >= "5":
        micro += 1
    return int(whole or "0") * MICRO + micro
