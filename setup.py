"""Builds compact_fast._native with CMake; everything declarative is in pyproject.toml.

Without CMake or a C++17 compiler the install still succeeds, without the native module, and says
so; COMPACT_FAST_REQUIRE_NATIVE=1 makes that an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NATIVE = "compact_fast._native"


class CMakeBuild(build_ext):
    """Configure, build and place the one extension module."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("COMPACT_FAST_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise SystemExit(
                    f"compact_fast: the native module could not be built ({error}), and "
                    "COMPACT_FAST_REQUIRE_NATIVE is set. Install CMake and a C++17 compiler, "
                    "or unset the variable to install without it."
                ) from error
            print(
                f"compact_fast: installing WITHOUT the native module ({error}). Graph consensus "
                "will run on rustworkx, and the loss on a CPU in torch's operations: the same "
                "results, slower. To change that, install CMake and a C++17 compiler and install "
                "again.",
                file=sys.stderr,
            )
            for ext in self.extensions:  # an older build must not pass for this one
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            self.extensions: list[Extension] = []

    def build_extension(self, ext: Extension) -> None:
        cmake = _tool("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not installed")
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(HERE),
            "-B",
            str(build),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_RELEASE={target.parent}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_DEBUG={target.parent}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCOMPACT_FAST_TESTS=OFF",
        ]
        ninja = _tool("ninja")
        if ninja and "CMAKE_GENERATOR" not in os.environ:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # a build tree of another generator, compiler or Python answers with confusion: start anew
        stamp = build / "configured-by"
        if not stamp.exists() or stamp.read_text() != "\n".join(configure):
            shutil.rmtree(build)
            build.mkdir()
        _run(configure)
        stamp.write_text("\n".join(configure))
        _run(
            [
                cmake,
                "--build",
                str(build),
                "--config",
                "Release",
                "--parallel",
                "--target",
                "_native",
            ]
        )
        if not target.exists():
            raise RuntimeError(f"the build ended without making {target.name}")


def _tool(name: str) -> str | None:
    """A program of this environment, whose folder need not be on PATH, or of the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        wrong = [line for line in done.stdout.splitlines() if "rror" in line]
        raise RuntimeError(f"{' '.join(command[:2])} failed: {wrong[0] if wrong else 'see above'}")


# triton_kernels/ is a subpackage of ours wherever it is installed: as a top-level name it belongs
# to another distribution.
setup(
    packages=[
        *find_packages(include=["compact_fast", "compact_fast.*"]),
        "compact_fast.triton_kernels",
    ],
    package_dir={"compact_fast.triton_kernels": "triton_kernels"},
    package_data={
        "": ["py.typed", "*.json", "*.html", "*.css", "*.yaml"],
        "compact_fast.arithmetic": ["checkpoint/*"],
    },
    include_package_data=False,
    ext_modules=[Extension(NATIVE, sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
