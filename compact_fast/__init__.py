"""compact_fast: the performance core for COMPACT, multi-teacher chain-of-thought distillation."""

from __future__ import annotations

import importlib
from typing import Any

from compact_fast._version import __version__

# name -> module; loaded on first use, so that `import compact_fast` does not import torch
_PUBLIC = {
    "CompactConfig": "config",
    "TokenLayout": "layout",
    "CompactOutput": "loss",
    "compact_loss": "loss",
    "token_logp": "loss",
    "get_backend": "backends",
    "available_backends": "backends",
    "parse_rationales": "graphs",
    "match": "graphs",
    "agreement": "graphs",
    "consensus": "graphs",
    "CompactTrainer": "trainer",
    "CompactTrainingArguments": "trainer",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'compact_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"compact_fast.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
