"""The operators as torch sees them: schemas, fake kernels, autograd, compile, autocast."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from compact_fast import CompactConfig, compact_loss, reference, token_logp
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.ops import LAYOUT_FIELDS
from compact_fast.testing import random_batch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KEPT = ("targets", "cu_seqlens", "cu_teachers", "gold_ids", "cu_gold")
LAYOUTS = [(3, 1, 4, 2), (1,), (5, 5)]


def score_args(batch, config, needs=(True, True, True), statistics=True, softcap=0.0):
    hidden, weight, bias = (
        t.clone().requires_grad_(n)
        for t, n in zip((batch.hidden, batch.weight, batch.bias), needs, strict=True)
    )
    return (
        hidden, weight, bias, *(getattr(batch.layout, n) for n in LAYOUT_FIELDS),
        batch.consensus, batch.attention, config.text, 3.0, *needs, statistics, "torch", softcap,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teachers", LAYOUTS, ids=str)
def test_opcheck_score_and_loss(dtype, teachers):
    # opcheck cannot compare NaN, the NLL of a rationale without labels
    batch = random_batch(teachers, dtype=dtype, vocab=31, width=8, seed=1, unlabelled=False)
    op = torch.ops.compact_fast.score_and_loss.default
    torch.library.opcheck(op, score_args(batch, CompactConfig()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_with_capped_logits(dtype):
    batch = random_batch(dtype=dtype, vocab=31, width=8, seed=1, unlabelled=False)
    args = score_args(batch, CompactConfig(), softcap=3.0)
    torch.library.opcheck(torch.ops.compact_fast.score_and_loss.default, args)
    tensors = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
    args = (*tensors, batch.layout.targets, True, "torch", 3.0)
    torch.library.opcheck(torch.ops.compact_fast.token_logp.default, args)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False)], ids=str)
def test_opcheck_with_some_gradients_and_a_bare_layout(needs):
    batch = random_batch(vocab=31, width=8, seed=2, dtype=torch.float32, unlabelled=False)
    bare = {n: None for n in LAYOUT_FIELDS if n not in KEPT}
    batch = dataclasses.replace(batch, layout=dataclasses.replace(batch.layout, **bare))
    args = score_args(batch, CompactConfig(weighting="uniform"), needs, statistics=False)
    torch.library.opcheck(torch.ops.compact_fast.score_and_loss.default, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("statistics", [True, False])
def test_opcheck_token_logp(dtype, statistics):
    batch = random_batch(vocab=31, width=8, seed=3, dtype=dtype)
    tensors = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
    args = (*tensors, batch.layout.targets, statistics, "torch")
    torch.library.opcheck(torch.ops.compact_fast.token_logp.default, args)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_opcheck_teacher_weights(dtype):
    batch = random_batch(seed=4, dtype=dtype)
    mi, nll = batch.attention.clone(), batch.attention * 2
    args = (
        mi, nll, batch.consensus, None, batch.layout.cu_teachers, None, None, None,
        CompactConfig().text,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.compact_fast.teacher_weights.default, args)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_compile_fullgraph_equals_eager(frozen, softcap):
    batch = random_batch(vocab=31, width=8, seed=5, dtype=torch.float32)
    config = CompactConfig(mode="paper")

    def step(hidden, weight):
        out = compact_loss(
            torch.tanh(hidden), weight, batch.layout, consensus=batch.consensus,
            attention=batch.attention, config=config, softcap=softcap,
        )  # fmt: skip
        logp = token_logp(hidden, weight, batch.layout.targets, softcap=softcap)
        return out.loss * 2 - logp.mean(), out.weights

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden = batch.hidden.clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_(not frozen)
        loss, weights = run(hidden, weight)
        loss.backward()
        results.append((loss.detach(), weights, hidden.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_capped_log_likelihoods_are_differentiable(backend):
    batch = random_batch(seed=8, scale=2.0)
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_()
    targets = batch.layout.targets

    def logp(h, w):
        return token_logp(h, w, targets, backend=backend, softcap=3.0)

    logits = 3.0 * torch.tanh(hidden @ weight.T / 3.0)
    own = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    own = torch.where(targets >= 0, own, 0.0)
    torch.testing.assert_close(logp(hidden, weight), own)
    up = torch.linspace(-1, 1, own.numel(), dtype=own.dtype)
    mine = torch.autograd.grad((logp(hidden, weight) * up).sum(), (hidden, weight))
    theirs = torch.autograd.grad((own * up).sum(), (hidden, weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_go_with_a_cap_is_refused():
    batch = random_batch(seed=8)
    args = (batch.hidden, batch.weight, batch.layout)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"softcap={wrong}: expected a positive number"):
            compact_loss(*args, consensus=batch.consensus, softcap=wrong)
        with pytest.raises(ValueError, match="expected a positive number"):
            token_logp(*args[:2], batch.layout.targets, softcap=wrong)
    config = CompactConfig(skip_below=0.1)
    with pytest.raises(ValueError, match=r"skip_below=0\.1: no gradients are left out of soft-cap"):
        compact_loss(*args, consensus=batch.consensus, softcap=30.0, config=config)


def test_the_reference_refuses_them_when_called_by_itself():
    batch = random_batch(seed=8)
    config = CompactConfig(skip_below=0.1)
    with pytest.raises(ValueError, match="no gradients are left out of soft-capped"):
        reference.compact_loss(batch.hidden, batch.weight, batch.layout, config=config, softcap=3.0)


def test_a_backend_without_a_cap_is_not_asked_for_one():
    batch = random_batch(seed=8, dtype=torch.float32)
    args = (batch.hidden, batch.weight, batch.layout)
    plain = TorchBackend(name="plain", caps_logits=False)
    assert compact_loss(*args, backend=plain).loss.isfinite()
    with pytest.raises(ValueError, match=r"'plain' cannot run: it does not cap logits \(softcap=3"):
        compact_loss(*args, backend=plain, softcap=3.0)


def loss_and_gradient(batch, wrap):
    hidden = batch.hidden.clone().requires_grad_()
    loss = wrap(lambda h: compact_loss(h, batch.weight, batch.layout).loss, hidden)
    loss.backward()
    return loss.detach(), hidden.grad


def test_under_activation_checkpointing():
    batch = random_batch(seed=6)
    plain = loss_and_gradient(batch, lambda f, h: f(h))
    again = loss_and_gradient(batch, lambda f, h: checkpoint(f, h, use_reentrant=False))
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])


def test_no_grad_and_inference_mode():
    batch = random_batch(seed=7)
    weight = batch.weight.clone().requires_grad_()
    want = compact_loss(batch.hidden, batch.weight, batch.layout).loss
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = compact_loss(batch.hidden, weight, batch.layout)
            assert not out.loss.requires_grad
            assert torch.equal(out.loss, want)


def test_autocast_changes_nothing():
    batch = random_batch(seed=8, dtype=torch.float32)
    want = compact_loss(batch.hidden, batch.weight, batch.layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compact_loss(batch.hidden, batch.weight, batch.layout)
        mixed = compact_loss(batch.hidden.bfloat16(), batch.weight, batch.layout)
    assert torch.equal(got.loss, want.loss)
    assert got.loss.dtype == mixed.loss.dtype == torch.float32


def test_config_travels_as_text():
    for config in (CompactConfig(), CompactConfig(mode="reference", weighting=(0.5, 1.5), tau=2)):
        assert CompactConfig.from_text(config.text) == config
    with pytest.raises(ValueError, match="unknown fields: gamma"):
        CompactConfig.from_text('{"gamma": 1}')


def test_tied_heads_add_both_gradients():
    batch = random_batch((2, 2), vocab=31, width=8, seed=9)
    ids = batch.layout.targets.clamp(min=0)
    grads = []
    for backend in ("torch", "reference"):
        table = batch.weight.clone().requires_grad_()
        out = compact_loss(table[ids] + batch.hidden, table, batch.layout, backend=backend)
        grads.append(torch.autograd.grad(out.loss, table)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
