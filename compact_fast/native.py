"""Finds the native module, or says why there is none."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

logger = logging.getLogger(__name__)

ABI = 9  # of csrc/bindings.cpp


@cache
def load_native() -> ModuleType | str:
    """The module `compact_fast._native`, or the reason why it cannot be used."""
    try:
        module = importlib.import_module("compact_fast._native")
    except ImportError as error:
        return (
            f"the native module is not installed ({error}); install CMake and a C++17 compiler "
            "and install compact-fast again"
        )
    if getattr(module, "abi", None) != ABI:
        return (
            f"the native module was built for another version (abi {getattr(module, 'abi', None)}, "
            f"need {ABI}); install compact-fast again"
        )
    return module


@cache
def native_with(function: str, without: str) -> ModuleType | None:
    """The module if it has that function, or None; then the log says what it is like `without`.

    A compiler that knows no vectors builds it without some.
    """
    module = load_native()
    if not isinstance(module, str) and hasattr(module, function):
        return module
    why = module if isinstance(module, str) else "built by another compiler"
    logger.info("%s: %s", without, why)
    return None
