"""How near to float64 the torch backend comes, beside torch itself in the same dtype."""

import dataclasses

import pytest
import torch

from compact_fast import CompactConfig, compact_loss, token_logp
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.testing import RandomBatch, random_batch

UNEVEN = CompactConfig(weighting=(0.6, 0.3, 0.07, 0.03), consistency="off")
FIGURES = ("loss", "token_logp", "nll", "mi", "weights")


def widen(batch):
    names = ("hidden", "weight", "bias", "consensus", "attention")
    return dataclasses.replace(batch, **{n: getattr(batch, n).double() for n in names})


def evaluate(batch, backend, config=UNEVEN):
    """Figures and gradients by name."""
    inputs = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
    out = compact_loss(
        inputs[0], inputs[1], batch.layout, consensus=batch.consensus, config=config,
        backend=backend, head_bias=inputs[2],
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss, inputs)
    found = {name: getattr(out, name).detach() for name in FIGURES}
    return found | dict(zip(("dH", "dW", "db"), grads, strict=True))


def confident(batch: RandomBatch) -> RandomBatch:
    """The same batch, with p > 0.99 at every label."""
    layout = batch.layout
    own = batch.weight.double()[layout.targets.clamp(min=0)]
    size = own.square().sum(1, keepdim=True)
    logits = batch.hidden.double() @ batch.weight.double().T + batch.bias.double()
    want = logits.max(1, keepdim=True).values + 9
    at = logits.gather(1, layout.targets.clamp(min=0)[:, None])
    moved = batch.hidden.double() + (want - at) / size * own
    return dataclasses.replace(batch, hidden=moved.to(batch.hidden.dtype))


def cases(dtype):
    wide = random_batch((4, 3, 4), vocab=512, width=64, longest=24, scale=0.3, seed=31, dtype=dtype)
    return {"random rows": wide, "confident rows": confident(wide)}


@pytest.mark.parametrize("rows", ["random rows", "confident rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_beside_torchs_own(dtype, rows):
    """bf16, fp16: at most torch's own error plus one unit in the last place; fp32: twice."""
    batch = cases(dtype)[rows]
    truth = evaluate(widen(batch), "reference")
    if rows == "confident rows":
        p = truth["token_logp"][batch.layout.labelled].exp()
        assert p.median() > 0.99
    # every value in the dtype of the inputs, as torch does it
    own = plain_torch(batch)
    got = evaluate(batch, TorchBackend(1 << 18))
    for name, exact in truth.items():
        size = exact.nan_to_num().abs().max()
        error = (got[name].double() - exact).nan_to_num().abs().max()
        theirs = (own[name].double() - exact).nan_to_num().abs().max()
        one_unit = torch.finfo(got[name].dtype).eps * size
        factor = 2 if dtype == torch.float32 else 1
        assert error <= factor * theirs + one_unit, (name, float(error), float(theirs))


def plain_torch(batch):
    """Logits, softmax and gradients by torch in the dtype of the inputs."""
    from compact_fast import scores

    layout = batch.layout
    inputs = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
    logits = torch.nn.functional.linear(*inputs)
    picked = torch.log_softmax(logits, -1).gather(1, layout.targets.clamp(min=0)[:, None])
    logp = torch.where(layout.labelled, picked.squeeze(1), 0)
    gold = torch.zeros_like(logits[:, 0])
    for t in range(layout.num_tokens):
        q = int(layout.sequence_question[layout.token_sequence[t]])
        ids = layout.gold_ids[layout.cu_gold[q] : layout.cu_gold[q + 1]]
        gold[t] = logits.detach()[t, ids].mean()
    nll = -scores.segment_sum(logp, layout) / layout.label_counts
    mi = scores.adaptability(gold.float(), layout, UNEVEN)
    shares = scores.teacher_weights(
        mi, nll.detach(), batch.consensus, None, layout.cu_teachers, UNEVEN,
        teachers=layout.teachers,
    )  # fmt: skip
    terms = torch.where(shares.weights > 0, shares.weights * nll, 0.0)
    loss = terms.sum() / (~shares.skipped).sum()
    grads = torch.autograd.grad(loss, inputs)
    return {
        "loss": loss.detach(), "token_logp": logp.detach(), "nll": nll.detach(), "mi": mi,
        "weights": shares.weights, "dH": grads[0], "dW": grads[1], "db": grads[2],
    }  # fmt: skip


@pytest.mark.parametrize("rows", ["random rows", "confident rows"])
def test_bf16_log_likelihoods_are_those_of_float32_sums(rows):
    batch = cases(torch.bfloat16)[rows]
    got = token_logp(batch.hidden, batch.weight, batch.layout.targets, backend="torch")
    wide = token_logp(
        batch.hidden.double(), batch.weight.double(), batch.layout.targets, backend="reference"
    )
    assert (got - wide).abs().max() <= 1e-5


def test_what_a_sure_row_still_learns_is_no_difference_of_near_equals():
    """1 - p of 1e-9 survives float32, where softmax - 1 would be 0."""
    weight = torch.eye(4) * 21.0
    hidden = torch.eye(4)[:1].repeat(3, 1)
    targets = torch.tensor([0, 0, 0])
    logp = token_logp(hidden.requires_grad_(), weight, targets, backend="torch")
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    wide = hidden.detach().double().requires_grad_()
    exact = torch.log_softmax(wide @ weight.double().T, -1)[:, 0]
    (want,) = torch.autograd.grad(exact.sum(), wide)
    torch.testing.assert_close(logp.detach().double(), exact.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=0)


def test_logits_of_eighty_and_of_nothing():
    batch = random_batch((4, 2), seed=32, dtype=torch.float32)
    for scale in (0.0, 1e-30, 20.0):
        given = dataclasses.replace(batch, weight=batch.weight * scale)
        got, want = evaluate(given, "torch"), evaluate(widen(given), "reference")
        for name in ("loss", "token_logp", "nll", "dH", "dW"):
            size = float(want[name].nan_to_num().abs().max())
            torch.testing.assert_close(
                got[name].double(), want[name], rtol=0, atol=3e-6 * size + 1e-30, equal_nan=True
            )


def test_bf16_states_with_a_float32_head_under_autocast():
    """Products in float32, of the numbers as they are; gradients in each input's own dtype."""
    batch = random_batch((3, 4), seed=33, dtype=torch.float32)
    low = batch.hidden.bfloat16()
    results = []
    for hidden, on in ((low, True), (low.float(), False)):
        inputs = [hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            out = compact_loss(*inputs, batch.layout, backend="torch")
            logp = token_logp(*inputs, batch.layout.targets, backend="torch")
        grads = torch.autograd.grad(out.loss, inputs)
        results.append((out.loss.detach(), logp.detach(), *grads))
    mixed, full = results
    assert torch.equal(mixed[0], full[0])
    assert torch.equal(mixed[1], full[1])
    assert mixed[2].dtype == torch.bfloat16
    assert torch.equal(mixed[2], full[2].bfloat16())
    assert torch.equal(mixed[3], full[3])
