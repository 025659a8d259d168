"""What the user sees beside a verb's own output: errors, warnings, notes; and what is silenced."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO


def say(line: str) -> None:
    print(f"compact-fast: {line}", file=sys.stderr)


def say_error(line: str) -> None:
    say(f"error: {line}")


class _OneLine(logging.Handler):
    """The package's log records, one line each on stderr, every text once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text not in self._said:
            self._said.add(text)
            prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            print(f"{prefix}{text}", file=sys.stderr)


def quieten(debug: bool) -> None:
    """Keep the libraries' chatter off the terminal, unless debugging. Call before importing them.

    Warnings of this package, and of others about values (RuntimeWarning, ...), stay, one line each.
    """
    logger = logging.getLogger("compact_fast")
    if not any(isinstance(h, _OneLine) for h in logger.handlers):
        logger.addHandler(_OneLine())
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False
    if debug:
        return
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "true"),
        # elsewhere a bar is a heap of half lines; on a terminal it belongs to a slow step
        *(() if sys.stderr.isatty() else (("TQDM_DISABLE", "1"),)),
    ):
        os.environ.setdefault(name, value)
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    for module in ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub"):
        warnings.filterwarnings("ignore", category=UserWarning, module=rf"{module}(\.|$)")
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)
