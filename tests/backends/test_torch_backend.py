"""The chunked backend against the reference: every option, every way through the chunks."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compact_fast import CompactConfig, compact_loss, token_logp
from compact_fast.backends import head as head_module
from compact_fast.backends import held_rows, torch_backend
from compact_fast.backends.head import Head
from compact_fast.backends.reference_backend import ReferenceBackend
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.testing import random_batch

ROW = 97 * 8  # bytes of a row of logits, V = 97 in float64
# one chunk for everything; several chunks a question, held; several chunks, not held
CHUNKINGS = {
    "one chunk": TorchBackend(1 << 30, 1 << 30),
    "held": TorchBackend(ROW * 16, ROW * 60),
    "two passes": TorchBackend(ROW * 16, 0),
}
VALUES = (
    "loss", "loss_sft", "loss_consistency", "weights", "nll", "mi", "consensus", "score",
    "token_logp", "token_entropy", "consistency",
)  # fmt: skip
FLAGS = ("filtered", "nonfinite", "skipped", "token_correct")


@pytest.fixture(autouse=True, params=[4096, 32], ids=["one block", "four blocks"])
def vocabulary_blocks(request, monkeypatch):
    """Everything in one block of the 97-word vocabulary, and in four."""
    monkeypatch.setattr(head_module, "LEAST_WIDTH", request.param)
    if request.param < 97:
        monkeypatch.setattr(head_module, "BLOCK_BYTES", 0)


def run(batch, config, backend, *, frozen=False, bias=True, upstream=1.7):
    """Output and gradients (hidden, weight, bias); a frozen head has none of its own."""
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_(not frozen)
    head_bias = batch.bias.clone().requires_grad_(not frozen) if bias else None
    out = compact_loss(
        hidden, weight, batch.layout, consensus=batch.consensus, attention=batch.attention,
        config=config, backend=backend, head_bias=head_bias, statistics=True,
    )  # fmt: skip
    if out.loss.requires_grad:
        (out.loss * upstream).backward()
    return out, [hidden.grad, weight.grad, None if head_bias is None else head_bias.grad]


def assert_equal(batch, config, backend, *, tolerance=1e-11, **kwargs):
    a, grads_a = run(batch, config, "reference", **kwargs)
    b, grads_b = run(batch, config, backend, **kwargs)
    for name in VALUES:
        x, y = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(
            y, x, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in FLAGS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for x, y, name in zip(grads_a, grads_b, ("hidden", "weight", "bias"), strict=True):
        if x is not None:
            torch.testing.assert_close(
                y, x, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"d{n}: {m}"
            )
        else:  # no gradient by autograd: none, or all zeros
            assert y is None or not y.any()


@pytest.mark.parametrize("rows", [0, 5, 1000])
@pytest.mark.parametrize("frozen", [True, False])
def test_answers_wait_for_a_product_with_those_of_other_groups(frozen, rows, monkeypatch):
    """None of them, some, and all: with a trained head the last group's need not be copied."""
    monkeypatch.setattr(torch_backend, "waiting_bytes", lambda head_bytes, trained: rows * ROW)
    product, seen = Head.back_to_rows, []

    def spy(self, parts, blocks=()):
        seen.append((len(parts), len(blocks) > 0))
        return product(self, parts, blocks)

    monkeypatch.setattr(Head, "back_to_rows", spy)
    batch = random_batch((4,) * 12, seed=4, longest=30, unlabelled=False)
    config = CompactConfig(consistency_weight=0.7, filter_below=0.0)
    assert_equal(batch, config, CHUNKINGS["held"], frozen=frozen)
    if rows == 0:
        assert set(seen) == {(1, False) if frozen else (0, True)}
    elif rows == 1000:
        assert seen == [(12, False)]
    else:
        assert 1 < len(seen) < 12
        assert ((3, False) if frozen else (2, True)) in seen


