"""The whole backend against the reference in float64, from the same low-precision inputs."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from compact_fast.triton_kernels import launch
from torch.utils._python_dispatch import TorchDispatchMode

from compact_fast import CompactConfig
from compact_fast.backends import triton_rows, triton_skip
from compact_fast.backends.protocol import Gradients, Needs, RunSpec
from compact_fast.backends.reference_backend import ReferenceBackend
from compact_fast.backends.triton_backend import TritonBackend
from compact_fast.backends.triton_pass import TritonPass
from compact_fast.backends.triton_plan import make_plan, send
from compact_fast.backends.triton_rows import DeviceHead, say_once
from compact_fast.layout import TokenLayout

REFERENCE = ReferenceBackend()
ALL = Needs(True, True, True)


def batch(V=83, D=32, dtype=torch.float32, seed=0, teachers=(4, 1, 3)):
    """Prompt and completion lengths differ; one sequence without labels, one unstated answer."""
    g = torch.Generator().manual_seed(seed)
    S = sum(teachers)
    prompt = torch.randint(1, 4, (S,), generator=g)
    labels = torch.randint(2, 12, (S,), generator=g)
    labels[1] = 0
    targets = torch.cat(
        [
            torch.cat([torch.full((int(p),), -100), torch.randint(0, V, (int(n),), generator=g)])
            for p, n in zip(prompt, labels, strict=True)
        ]
    )
    cu = torch.cat([torch.zeros(1, dtype=torch.long), (prompt + labels).cumsum(0)])
    spans = torch.stack([cu[1:] - labels.clamp(max=2), cu[1:]], 1)
    spans[2, 0] += 1  # one answer shorter than the others
    spans[4] = 0
    Q, T = len(teachers), len(targets)
    layout = TokenLayout(
        targets=targets,
        cu_seqlens=cu,
        cu_teachers=torch.tensor([0, *teachers]).cumsum(0),
        thinking=torch.rand(T, generator=g) < 0.2,
        gold_ids=torch.randint(0, V, (2 * Q,), generator=g),
        cu_gold=2 * torch.arange(Q + 1),
        answer_spans=spans,
        prior_logp=torch.randn(Q, generator=g),
        question_ids=torch.arange(Q),
        correct=torch.randint(0, 2, (S,), generator=g),
    )
    hidden = torch.randn(T, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) / 4).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    attention = torch.rand(S, generator=g)
    consensus = 1 - 0.15 * torch.rand(S, generator=g)  # nobody is filtered, ...
    consensus[0] = 0.5  # ... but for one teacher
    return hidden, weight, bias, layout, consensus, attention


def both(problem, config, *, needs=ALL, backend=None, bias=True, statistics=True):
    hidden, weight, b, layout, consensus, attention = problem
    rest = (layout, consensus, attention, config, None, needs, statistics)
    b = b if bias else None
    got = (backend or TritonBackend()).score_and_loss(hidden, weight, b, *rest)
    exact = (hidden.double(), weight.double(), None if b is None else b.double())
    want = REFERENCE.score_and_loss(*exact, *rest)
    return got, want


def check(got, want, dtype, needs=ALL):
    for name in ("filtered", "nonfinite", "skipped", "token_correct"):
        assert getattr(got, name) is None or torch.equal(getattr(got, name), getattr(want, name))
    for name in (
        "loss", "loss_sft", "loss_consistency", "weights", "nll", "mi", "consensus", "score",
        "token_logp", "consistency", "token_entropy",
    ):  # fmt: skip
        value = getattr(got, name)
        if value is not None:
            assert value.dtype == torch.float32, name
            torch.testing.assert_close(
                value.double(), getattr(want, name), rtol=2e-5, atol=1e-5, equal_nan=True, msg=name
            )
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2e-5}[dtype]
    for name, need in zip(needs._fields, needs, strict=True):
        value, exact = getattr(got.gradients, name), getattr(want.gradients, name)
        if not need:
            assert value is None
            continue
        assert value.dtype == dtype
        error = (value.double() - exact).norm() / exact.norm()
        assert error < step, (name, float(error))


def test_nonuniform_weights_against_autograd():
    problem = batch()
    got, want = both(problem, CompactConfig(consistency_weight=0.5))
    alpha = want.weights.tolist()
    assert alpha[0] == 0  # filtered
    assert len({round(a, 2) for a in alpha if 0.05 < a < 0.95}) == 5, alpha
    assert want.consistency.max() > 0.01
    check(got, want, torch.float32)


OPTIONS = [
    {},
    {"mode": "paper", "mi": "logprob"},
    {"mi": "pvi", "consensus": "both"},
    {"mode": "reference"},
    {"weighting": "correct", "consistency": "off"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tier", ["fused", "library"])
def test_bfloat16(options, tier):
    got, want = both(
        batch(dtype=torch.bfloat16), CompactConfig(**options), backend=TritonBackend(tier=tier)
    )
    check(got, want, torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"mode": "reference"}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_float16(options, frozen):
    """A label of p = 1e-9 among the rows, and teachers of whom some weigh next to nothing."""
    hidden, weight, bias, layout, *scores = batch(dtype=torch.float16)
    at = layout.labelled.nonzero()[0]
    bias[layout.targets[at]] -= 20
    needs = Needs(True, not frozen, not frozen)
    problem = (hidden, weight, bias, layout, *scores)
    got, want = both(problem, CompactConfig(tau=0.1, **options), needs=needs)
    check(got, want, torch.float16, needs)


MIXED = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("states", "head"), MIXED, ids=str)
@pytest.mark.parametrize("skip", [0.0, 0.02])
def test_two_dtypes(states, head, skip, monkeypatch):
    """As float32 from the numbers as they are; the head is widened in parts."""
    monkeypatch.setattr(triton_rows, "UPCAST_BYTES", 30 * 32 * 4)  # three parts
    hidden, weight, *rest = batch()
    problem = (hidden.to(states), weight.to(head), *rest)
    got, want = both(problem, CompactConfig(skip_below=skip))
    assert got.gradients.hidden.dtype == states
    assert got.gradients.weight.dtype == head
    wide = Gradients(*(None if g is None else g.float() for g in got.gradients))
    rounded = zip(Needs._fields, got.gradients, want.gradients, strict=True)
    slack = skip and 1.0
    for name, value, exact in rounded:
        error = (value.double() - exact).norm() / exact.norm()
        assert error < 2e-5 + torch.finfo(value.dtype).eps / 2 + 0.2 * slack, (name, float(error))
    if not skip:
        check(got._replace(gradients=wide), want._replace(gradients=wide), torch.float32)


@pytest.mark.parametrize(
    "needs", [Needs(True, False, False), Needs(False, True, False), Needs(False, False, False)]
)
def test_only_what_is_needed(needs):
    config = CompactConfig()
    got, want = both(batch(), config, needs=needs, bias=False, statistics=False)
    check(got, want, torch.float32, needs)


@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_change_nothing(frozen):
    """16 rows a chunk, questions of 20, 8 and 29: held, fitting, passed over twice."""
    needs = Needs(True, not frozen, not frozen)
    problem = batch(dtype=torch.bfloat16)
    config = CompactConfig(mi="logprob")
    row = 128 * 2
    whole, want = both(problem, config, needs=needs)
    check(whole, want, torch.bfloat16, needs)
    backend = TritonBackend(16 * row, hold_bytes=20 * row)
    parts, _ = both(problem, config, needs=needs, backend=backend)
    for name in ("token_logp", "nll", "mi", "weights"):
        a, b = getattr(parts, name), getattr(whole, name)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    check(parts, want, torch.bfloat16, needs)


def test_a_teacher_that_is_not_finite_poisons_nothing():
    hidden, *rest = batch()
    layout = rest[2]
    hidden = hidden.clone()
    hidden[int(layout.cu_seqlens[3]) - 1] = torch.nan  # last position of the third teacher
    for needs in (ALL, Needs(True, False, False)):
        got, want = both((hidden, *rest), CompactConfig(), needs=needs)
        assert got.nonfinite[2]
        assert got.weights[2] == 0
        for grad in got.gradients:
            assert grad is None or grad.isfinite().all()
        same = replace_nan(want)
        torch.testing.assert_close(got.weights.double(), same.weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.loss.double(), same.loss, rtol=1e-5, atol=1e-6)


def replace_nan(result):
    return result._replace(
        **{n: v.nan_to_num() for n, v in result._asdict().items() if n in ("loss", "weights")}
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_token_logp_and_its_gradients(dtype, cap, monkeypatch):
    hidden, weight, bias, layout, *_ = batch(dtype=dtype)
    config = launch.LOGITS_GEMM["interpreter"]
    monkeypatch.setitem(launch.LOGITS_GEMM, "interpreter", replace(config, tma=True))
    backend, targets = TritonBackend(chunk_bytes=1), layout.targets  # 16 rows a chunk
    logp, entropy, correct = backend.token_logp(hidden, weight, bias, targets, True, cap)
    exact = (hidden.double(), weight.double(), bias.double())
    want = REFERENCE.token_logp(*exact, targets, True, cap)
    torch.testing.assert_close(logp.double(), want[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want[1], rtol=0, atol=1e-5)
    assert torch.equal(correct, want[2] & (targets >= 0))
    upstream = 1e-5 * torch.randn(len(targets))
    upstream[layout.labelled.nonzero()[3]] = 0.0
    got = backend.token_logp_gradients(upstream, hidden, weight, bias, targets, ALL, cap)
    grads = REFERENCE.token_logp_gradients(upstream.double(), *exact, targets, ALL, cap)
    near = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-9
    for a, b in zip(got, grads, strict=True):
        # a gradient of 1e-5 is not held by float16; that is for whoever scales losses
        small = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * b.numel() ** 0.5
        assert (a.double() - b).norm() < near * b.norm() + small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_small_gradients_are_left_out(frozen, dtype, monkeypatch):
    monkeypatch.setattr(triton_skip, "BLOCK_ROWS", 16)
    for name in ("keep_columns", "move_together", "kept_to_rows", "kept_to_head"):
        kernel = partial(getattr(triton_skip, name), block_rows=16)
        monkeypatch.setattr(triton_skip, name, kernel)
    hidden, weight, bias, layout, *scores = batch(V=160, dtype=dtype)
    problem = (2 * hidden, weight, bias, layout, *scores)  # some likely tokens, many unlikely ones
    needs = Needs(True, not frozen, not frozen)
    dense = CompactConfig(consistency_weight=0.5)
    config = replace(dense, skip_below=0.02)
    whole, want = both(problem, dense, needs=needs)
    got, _ = both(problem, config, needs=needs)
    assert whole.kept_share is None
    assert got.kept_share.dtype == got.gradient_error.dtype == torch.float32
    for name in ("loss", "weights", "nll", "mi", "token_logp", "consistency"):
        a, b = getattr(got, name), getattr(whole, name)
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
    assert 0.05 < got.kept_share < 0.6
    if frozen:  # one chunk, blocks of 16 rows with a label: which columns they keep is known
        logits = 2 * hidden.double() @ weight.double().T + bias.double()
        g = logits.softmax(1)
        g[layout.labelled, layout.targets[layout.labelled]] -= 1
        g, live = g[layout.labelled], want.weights[layout.token_sequence][layout.labelled] > 0
        kept = torch.cat([(b.abs().amax(0) >= 0.02).expand(len(b), -1) for b in g.split(16)])
        assert (
            abs(float(got.kept_share) - float(kept[live].double().mean())) < 0.01
        )  # a column at the border
    errors = [
        0.0 if a is None else float((a.double() - b.double()).norm())
        for a, b in zip(got.gradients, whole.gradients, strict=True)
    ]
    rounding = [
        0.0 if g is None else float(torch.finfo(dtype).eps * g.double().norm())
        for g in whole.gradients
    ]
    for error, bound, slack in zip(errors, got.gradient_error.tolist(), rounding, strict=True):
        assert error <= bound + slack
    assert 0 < got.gradient_error[0] < 20 * errors[0]
    assert (got.gradient_error[1] == 0) == frozen
    assert got.gradient_error[2] == 0  # the bias's gradient is whole
    everything, _ = both(problem, replace(dense, skip_below=1e-12), needs=needs)
    assert everything.kept_share == 1
    for a, b in zip(everything.gradients, whole.gradients, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def eager(problem, config, weights):
    """Gradients of the weighted loss as plain autograd makes them in the dtype of the inputs."""
    hidden, weight, _, layout, *_ = problem
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = (h @ w.T).float().log_softmax(1).gather(1, layout.targets.clamp(min=0)[:, None])
    scale = weights[layout.token_sequence] / layout.label_counts[layout.token_sequence].clamp(min=1)
    loss = -(logp.squeeze(1) * scale * layout.labelled).sum() / layout.num_questions
    return torch.autograd.grad(loss, (h, w))


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize(
    ("tier", "dtype"),
    [("fused", torch.bfloat16), ("library", torch.bfloat16), ("auto", torch.float16)],
)
def test_no_worse_than_autograd(tier, dtype, confident):
    hidden, weight, bias, layout, *scores = batch(V=150, D=64, dtype=dtype)
    if confident:  # p > 0.99 at every label
        weight = torch.nn.functional.normalize(weight.float()).to(dtype)
        hidden = 14 * weight[layout.targets.clamp(min=0)]
    problem = (hidden, weight, bias, layout, *scores)
    config = CompactConfig(consistency="off")
    needs = Needs(True, True, False)
    got, want = both(problem, config, needs=needs, bias=False, backend=TritonBackend(tier=tier))
    if confident:
        assert want.token_logp[layout.labelled].min() > -0.01
    torch.testing.assert_close(got.token_logp.double(), want.token_logp, rtol=0, atol=1e-5)
    plain = eager(problem, config, got.weights)
    for ours, theirs, exact in zip(got.gradients, plain, want.gradients, strict=False):
        size = exact.norm()
        ulp = torch.finfo(dtype).eps / 3**0.5 / 4  # rms of rounding the result
        assert (ours - exact).norm() / size <= (theirs - exact).norm() / size + ulp


class NoReading(TorchDispatchMode):
    """Fails where the host would have to wait for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


