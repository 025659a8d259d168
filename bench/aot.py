"""Compile Triton kernels for GPUs that are not there, and read what came out.

Inside `compiling(arch)` a launch compiles for that architecture, with the argument types and
alignments a real launch would have, and is recorded instead of run; meta tensors do.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from compact_fast.triton_kernels import launch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel in one launch configuration on one architecture."""

    kernel: str
    arch: str
    constants: dict[str, Any]
    registers: int
    spills: int  # instructions that move registers to or from local memory
    num_warps: int
    num_stages: int
    shared_bytes: int
    shared_limit: int
    instructions: dict[str, int]  # matrix and bulk-copy instructions by mnemonic
    assembly: str


class _Driver:
    """Stands in for the device: just enough for a launch to find its target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(arch: str) -> Iterator[list[Compiled]]:
    """Launches inside compile for `arch`; yields the list that they are recorded in."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set; unset it to compile")
    found: list[Compiled] = []
    seen: set[str] = set()
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            constants = {k: v for k, v in kwargs.items() if k in self.arg_names}
            found.append(_inspect(self.__name__, arch, constants, kernel))

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(TARGETS[arch])),
        mock.patch.object(JITFunction, "run", record),
        launch.assume(arch),
    ):
        yield found


def _inspect(name: str, arch: str, constants: dict[str, Any], kernel: Any) -> Compiled:
    shared = kernel.metadata.shared
    if arch == "gfx942":
        assembly = kernel.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        spills += _number(r"\.sgpr_spill_count:\s+(\d+)", assembly)
        found = {"v_mfma": len(re.findall(r"\bv_mfma", assembly))}
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "-res-usage", file.name)
            assembly = _tool("nvdisasm", "-c", file.name)
        registers = _number(r"REG:(\d+)", usage)
        spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
        names = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "LDGSTS")
        found = {n: len(re.findall(rf"\b{n}\b", assembly)) for n in names}
    return Compiled(
        kernel=name,
        arch=arch,
        constants=constants,
        registers=registers,
        spills=spills,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        shared_bytes=shared,
        shared_limit=launch.SHARED_MEMORY_LIMIT[arch],
        instructions={n: count for n, count in found.items() if count},
        assembly=assembly,
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return int(match.group(1))