def test_non_uniform_fixed_weights_against_autograd():
    """First of all: unequal weights are where other fused losses went silently wrong."""
    batch = random_batch((4, 4), seed=1)
    config = CompactConfig(weighting=(0.7, 0.2, 0.05, 0.05), consistency="off")
    for backend in CHUNKINGS.values():
        assert_equal(batch, config, backend)


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("mode", ["compact", "paper", "reference"])
@pytest.mark.parametrize("mi", ["logit", "logprob", "pvi"])
@pytest.mark.parametrize("frozen", [True, False])
def test_modes_and_mi(chunking, mode, mi, frozen):
    for seed in range(2):
        config = CompactConfig(mode=mode, mi=mi, mi_length_norm=bool(seed))
        assert_equal(random_batch(seed=seed), config, CHUNKINGS[chunking], frozen=frozen)


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("consistency", ["answer", "all", "off"])
@pytest.mark.parametrize(
    "weighting",
    ["uniform", "consensus", "mi", "difficulty", "best", "random", "correct", (0.2, 0.5, 0.1, 1)],
)
def test_weightings_and_consistency(chunking, consistency, weighting):
    config = CompactConfig(weighting=weighting, consistency=consistency)
    assert_equal(random_batch(seed=5), config, CHUNKINGS[chunking])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    teachers=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 0.5, 20.0]),  # logits from flat to about +-80 apart
    chunk=st.integers(1, 200),
    hold=st.integers(0, 300),
    frozen=st.booleans(),
    bias=st.booleans(),
    longest=st.integers(6, 30),
)
def test_any_ragged_layout_and_chunk(teachers, seed, scale, chunk, hold, frozen, bias, longest):
    batch = random_batch(teachers, seed=seed, scale=scale, longest=longest)
    backend = TorchBackend(ROW * chunk, ROW * hold)
    assert_equal(batch, CompactConfig(), backend, frozen=frozen, bias=bias, tolerance=1e-9)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_non_finite_rationale_leaves_clean_gradients(frozen, chunking):
    batch = random_batch((4, 3), seed=2)
    hidden = batch.hidden.clone()
    a, b = batch.layout.cu_seqlens[2:4].tolist()
    hidden[a:b] = torch.nan
    bad = dataclasses.replace(batch, hidden=hidden)
    out, grads = run(bad, CompactConfig(), CHUNKINGS[chunking], frozen=frozen)
    assert out.nonfinite.tolist()[2]
    assert out.weights[2] == 0
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in grads if g is not None)


def test_all_labels_ignored_is_a_skipped_question_with_zero_gradient():
    batch = random_batch((2, 2), seed=3)
    layout = dataclasses.replace(
        batch.layout, targets=torch.full_like(batch.layout.targets, -100), answer_spans=None
    )
    for backend in CHUNKINGS.values():
        out, grads = run(dataclasses.replace(batch, layout=layout), CompactConfig(), backend)
        assert out.loss == 0
        assert out.skipped.all()
        assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_against_float64_of_the_same_inputs(dtype):
    """Statistics are float32 whatever the inputs: as near to float64 as torch's own float32."""
    batch = random_batch(seed=6, dtype=dtype)
    wide = dataclasses.replace(
        batch, hidden=batch.hidden.double(), weight=batch.weight.double(),
        bias=batch.bias.double(), consensus=batch.consensus.double(),
        attention=batch.attention.double(),
    )  # fmt: skip
    config = CompactConfig(weighting="uniform")
    truth, grads_truth = run(wide, config, "reference")
    out, grads = run(batch, config, CHUNKINGS["held"])
    plain, _ = run(batch, config, "reference")
    floor = 4 * torch.finfo(torch.float32).eps
    for name in ("loss", "nll", "mi", "token_logp"):
        x = getattr(truth, name)
        error = (getattr(out, name).double() - x).nan_to_num().abs().max()
        own = (getattr(plain, name).double() - x).nan_to_num().abs().max()
        assert error <= 2 * own + floor * x.nan_to_num().abs().max(), name
    eps = torch.finfo(dtype).eps  # the gradient is returned in the inputs' dtype
    for g, t in zip(grads, grads_truth, strict=True):
        assert g.dtype == dtype
        assert (g.double() - t).abs().max() <= (eps + floor) * t.abs().max()


