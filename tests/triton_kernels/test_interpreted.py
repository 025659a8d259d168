"""Runs `interpreted/` in a process of its own, with Triton's interpreter switched on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "interpreted")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_every_family_has_a_twin_that_is_tested():
    tests = "".join(path.read_text() for path in (HERE / "interpreted").glob("test_*.py"))
    for path in (HERE.parents[1] / "triton_kernels").glob("*.py"):
        source = path.read_text()
        twins = re.findall(r"^def (\w+_ref)\(", source, re.MULTILINE)
        if "@triton.jit" in source:
            assert twins, f"{path.name} has kernels and no *_ref"
        for twin in twins:
            if not twin.startswith("_"):
                assert f"{twin}(" in tests, f"{path.name}: {twin} is tested nowhere"
