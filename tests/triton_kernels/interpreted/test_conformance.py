"""The suite that every backend must pass, with the repaired interpreter."""

from compact_fast.backends.triton_backend import TritonBackend
from compact_fast.testing import check_backend


def test_conformance():
    check_backend(TritonBackend())