def test_rows_do_not_depend_on_the_rest_of_the_batch():
    """Per-rationale figures agree to rounding in any company, weights to the float64 sums."""
    batch = random_batch((3, 2, 4), seed=7, dtype=torch.float32)
    whole, _ = run(batch, CompactConfig(), "torch")
    for q in range(3):
        s = slice(*batch.layout.cu_teachers[q : q + 2].tolist())
        part = dataclasses.replace(
            batch,
            hidden=batch.hidden[batch.layout.question_positions([q])],
            layout=batch.layout.select_questions([q]),
            consensus=batch.consensus[s],
            attention=batch.attention[s],
        )
        alone, _ = run(part, CompactConfig(), "torch")
        torch.testing.assert_close(alone.nll, whole.nll[s], rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(alone.weights, whole.weights[s], rtol=1e-4, atol=1e-6)


def test_same_bits_every_time():
    batch = random_batch(seed=8, dtype=torch.float32)
    first = run(batch, CompactConfig(), "torch")
    for _ in range(100):
        again = run(batch, CompactConfig(), "torch")
        assert torch.equal(first[0].loss, again[0].loss)
        for a, b in zip(first[1], again[1], strict=True):
            assert torch.equal(a, b)


def test_second_backward_is_refused():
    batch = random_batch(seed=9)
    hidden = batch.hidden.clone().requires_grad_()
    out = compact_loss(hidden, batch.weight, batch.layout)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        out.loss.backward()


def test_used_twice_in_one_graph():
    batch = random_batch(seed=10)
    hidden = batch.hidden.clone().requires_grad_()
    grads = []
    for backend in ("torch", "reference"):
        total = sum(
            compact_loss(hidden * f, batch.weight, batch.layout, backend=backend).loss
            for f in (1.0, 0.5)
        )
        grads.append(torch.autograd.grad(total, hidden)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_no_gradient_wanted_none_made():
    batch = random_batch(seed=11)
    with torch.no_grad():
        out = compact_loss(batch.hidden.requires_grad_(), batch.weight, batch.layout)
    assert not out.loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_token_logp_and_its_gradients(dtype):
    batch = random_batch(seed=12, dtype=dtype)
    up = torch.randn(batch.layout.num_tokens, dtype=dtype)
    up[3] = 0
    results = []
    for backend in ("reference", TorchBackend(ROW * 16)):
        inputs = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
        logp = token_logp(
            inputs[0], inputs[1], batch.layout.targets, backend=backend, head_bias=inputs[2]
        )
        results.append((logp.detach(), *torch.autograd.grad((logp * up).sum(), inputs)))
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("frozen", [True, False])
def test_rows_without_use_are_never_multiplied(frozen, monkeypatch):
    """Rows without a label not at all; rows of a teacher that is filtered out not back."""
    there, back = [], []
    multiply, to_rows, add = Head.multiply, Head.add_back, held_rows.add_transposed

    def spy_to_rows(self, into, g, block):
        back.append((len(into), g.shape[1]))
        to_rows(self, into, g, block)

    def spy_add(into, g, x, **how):
        back.append(g.shape)
        add(into, g, x, **how)

    monkeypatch.setattr(
        Head,
        "multiply",
        lambda self, x, w, *rest: (there.append(len(x) * len(w)), multiply(self, x, w, *rest))[1],
    )
    monkeypatch.setattr(Head, "add_back", spy_to_rows)
    monkeypatch.setattr(held_rows, "add_transposed", spy_add)
    batch = random_batch((3, 4), seed=13, unlabelled=False)
    consensus = torch.tensor([1, 0.1, 1, 1, 1, 0.2, 1.0])
    batch = dataclasses.replace(batch, consensus=consensus)
    config = CompactConfig(consistency="off")
    out, _ = run(batch, config, TorchBackend(1 << 30), frozen=frozen)
    assert out.filtered.tolist() == [c < 0.8 for c in consensus.tolist()]
    vocab = batch.weight.shape[0]
    assert sum(there) == vocab * int(batch.layout.labelled.sum())
    weighted = batch.layout.labelled & ~out.filtered[batch.layout.token_sequence]
    products = sum(n * v for n, v in back)  # to rows, and to the head where it is trained
    assert products == (1 if frozen else 2) * vocab * int(weighted.sum())


def assert_left_out_within_bounds(batch, config, backend, *, limit, frozen):
    """Figures stay; what is missing from the gradients is within the reported bounds."""
    dense, dense_grads = run(batch, config, backend, frozen=frozen, upstream=1.0)
    skipping = dataclasses.replace(config, skip_below=limit)
    out, grads = run(batch, skipping, backend, frozen=frozen, upstream=1.0)
    for name in VALUES:
        a, b = getattr(dense, name), getattr(out, name)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, equal_nan=True)
    eps = torch.finfo(batch.hidden.dtype).eps
    for bound, g, exact in zip(out.gradient_error.tolist(), grads, dense_grads, strict=True):
        if exact is not None:
            missing, size = float((g - exact).norm()), float(exact.norm())
            assert missing <= bound + 32 * eps * size, (missing, bound, size)
    return out, dense_grads


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    teachers=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 0.5, 2.0, 20.0]),
    limit=st.sampled_from([1e-6, 1e-3, 1e-2, 0.1, 0.9]),
    chunk=st.integers(1, 200),
    frozen=st.booleans(),
    mi=st.sampled_from(["logit", "logprob"]),
)
def test_bounds_on_what_is_left_out_hold(teachers, seed, scale, limit, chunk, frozen, mi):
    batch = random_batch(teachers, seed=seed, scale=scale)
    config = CompactConfig(mi=mi, consistency_weight=0.5)
    backend = TorchBackend(ROW * chunk)
    out, _ = assert_left_out_within_bounds(batch, config, backend, limit=limit, frozen=frozen)
    assert 0 <= out.kept_share <= 1


