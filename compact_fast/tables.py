"""Tables and progress on a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence

Progress = Callable[[int, int], None]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Aligned columns; the first `left` to the left, the others to the right."""
    cells = [list(headers), *(list(r) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def indent(text: str, by: str = "  ") -> str:
    return "\n".join(by + line for line in text.splitlines())


def percent(share: float | None) -> str:
    """A share as "93.1 %"; a dash where it is unknown."""
    return "-" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many decimals; a dash where it is unknown."""
    return "-" if value is None else f"{value:.{digits}f}"


def counted(n: int, noun: str) -> str:
    """ "1 question", "3,000 questions"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def duration(seconds: float) -> str:
    """ "42 s", "3 min 05 s", "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 1 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(number_of_bytes: float) -> str:
    """ "312 kB", "312 MB", "4.2 GB"; decimal units."""
    if number_of_bytes < 1e6:
        return f"{number_of_bytes / 1e3:,.0f} kB"
    if number_of_bytes < 1e9:
        return f"{number_of_bytes / 1e6:,.0f} MB"
    return f"{number_of_bytes / 1e9:,.1f} GB"


_LINE_EVERY = 30.0  # seconds between lines of `show` where there is no terminal


class _Line:
    """One line on stderr that is rewritten in place; silent where stderr is not a terminal."""

    def __init__(self, name: str, unit: str = "") -> None:
        self.name, self.unit = name, unit
        self.told = time.monotonic()
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def due(self) -> bool:
        """Whether it is time to rewrite the line."""
        now = time.monotonic()
        if not self.live or now - self.shown < 0.1:
            return False
        self.shown = now
        return True

    def write(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """Rewrite the line; without a terminal print one now and then."""
        if self.due():
            self.write(text)
        elif not self.live and time.monotonic() - self.told > _LINE_EVERY:
            self.told = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line empty."""
        if self.live:
            self.write("")
            print("\r", end="", file=sys.stderr, flush=True)


class ProgressLine(_Line):
    """Progress towards a known end, with the time left."""

    def __call__(self, done: int, total: int) -> None:
        if done >= total:
            self.close()
        elif self.due():
            passed = time.monotonic() - self.start
            left = f", {duration(passed / done * (total - done))} left" if done else ""
            self.write(f"{self.name}: {done:,} of {total:,}{self.unit}{left}")
