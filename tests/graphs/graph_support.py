"""Shared by the graph tests."""

import pytest

from compact_fast.graphs.native import load_native

HAS_NATIVE = not isinstance(load_native(), str)
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