@pytest.mark.parametrize("frozen", [True, False])
def test_large_gradients_are_never_left_out(frozen):
    """With one row a block, exactly the entries below the limit are missing."""
    batch = random_batch((3,), seed=21, scale=1.5, longest=6)
    config = CompactConfig(weighting="uniform", consistency="off", skip_below=0.02)
    out, grads = run(batch, config, TorchBackend(ROW * 16), frozen=frozen, upstream=1.0)
    layout, rows = batch.layout, batch.layout.labelled
    logits = batch.hidden @ batch.weight.T + batch.bias
    g = logits.softmax(-1)
    g[rows] -= torch.nn.functional.one_hot(layout.targets[rows], 97)
    g[~rows] = 0
    scale = out.weights / layout.label_counts.clamp(min=1)
    g *= scale[layout.token_sequence][:, None]
    large = (g.abs() >= 0.02 * scale[layout.token_sequence][:, None] * 1.001) & rows[:, None]
    column = large.any(0)
    # all rows fit one block: no column with a large entry is missing
    least = torch.where(column, g, 0.0) @ batch.weight
    rest = torch.where(column, 0.0, g)
    norms = batch.weight.norm(dim=1)
    error = (grads[0] - least).norm(dim=1)
    own = (rest.abs() * norms).sum(1)
    assert bool((error <= own + 1e-9).all())
    assert 0 < out.kept_share < 1


def test_leaving_nothing_out_equals_the_dense_pass():
    batch = random_batch(seed=22)
    dense = run(batch, CompactConfig(), "torch")
    out, grads = run(batch, CompactConfig(skip_below=1e-300), "torch")
    assert out.kept_share == 1
    for a, b in zip(dense[1], grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_rationale_of_nan_leaves_bounds_finite():
    batch = random_batch((4, 3), seed=2)
    hidden = batch.hidden.clone()
    a, b = batch.layout.cu_seqlens[2:4].tolist()
    hidden[a:b] = torch.nan
    bad = dataclasses.replace(batch, hidden=hidden)
    out, grads = run(bad, CompactConfig(skip_below=0.01), TorchBackend(ROW * 16))
    assert out.gradient_error.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_a_backend_that_leaves_nothing_out_says_so():
    batch = random_batch(seed=23)
    whole = ReferenceBackend(name="whole", skips_blocks=False)
    with pytest.raises(ValueError, match=r"skip_below=0\.01: backend 'whole'"):
        run(batch, CompactConfig(skip_below=0.01), whole)