def test_one_copy_carries_every_dtype():
    g = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.rand(7, generator=g) < 0.5,
        "ids": torch.randint(0, 99, (3, 2), generator=g)[:, :1],  # not contiguous
        "none": None,
        "empty": torch.zeros(0, dtype=torch.long),
        "wide": torch.rand(3, generator=g, dtype=torch.float64),
        "scalar": torch.tensor(4.0),
    }
    there = send(tensors, torch.device("cpu"))
    assert list(there) == list(tensors)
    for name, value in tensors.items():
        assert there[name] is None if value is None else torch.equal(there[name], value)
    addresses = {t.untyped_storage().data_ptr() for t in there.values() if t is not None}
    assert len(addresses) == 1


def test_strides_that_kernels_do_not_know():
    """Scores as columns of a table, hidden states and head as transposed views."""
    hidden, weight, bias, layout, consensus, attention = batch(dtype=torch.bfloat16)
    table = torch.stack([consensus, attention], 1)
    strided = (
        hidden.T.contiguous().T, weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 0],
        layout, table[:, 0], table[:, 1],
    )  # fmt: skip
    config = CompactConfig(consensus="both", mi="logprob")
    plain, _ = both((hidden, weight, bias, layout, consensus, attention), config)
    got, _ = both(strided, config)
    for a, b in zip((*plain[:3], *plain.gradients), (*got[:3], *got.gradients), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.weights, got.weights)


