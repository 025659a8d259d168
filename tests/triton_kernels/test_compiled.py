"""Kernels compiled ahead of time for GPUs that are not there. One representative of every kernel;
`python -m bench.kernel_report` compiles all launch configurations."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))  # for `bench`

from bench import kernel_report

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
BULK_COPIES = ("sm_90", "sm_100")


@pytest.fixture(scope="module", params=list(MATRIX))
def compiled(request):
    return request.param, kernel_report.compile_cases(request.param, quick=True)


def test_no_spills_and_shared_memory_within_limits(compiled):
    for row in compiled[1]:
        c = row.compiled
        assert c.spills == 0, (c.kernel, row.case.variant)
        assert c.shared_bytes <= c.shared_limit, (c.kernel, row.case.variant)


def test_the_gemm_uses_matrix_units_and_bulk_copies(compiled):
    arch, rows = compiled
    gemms = [row.compiled for row in rows if row.compiled.kernel.startswith("logits_exp")]
    assert len(gemms) == 2
    for gemm in gemms:
        assert gemm.instructions[MATRIX[arch]] > 0
        if arch in BULK_COPIES:
            assert gemm.instructions["UTMALDG"] > 0
            assert gemm.instructions["UTMASTG"] > 0


def test_every_kernel_is_compiled(compiled):
    arch, rows = compiled
    source = Path(kernel_report.ROOT / "triton_kernels")
    kernels = {
        line.split("(")[0].removeprefix("def ")
        for path in source.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    other = "logits_exp_kernel" if arch in BULK_COPIES else "logits_exp_tma_kernel"
    assert {row.compiled.kernel for row in rows} == kernels - {other}
