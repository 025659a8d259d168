"""Finds the native module, or says once why there is none."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from types import ModuleType
from typing import Literal

ABI = 2  # of csrc/bindings.cpp
Backend = Literal["auto", "native", "rustworkx"]


class NativeMissingWarning(UserWarning):
    """Graph consensus runs on rustworkx because the native module is missing."""


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
def _say_once(reason: str) -> None:
    warnings.warn(
        f"graph consensus runs on rustworkx, with the same results but slower: {reason}",
        NativeMissingWarning,
        stacklevel=4,
    )


def choose(backend: Backend) -> tuple[ModuleType | None, str]:
    """(native module or None for rustworkx, reason). Raises ValueError for what cannot run.

    COMPACT_FAST_REQUIRE_NATIVE=1 in the environment makes a missing native module an error.
    """
    if backend not in ("auto", "native", "rustworkx"):
        raise ValueError(f"backend={backend!r}: expected auto, native or rustworkx")
    if backend == "rustworkx":
        return None, "asked for"
    found = load_native()
    if isinstance(found, ModuleType):
        return found, "the native module is installed"
    if backend == "native" or os.environ.get("COMPACT_FAST_REQUIRE_NATIVE", "0") not in ("", "0"):
        raise ValueError(f"backend={backend!r}: {found}")
    _say_once(found)
    return None, found


def backend_name(backend: Backend = "auto") -> tuple[str, str]:
    """(name of the backend that would run, why)."""
    module, reason = choose(backend)
    return ("rustworkx" if module is None else "native"), reason
