"""The backend on a real device against the reference in float64; skipped where there is none."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


V, D, K, Q, LENGTH = 32_003, 512, 4, 3, 150


def problem(dtype):
    """Hidden states, head, layout on the CPU, consensus."""
    from compact_fast.layout import IGNORE, TokenLayout

    g = torch.Generator().manual_seed(0)
    S = K * Q
    targets = torch.randint(0, V, (S, LENGTH), generator=g)
    targets[:, :40] = IGNORE
    cu = torch.arange(S + 1) * LENGTH
    layout = TokenLayout(
        targets=targets.reshape(-1),
        cu_seqlens=cu,
        cu_teachers=torch.arange(Q + 1) * K,
        gold_ids=torch.randint(0, V, (2 * Q,), generator=g),
        cu_gold=2 * torch.arange(Q + 1),
        answer_spans=torch.stack([cu[1:] - 5, cu[1:]], 1),
    )
    hidden = torch.randn(S * LENGTH, D, generator=g).to("cuda", dtype)
    weight = (4 * torch.randn(V, D, generator=g) / D**0.5).to("cuda", dtype)
    return hidden, weight, layout, torch.rand(S, generator=g).cuda()


@pytest.mark.parametrize(
    ("dtype", "head"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tier", ["auto", "library"])
def test_against_the_reference(dtype, head, frozen, tier):
    from compact_fast import CompactConfig
    from compact_fast.backends.protocol import Needs, RunSpec
    from compact_fast.backends.reference_backend import ReferenceBackend
    from compact_fast.backends.triton_backend import TritonBackend

    hidden, weight, layout, consensus = problem(dtype)
    weight = weight.to(head)
    needs = Needs(True, not frozen, False)
    rest = (consensus, None, CompactConfig(), None, needs, True)
    backend = TritonBackend(tier=tier)
    assert backend.can_run(RunSpec(hidden.device, dtype, V, D, False, head)) is True
    got = backend.score_and_loss(hidden, weight, None, layout, *rest)
    again = backend.score_and_loss(hidden, weight, None, layout.to("cuda"), *rest)
    exact = (hidden.double(), weight.double(), None, layout.to("cuda"))
    want = ReferenceBackend().score_and_loss(*exact, *rest)
    for name in ("loss", "weights", "nll", "mi", "token_logp", "token_entropy", "consistency"):
        value, exact = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(value.double(), exact, rtol=5e-5, atol=5e-5, msg=name)
        assert torch.equal(value, getattr(again, name)), f"{name} differs between two runs"
    for value, exact in zip(got.gradients[:2], want.gradients[:2], strict=True):
        if value is not None:
            error = (value.double() - exact).norm() / exact.norm()
            low = torch.bfloat16 in (value.dtype, dtype)
            assert error < (2.0**-7 if low else 2.0**-9 if dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize("tier", ["auto", "library"])
def test_small_gradients_are_left_out(tier):
    from compact_fast import CompactConfig, compact_loss
    from compact_fast.backends.triton_backend import TritonBackend

    hidden, weight, layout, consensus = problem(torch.bfloat16)
    grads, outs = [], []
    for eps in (0.0, 2.0**-12):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        config, backend = CompactConfig(skip_below=eps), TritonBackend(tier=tier)
        outs.append(
            compact_loss(*leaves, layout, consensus=consensus, config=config, backend=backend)
        )
        outs[-1].loss.backward()
        grads.append([t.grad.double() for t in leaves])
    assert torch.equal(outs[0].loss, outs[1].loss)
    assert 0 < outs[1].kept_share < 1
    for whole, part, bound in zip(*grads, outs[1].gradient_error, strict=False):
        assert (whole - part).norm() <= bound + 2.0**-8 * whole.norm()


def test_token_logp_never_waits_for_the_device():
    from compact_fast import token_logp

    hidden, weight, layout, _ = problem(torch.bfloat16)
    leaves = [t.requires_grad_() for t in (hidden, weight)]

    def step():
        logp = token_logp(*leaves, layout.targets, backend="triton")
        logp.sum().backward()
        return logp

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    there = token_logp(*leaves, layout.targets.cuda(), backend="triton")
    assert torch.equal(first, second)
    assert torch.equal(first, there)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_never_waits_for_the_device(frozen):
    from compact_fast import compact_loss

    hidden, weight, layout, consensus = problem(torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)

    def step():
        out = compact_loss(hidden, weight, layout, consensus=consensus, backend="triton")
        out.loss.backward()

    step()  # compiles, and asks the library what it can do
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
