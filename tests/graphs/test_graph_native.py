"""What happens without the native module: said once, or an error where it is required."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, sys, warnings
sys.modules["compact_fast._native"] = None      # importing it raises ImportError
from compact_fast.graphs import consensus, backend_name, parse_rationales
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        found = consensus(["1 + 2 = 3", "2 + 1 = 3", "4"], [0, 3])
        parse_rationales(["a"])
assert found.backend == "rustworkx", found.backend
assert "not installed" in found.backend_reason, found.backend_reason
said = [str(w.message) for w in caught]
assert len(said) == 1, said
assert "runs on rustworkx" in said[0], said
try:
    consensus(["a"], [0, 1], backend="native")
except ValueError as error:
    assert "install CMake and a C++17 compiler" in str(error)
else:
    raise AssertionError("backend='native' must fail")
print("fine")
"""


def run(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        timeout=120,
    )


def test_missing_module_is_said_once() -> None:
    done = run(SCRIPT, COMPACT_FAST_REQUIRE_NATIVE="")
    assert done.stdout.strip() == "fine", done.stderr


def test_required_module_is_an_error() -> None:
    done = run(SCRIPT, COMPACT_FAST_REQUIRE_NATIVE="1")
    assert "ValueError: backend='auto': the native module is not installed" in done.stderr


def test_module_of_another_version_is_refused() -> None:
    script = """
import sys, types
module = types.ModuleType("compact_fast._native"); module.abi = -1
sys.modules["compact_fast._native"] = module
from compact_fast.graphs import backend_name
print(*backend_name())
"""
    done = run(script, COMPACT_FAST_REQUIRE_NATIVE="")
    assert done.stdout.startswith("rustworkx the native module was built for another version")


def test_import_is_light() -> None:
    done = run("import sys, compact_fast.graphs; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("value", ["", "0"])
def test_unset_requirement(value: str) -> None:
    done = run(SCRIPT, COMPACT_FAST_REQUIRE_NATIVE=value)
    assert done.stdout.strip() == "fine", done.stderr
