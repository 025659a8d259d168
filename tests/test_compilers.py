"""The core builds, and its tests pass, with the compilers and machines that this one has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
CMAKE = shutil.which("cmake", path=str(SCRIPTS)) or shutil.which("cmake")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
# name: (C++ compiler and its arguments, processor)
COMPILERS = {
    "gcc": (["g++"], "x86_64"),
    "clang": (["clang++"], "x86_64"),
    "gcc-aarch64": (["aarch64-linux-gnu-g++"], "aarch64"),
    # a clang that brings every target's library (package ziglang)
    "zig": ([sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu"], "x86_64"),
    "zig-aarch64": (
        [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"],
        "aarch64",
    ),
}
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(CMAKE is None, reason="cmake is not installed"),
]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("name", COMPILERS)
def test_core(name: str, tmp_path: Path) -> None:
    command, processor = COMPILERS[name]
    if "ziglang" in command:
        if find_spec("ziglang") is None:
            pytest.skip("the package ziglang is not installed")
    elif shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    compiler = tmp_path / "c++"  # CMake wants one program
    compiler.write_text("#!/bin/sh\nexec " + " ".join(f"'{part}'" for part in command) + ' "$@"\n')
    compiler.chmod(0o755)
    build = tmp_path / "build"
    run(
        [
            str(CMAKE), "-S", str(ROOT), "-B", str(build), "-DCOMPACT_FAST_MODULE=OFF",
            "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILER={compiler}",
            "-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}",
        ],
        tmp_path,
    )  # fmt: skip
    said = run([str(CMAKE), "--build", str(build)], tmp_path)
    warnings = [line for line in said.splitlines() if "warning:" in line]
    assert not warnings, warnings
    machine = run(["od", "-An", "-tu2", "-j18", "-N2", str(build / "core_tests")], tmp_path)
    assert int(machine) == {"x86_64": 62, "aarch64": 183}[processor]  # of the ELF header
    emulator = [] if processor == "x86_64" else [QEMU, "-L", "/usr/aarch64-linux-gnu"]
    if None in emulator:
        pytest.skip("compiled; qemu-aarch64, which would run it, is not installed")
    share = "1000" if emulator else "4000"
    run([*emulator, str(build / "core_tests"), share, share], tmp_path)  # type: ignore[list-item]
    run([*emulator, str(build / "attention_tests"), "60"], tmp_path)  # type: ignore[list-item]
    run([*emulator, str(build / "core_fuzz"), "5000"], tmp_path)  # type: ignore[list-item]
