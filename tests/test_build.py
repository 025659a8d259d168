"""The source distribution builds the native module; installs without a compiler say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "CMakePresets.json", "LICENSE",
    "README.md", "csrc", "compact_fast", "triton_kernels",
)  # fmt: skip


SCRIPTS = str(Path(sys.executable).parent)
CMAKE = shutil.which("cmake", path=SCRIPTS) or shutil.which("cmake")
CTEST = shutil.which("ctest", path=SCRIPTS) or shutil.which("ctest")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")


def run(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COMPACT_FAST"))}
    return subprocess.run(
        command,
        cwd=folder,
        env={**kept, **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
    )


def build(kind: str, folder: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out)]
    return run([*command, "."], folder, **env)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution of this tree."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.pyd", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, folder / name)
    done = build("sdist", folder, folder / "dist")
    assert done.returncode == 0, done.stdout
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder / "unpacked", filter="data")
        else:
            tar.extractall(folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture
def sdist(packed: Path, tmp_path: Path) -> Path:
    """A copy of it that no other test has built in."""
    return shutil.copytree(packed, tmp_path / "sdist")


def names_in(out: Path) -> list[str]:
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def check_packages(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"compact_fast"}
    student = (
        "arithmetic/checkpoint/model.safetensors",
        "arithmetic/checkpoint/chat_template.jinja",
    )
    for name in ("triton_kernels/__init__.py", "py.typed", "graphs/scoring.py", *student):
        assert f"compact_fast/{name}" in names


@needs_cmake
def test_sdist_to_wheel_has_the_native_module(sdist: Path, tmp_path: Path) -> None:
    done = build("wheel", sdist, tmp_path, COMPACT_FAST_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout
    names = names_in(tmp_path)
    check_packages(names)
    assert [n for n in names if n.startswith("compact_fast/_native.")], names

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import compact_fast._native as native\n"
        "import compact_fast.triton_kernels\n"
        "from compact_fast.graphs import consensus\n"
        f"assert native.__file__.startswith({str(tmp_path)!r}), native.__file__\n"
        "assert consensus(['1+1=2', '2', '3'], [0, 3]).backend == 'native'\n"
    )
    done = run([sys.executable, "-I", "-c", script], tmp_path)
    assert done.returncode == 0, done.stdout


def test_install_without_a_compiler_says_so(sdist: Path, tmp_path: Path) -> None:
    done = build("wheel", sdist, tmp_path, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("installing WITHOUT the native module") == 1
    assert "install CMake and a C++17 compiler" in done.stdout
    names = names_in(tmp_path)
    check_packages(names)
    assert not [n for n in names if "_native." in n]


def test_required_native_module_fails_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    env = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc", "COMPACT_FAST_REQUIRE_NATIVE": "1"}
    done = build("wheel", sdist, tmp_path, **env)
    assert done.returncode != 0
    assert "COMPACT_FAST_REQUIRE_NATIVE is set" in done.stdout
    assert not list(tmp_path.glob("*.whl"))


def test_sdist_carries_what_the_build_needs(sdist: Path) -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h"):
            assert (sdist / path.relative_to(ROOT)).exists(), path
    assert (sdist / "CMakeLists.txt").exists()
    assert (sdist / "triton_kernels" / "__init__.py").exists()
    assert not list(sdist.rglob("*.so"))


def test_editable_install_adds_no_other_top_level_name(sdist: Path, tmp_path: Path) -> None:
    make = f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})"
    done = run([sys.executable, "-c", make], sdist, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    assert done.returncode == 0, done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (sdist / "bench").mkdir()
    (sdist / "tests").mkdir()
    script = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('compact_fast').origin.startswith(" + repr(str(sdist)) + ")\n"
        "assert find_spec('compact_fast.triton_kernels').origin.startswith("
        + repr(str(sdist))
        + ")\n"
        "print([n for n in ('triton_kernels', 'bench', 'tests', 'csrc') if find_spec(n)])"
    )
    done = run([sys.executable, "-I", "-S", "-c", script], tmp_path)
    assert done.stdout.strip() == "[]", done.stdout


@needs_cmake
@pytest.mark.parametrize(
    "preset",
    ["tests", *(pytest.param(p, marks=pytest.mark.nightly) for p in ("asan", "ubsan", "tsan"))],
)
def test_core_tests(preset: str, tmp_path: Path) -> None:
    """The C++ core's own tests, without Python; nightly under the sanitizers."""
    folder = tmp_path / "build"
    steps = (
        [str(CMAKE), "-S", str(ROOT), "-B", str(folder), "--preset", preset],
        [str(CMAKE), "--build", str(folder), "--parallel"],
        [str(CTEST), "--test-dir", str(folder), "--output-on-failure"],
    )
    for step in steps:
        done = run(step, ROOT)
        assert done.returncode == 0, done.stdout
