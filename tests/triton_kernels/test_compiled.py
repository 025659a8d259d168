"""Kernels compiled ahead of time for GPUs that are not there. One representative of every kernel;
`python -m bench.kernel_report` compiles all launch configurations."""

import sys
from pathlib import Path

import pytest
import torch

from compact_fast import CompactConfig
from compact_fast.backends.protocol import Needs
from compact_fast.backends.triton_backend import TritonBackend
from compact_fast.layout import IGNORE, TokenLayout

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))  # for `bench`

from bench import kernel_report
from bench.aot import compiling
from bench.kernel_cases import meta

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


def launch_step(rows_a_sequence, needs):
    """A whole step as the backend launches it, on tensors without memory."""
    from compact_fast.backends.triton_pass import TritonPass
    from compact_fast.backends.triton_plan import make_plan
    from compact_fast.backends.triton_rows import DeviceHead

    V, D, K, Q, n = 151_936, 1536, 4, 2, rows_a_sequence
    targets = torch.zeros(K * Q * n, dtype=torch.long)
    targets[::7] = IGNORE
    cu = torch.arange(K * Q + 1) * n
    layout = TokenLayout(
        targets=targets,
        cu_seqlens=cu,
        cu_teachers=torch.arange(Q + 1) * K,
        gold_ids=torch.zeros(2 * Q, dtype=torch.long),
        cu_gold=2 * torch.arange(Q + 1),
        answer_spans=torch.stack([cu[1:] - 5, cu[1:]], 1),
    )
    hidden, weight = (meta(m, D, dtype=torch.bfloat16) for m in (len(targets), V))
    consensus = meta(K * Q, dtype=torch.float64)
    head, config = DeviceHead.of(TritonBackend(), hidden, weight, None), CompactConfig()
    plan = make_plan(layout, config, torch.device("meta"), head.max_rows)
    work = TritonPass(head, plan, consensus, None, config, None, False)
    return work.run(hidden, weight, None, needs)


@pytest.mark.parametrize("arch", ["gfx942", pytest.param("sm_90", marks=pytest.mark.nightly)])
def test_a_step_compiles_as_launched_and_only_once(arch):
    for needs in (Needs(True, True, False), Needs(True, False, False)):
        with compiling(arch) as first:
            launch_step(301, needs)
        with compiling(arch) as both:
            launch_step(301, needs)
            launch_step(208, needs)  # another length, and a multiple of 16 at that
        assert {c.kernel for c in first} >= {"finish_rows_kernel", "pair_gradients_kernel"}
        assert all(c.spills == 0 and c.shared_bytes <= c.shared_limit for c in both)
        assert len(both) == len(first)
