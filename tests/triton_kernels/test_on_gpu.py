"""The backend on a real device against the reference in float64; skipped where there is none."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tier", ["auto", "library"])
def test_against_the_reference(dtype, frozen, tier):
    from compact_fast import CompactConfig
    from compact_fast.backends.protocol import Needs, RunSpec
    from compact_fast.backends.reference_backend import ReferenceBackend
    from compact_fast.backends.triton_backend import TritonBackend
    from compact_fast.layout import IGNORE, TokenLayout

    V, D, K, Q, length = 32_003, 512, 4, 3, 150
    g = torch.Generator().manual_seed(0)
    S = K * Q
    targets = torch.randint(0, V, (S, length), generator=g)
    targets[:, :40] = IGNORE
    cu = torch.arange(S + 1) * length
    layout = TokenLayout(
        targets=targets.reshape(-1),
        cu_seqlens=cu,
        cu_teachers=torch.arange(Q + 1) * K,
        gold_ids=torch.randint(0, V, (2 * Q,), generator=g),
        cu_gold=2 * torch.arange(Q + 1),
        answer_spans=torch.stack([cu[1:] - 5, cu[1:]], 1),
    ).to("cuda")
    hidden = torch.randn(S * length, D, generator=g).to("cuda", dtype)
    weight = (torch.randn(V, D, generator=g) / 16).to("cuda", dtype)
    consensus = torch.rand(S, generator=g).cuda()
    needs = Needs(True, not frozen, False)
    rest = (None, layout, consensus, None, CompactConfig(), None, needs, True)
    backend = TritonBackend(tier=tier)
    spec = RunSpec(hidden.device, dtype, V, D)
    assert backend.can_run(spec) is True
    got = backend.score_and_loss(hidden, weight, *rest)
    again = backend.score_and_loss(hidden, weight, *rest)
    want = ReferenceBackend().score_and_loss(hidden.double(), weight.double(), *rest)
    for name in ("loss", "weights", "nll", "mi", "token_logp", "token_entropy", "consistency"):
        value, exact = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(value.double(), exact, rtol=5e-5, atol=2e-5, msg=name)
        assert torch.equal(value, getattr(again, name)), f"{name} differs between two runs"
    for value, exact in zip(got.gradients[:2], want.gradients[:2], strict=True):
        if value is not None:
            error = (value.double() - exact).norm() / exact.norm()
            assert error < (2.0**-7 if dtype == torch.bfloat16 else 1e-4)
