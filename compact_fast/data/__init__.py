"""Records, readers, answer extraction, chat templates, tokenisation and batches."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Names by module, imported on first use: reading records needs no torch. `collate` is named like
# its module, so it is imported from there: `from compact_fast.data.collate import collate`.
_MODULES = {
    "records": ("Question", "Rationale", "select_teachers", "teachers_of"),
    "extract": ("answers_equal", "extract_answer"),
    "readers": ("Questions", "read_questions"),
    "template": ("ChatFormat",),
    "tokenize": ("TokenizedData", "TokenizeOptions", "prompts", "tokenize_questions"),
    "collate": ("Batch", "collate_priors"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
