"""Names in pictures: what matplotlib's own font can draw, and what stands for the rest."""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import findfont, get_font


def drawable(name: str, index: int, noun: str = "teacher") -> str:
    """The name on one line, or "teacher 3" where the font lacks a character of it.

    Matplotlib's own font has no Chinese, Japanese or Korean; empty boxes would name nobody.
    """
    name, known = " ".join(name.split()), _characters()
    return name if name and all(ord(c) in known for c in name) else f"{noun} {index + 1}"


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
