"""The examples as a stranger's packages: installed, found by entry point, judged, used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compact_fast.conformance.checks import CHECKS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment in which the third-party backend is installed."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "numpy_backend"
    source.mkdir()
    for file in (EXAMPLES / "numpy_backend").glob("*.*"):
        (source / file.name).write_bytes(file.read_bytes())
    install = ["pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", *install, str(source)], check=True, timeout=300)
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def run(environment, *command, cwd):
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_third_party_backend_is_found_and_passes(environment, tmp_path):
    suite = ("-m", "pytest", "-q", "--pyargs", "compact_fast.conformance", "--backend", "numpy")
    code, output = run(environment, *suite, cwd=tmp_path)
    assert code == 0, output
    assert f"{len(CHECKS)} passed" in output


def test_a_frontend_of_its_own_trains_through_it(environment, tmp_path):
    losses = {}
    for backend in ("numpy", "torch"):
        code, output = run(environment, str(EXAMPLES / "own_loop.py"), backend, cwd=tmp_path)
        assert code == 0, output
        rows = [line.split() for line in output.splitlines() if line.startswith("step")]
        losses[backend] = [float(row[3]) for row in rows]
        assert losses[backend][-1] < losses[backend][0] / 3
        assert rows[-1][-1] == "0.000"  # the teacher that is off by one
    assert losses["numpy"] == pytest.approx(losses["torch"], abs=2e-2)


def test_a_plugin_that_cannot_be_loaded_says_why(environment, tmp_path):
    broken = tmp_path / "broken-1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[compact.backends]\nbroken = nowhere:Backend\n")
    path = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    program = (
        "from compact_fast import available_backends, get_backend\n"
        "print(available_backends())\n"
        "try:\n    get_backend('broken')\nexcept ValueError as e:\n    print('ERROR', e)\n"
    )
    code, output = run({**environment, "PYTHONPATH": path}, "-c", program, cwd=tmp_path)
    assert code == 0, output
    assert "'numpy': True" in output
    assert "ERROR backend 'broken' (nowhere:Backend) cannot be loaded: No module named" in output
