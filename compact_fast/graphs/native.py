"""Native or rustworkx: chooses, and says once why not the native module."""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType
from typing import Literal

from compact_fast.native import load_native

Backend = Literal["auto", "native", "rustworkx"]


class NativeMissingWarning(UserWarning):
    """Graph consensus runs on rustworkx because the native module is missing."""


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
