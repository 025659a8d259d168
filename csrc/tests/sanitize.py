"""The core under sanitizers: its own tests, fuzzed inputs, and the graph tests through Python.

    python csrc/tests/sanitize.py [address,undefined] [thread]

Needs gcc with its sanitizers, on Linux. A build lies in build/sanitize-NAME, with a copy
of the package that imports it. Ends with an error at the first report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
LIBRARY = {"address,undefined": "libasan.so", "thread": "libtsan.so"}
# What Python itself never frees is no leak of ours; the C++ tests, without Python, look for leaks
PYTHON_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=99",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    # threads of libraries that are not built for the sanitizer are none of ours either
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=99",
}
# Sanitizers keep freed memory for a while, and need address space: neither can be judged here. The
# thread sanitizer knows no threads in processes that a process with threads forked (datasets).
TESTS = ["tests/graphs", "--ignore=tests/graphs/test_graph_memory.py"]
SELECTED = {
    "address,undefined": "not fewer_threads",
    "thread": "not fewer_threads and not datasets_map",
}
# Copied, so that the tests run beside a package with the sanitized module
PARTS = ("compact_fast", "csrc", "triton_kernels", "tests/graphs", "pyproject.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("sanitizer", nargs="*", help=", ".join(LIBRARY), default=list(LIBRARY))
    parser.add_argument("--inputs", type=int, default=1_000_000, help="fuzzed inputs")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where builds go")
    parser.add_argument("--tests", help="arguments of pytest (default: the graph tests)")
    arguments = parser.parse_args()
    for name in arguments.sanitizer:
        if name not in LIBRARY:
            parser.error(f"{name}: expected one of {', '.join(LIBRARY)}")
        folder = arguments.build.resolve() / f"sanitize-{name.replace(',', '-')}"
        tests = arguments.tests.split() if arguments.tests else [*TESTS, "-k", SELECTED[name]]
        check(name, folder, arguments.inputs, tests)


def check(name: str, folder: Path, inputs: int, tests: list[str]) -> None:
    """Everything under one sanitizer."""
    import pybind11

    cmake = tool("cmake")
    folder.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja", path=str(SCRIPTS)) or shutil.which("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run(
        [
            cmake, "-S", str(ROOT), "-B", str(folder), *generator,
            "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DCOMPACT_FAST_SANITIZE={name}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
        ],
        folder,
    )  # fmt: skip
    run([cmake, "--build", str(folder)], folder)
    for tests_of in ("core_tests", "attention_tests"):
        run(
            [str(folder / tests_of)], folder, **{**PYTHON_OPTIONS, "ASAN_OPTIONS": "detect_leaks=1"}
        )
    if name != "thread":  # fuzzing has one
        run([str(folder / "core_fuzz"), str(inputs)], folder, **PYTHON_OPTIONS)

    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for part in PARTS:
        source = ROOT / part
        (tree / part).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(
                source, tree / part, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy(source, tree / part)
    (module,) = folder.glob("_native.*.so")
    shutil.copy(module, tree / "compact_fast")
    # libstdc++ too: the sanitizer must find its exceptions before Python loads it
    preload = " ".join(library(name) for name in (LIBRARY[name], "libstdc++.so.6"))
    data = os.environ.get("COMPACT_FAST_DATA", str(ROOT.parent / "shared" / "data"))
    run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:randomly", "--timeout=1800", *tests],
        tree,
        LD_PRELOAD=preload,
        COMPACT_FAST_DATA=data,
        COMPACT_FAST_REQUIRE_NATIVE="1",
        **PYTHON_OPTIONS,
    )


def library(name: str) -> str:
    """Path of a library of the compiler's."""
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        raise SystemExit(f"{compiler} has no {name}: install gcc's sanitizers")
    return str(path.resolve())


def tool(name: str) -> str:
    """A program of this environment or of the system."""
    found = shutil.which(name, path=str(SCRIPTS)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed")
    return found


def run(command: list[str], folder: Path, **env: str) -> None:
    """Run, show, time; end with its error."""
    print("$", *command, flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env={**os.environ, **env})
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} ended with {done.returncode}")


if __name__ == "__main__":
    main()