def test_a_fallback_within_the_backend_is_said_once(caplog, monkeypatch):
    """Bulk copies need rows that start at multiples of 16 bytes; 33 columns have none."""
    config = launch.LOGITS_GEMM["interpreter"]
    monkeypatch.setitem(launch.LOGITS_GEMM, "interpreter", replace(config, tma=True))
    say_once.cache_clear()
    problem = batch(D=33, dtype=torch.bfloat16)
    with caplog.at_level("INFO", logger="compact_fast"):
        got, want = both(problem, CompactConfig())
        both(problem, CompactConfig())
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "multiples of 16 bytes" in said[0]
    assert "(83, 33)" in said[0]
    check(got, want, torch.bfloat16)
    caplog.clear()
    with caplog.at_level("INFO", logger="compact_fast"):
        both(batch(), CompactConfig(), backend=TritonBackend(chunk_bytes=1, hold_bytes=0))
    assert any("its logits are made twice" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_step_reads_nothing_back(frozen):
    hidden, weight, bias, layout, consensus, attention = batch(dtype=torch.bfloat16)
    config, backend = CompactConfig(mi="logprob"), TritonBackend()
    head = DeviceHead.of(backend, hidden, weight, bias)
    plan = make_plan(layout, config, hidden.device, head.max_rows)
    work = TritonPass(head, plan, consensus, attention, config, None, True)
    with NoReading():
        work.run(hidden, weight, bias, Needs(True, not frozen, not frozen))


def test_deterministic():
    problem = batch(dtype=torch.bfloat16)
    first, again = (both(problem, CompactConfig())[0] for _ in range(2))
    for a, b in zip((*first[:3], *first.gradients), (*again[:3], *again.gradients), strict=True):
        assert torch.equal(a, b)


def test_refusals():
    backend, cpu = TritonBackend(), torch.device("cpu")
    assert backend.can_run(RunSpec(cpu, torch.float32, 100, 8)) is True  # the interpreter
    assert "float64" in backend.can_run(RunSpec(cpu, torch.float64, 100, 8))
    assert "mps" in backend.can_run(RunSpec(torch.device("mps"), torch.float32, 100, 8))
    refused = TritonBackend(tier="fused").can_run(RunSpec(cpu, torch.float32, 100, 8))
    assert "bfloat16" in refused
