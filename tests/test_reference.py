"""The reference against hand-worked numbers, finite differences and the method's invariants."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from compact_fast import CompactConfig, TokenLayout
from compact_fast.reference import attention_consensus, compact_loss, logits, target_logp
from compact_fast.testing import random_batch

MODES = ("compact", "paper", "reference")


def run(batch, config=None, *, hidden=None, weight=None, **rest):
    return compact_loss(
        batch.hidden if hidden is None else hidden,
        batch.weight if weight is None else weight,
        batch.layout,
        consensus=batch.consensus,
        attention=batch.attention,
        config=config or CompactConfig(),
        **rest,
    )


def test_hand_worked_loss():
    """Two one-label rationales, V = 2, D = 1: every figure can be done on paper."""
    layout = TokenLayout(
        targets=torch.tensor([0, -100, 1, -100]),
        cu_seqlens=torch.tensor([0, 2, 4]),
        cu_teachers=torch.tensor([0, 2]),
        thinking=torch.tensor([False, True, False, False]),
        gold_ids=torch.tensor([0]),
        cu_gold=torch.tensor([0, 1]),
        answer_spans=torch.tensor([[0, 1], [2, 3]]),
    )
    hidden = torch.tensor([[0.0], [1.0], [1.0], [3.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    # logits (0,0) and (1,0): NLL of label 0 in the first is ln 2; of label 1 in the second ln(1+e)
    nll = [math.log(2), math.log(1 + math.e)]
    mi = [1.0 * (1 - 0), 0.1 * (3 - 1)]  # the thinking token counts 1, the other 0.1
    z_mi = [(m - 0.6) / (abs(mi[0] - mi[1]) / math.sqrt(2) + 1e-4) for m in mi]
    mean = sum(nll) / 2
    z_nll = [(v - mean) / (abs(nll[0] - nll[1]) / math.sqrt(2) + 1e-4) for v in nll]
    e = [math.exp(a - 0.5 * b) for a, b in zip(z_mi, z_nll, strict=True)]
    alpha = [v / sum(e) for v in e]
    p, q = (0.5, 0.5), (math.e / (1 + math.e), 1 / (1 + math.e))
    divergence = sum((a - b) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))

    out = compact_loss(hidden, weight, layout, config=CompactConfig())
    assert out.nll.tolist() == pytest.approx(nll, rel=1e-12)
    assert out.mi.tolist() == pytest.approx(mi, rel=1e-12)
    assert out.weights.tolist() == pytest.approx(alpha, rel=1e-12)
    assert out.consistency.item() == pytest.approx(alpha[0] * alpha[1] * divergence, rel=1e-12)
    sft = alpha[0] * nll[0] + alpha[1] * nll[1]
    assert out.loss_sft.item() == pytest.approx(sft, rel=1e-12)
    expected = sft + 0.1 * alpha[0] * alpha[1] * divergence
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)

    logprob = compact_loss(hidden, weight, layout, config=CompactConfig(mi="logprob"))
    gain = [
        1.0 * (math.log(q[0]) - math.log(0.5)),
        0.1 * (math.log(1 / (1 + math.exp(-3))) - math.log(q[0])),
    ]
    assert logprob.mi.tolist() == pytest.approx(gain, rel=1e-12)
    prior = dataclasses.replace(layout, prior_logp=torch.tensor([-2.0], dtype=torch.float64))
    pvi = compact_loss(hidden, weight, prior, config=CompactConfig(mi="pvi"))
    assert pvi.mi.tolist() == pytest.approx([2 - nll[0], 2 - nll[1]], rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mi", ["logit", "logprob", "pvi"])
def test_gradcheck_with_alpha_held(mode, mi):
    """Finite differences in float64 of the loss with alpha fixed: it is a constant by METHOD."""
    batch = random_batch((2, 3), vocab=11, width=4, longest=7, seed=1)
    base = run(batch, CompactConfig(mode=mode, mi=mi))
    held = CompactConfig(mode=mode, mi=mi, filter_below=0, weighting="uniform", pair_floor=0)

    def loss(hidden, weight):
        # alpha as fixed weights of (question, place): one question at a time, so ids do not clash
        total = hidden.new_zeros(())
        for q in range(2):
            at = batch.layout.question_positions([q])
            s = slice(*batch.layout.cu_teachers[q : q + 2].tolist())
            alpha = base.weights[s]
            if not alpha.any():
                continue
            fixed = dataclasses.replace(held, weighting=tuple(alpha.tolist()))
            part = compact_loss(
                hidden[at], weight, batch.layout.select_questions([q]),
                consensus=batch.consensus[s], attention=batch.attention[s], config=fixed,
            )  # fmt: skip
            total = total + part.loss / max(1, int((~base.skipped).sum()))
        return total

    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (hidden, weight), atol=1e-7)
    # and the loss with live alpha has that very gradient: nothing flows through alpha
    config = CompactConfig(mode=mode, mi=mi, pair_floor=0)
    live = run(batch, config, hidden=hidden, weight=weight)
    got = torch.autograd.grad(live.loss, (hidden, weight))
    want = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_alpha_moves_with_the_student_but_carries_no_gradient():
    batch = random_batch(seed=2)
    out = run(batch)
    assert not out.weights.requires_grad
    moved = run(batch, hidden=batch.hidden * 1.3)
    assert not torch.equal(out.weights, moved.weights)


@pytest.mark.parametrize("weighting", ["compact", "uniform", "mi", "best"])
def test_one_teacher_is_plain_supervised_fine_tuning(weighting):
    """Bit for bit the mean of the questions' token-mean NLL, loss and gradient."""
    batch = random_batch((1, 1, 1), seed=4, dtype=torch.float32)
    batch.layout.label_counts  # noqa: B018
    hidden = batch.hidden.clone().requires_grad_()
    out = run(batch, CompactConfig(weighting=weighting), hidden=hidden)
    assert out.weights[~out.skipped].tolist() == [1.0] * int((~out.skipped).sum())
    (got,) = torch.autograd.grad(out.loss, hidden)

    plain = batch.hidden.clone().requires_grad_()
    logp = target_logp(logits(plain, batch.weight, None), batch.layout.targets)
    nll = []
    for s in range(3):
        a, b = batch.layout.cu_seqlens[s : s + 2].tolist()
        labelled = batch.layout.targets[a:b] >= 0
        if labelled.any():
            nll.append(-logp[a:b].sum() / labelled.sum())
    loss = (torch.stack(nll).sum() / len(nll)).float()  # rounded once
    (want,) = torch.autograd.grad(loss, plain)
    assert torch.equal(out.loss.detach(), loss.detach())
    assert torch.equal(got, want)


def test_one_teacher_is_torchs_cross_entropy():
    batch = random_batch((1,), seed=5)
    logits = batch.hidden @ batch.weight.T
    want = F.cross_entropy(logits, batch.layout.targets, ignore_index=-100)
    torch.testing.assert_close(run(batch).loss, want, rtol=1e-14, atol=0)


def repeat_teacher(batch, k):
    """A batch whose one question has the same rationale k times."""
    layout = batch.layout
    one = layout.select_questions([0])
    n = one.num_tokens
    spans = one.answer_spans.repeat(k, 1) + (torch.arange(k) * n)[:, None]
    many = TokenLayout(
        targets=one.targets.repeat(k),
        cu_seqlens=torch.arange(k + 1) * n,
        cu_teachers=torch.tensor([0, k]),
        thinking=one.thinking.repeat(k),
        gold_ids=one.gold_ids,
        cu_gold=one.cu_gold,
        answer_spans=spans,
        prior_logp=one.prior_logp,
    )
    at = layout.question_positions([0])
    return one, many, batch.hidden[at], batch.hidden[at].repeat(k, 1)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_identical_teachers_equal_one(k):
    batch = random_batch((1, 2), seed=6)
    one, many, h1, hk = repeat_teacher(batch, k)
    h1, hk = h1.requires_grad_(), hk.requires_grad_()
    a = compact_loss(h1, batch.weight, one)
    b = compact_loss(hk, batch.weight, many, consensus=torch.full((k,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(
        b.weights, torch.full((k,), 1 / k, dtype=torch.float64), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
    ga, gb = torch.autograd.grad(a.loss, h1)[0], torch.autograd.grad(b.loss, hk)[0]
    torch.testing.assert_close(gb.view(k, *ga.shape).sum(0), ga, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_packing_and_order_of_questions_do_not_matter(mode):
    batch = random_batch((3, 1, 4, 2), seed=7)
    config = CompactConfig(mode=mode)
    whole = run(batch, config)
    order = [2, 0, 3, 1]
    seqs = torch.cat([torch.arange(*batch.layout.cu_teachers[q : q + 2].tolist()) for q in order])
    moved = compact_loss(
        batch.hidden[batch.layout.question_positions(order)], batch.weight,
        batch.layout.select_questions(order), consensus=batch.consensus[seqs],
        attention=batch.attention[seqs], config=config,
    )  # fmt: skip
    torch.testing.assert_close(moved.loss, whole.loss, rtol=1e-12, atol=0)
    for name in ("weights", "nll", "mi", "score"):
        got, want = getattr(moved, name), getattr(whole, name)[seqs]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, equal_nan=True)
    alone = [
        compact_loss(
            batch.hidden[batch.layout.question_positions([q])], batch.weight,
            batch.layout.select_questions([q]), consensus=batch.consensus[s],
            attention=batch.attention[s], config=config, normalizer=1,
        ).loss
        for q in range(4)
        for s in [slice(*batch.layout.cu_teachers[q : q + 2].tolist())]
    ]  # fmt: skip
    mean = sum(alone) / int((~whole.skipped).sum())
    torch.testing.assert_close(mean, whole.loss, rtol=1e-12, atol=0)


def permute_teachers(layout, order):
    """The same single question with its teachers in another order."""
    cu = layout.cu_seqlens.tolist()
    at = torch.cat([torch.arange(cu[s], cu[s + 1]) for s in order])
    lengths = layout.sequence_lengths[order]
    new_cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    shift = new_cu[:-1] - layout.cu_seqlens[:-1][order]
    return at, dataclasses.replace(
        layout,
        targets=layout.targets[at],
        cu_seqlens=new_cu,
        thinking=layout.thinking[at],
        answer_spans=layout.answer_spans[order] + shift[:, None],
        correct=layout.correct[order],
    )


@pytest.mark.parametrize("mode", MODES)
def test_permuting_teachers_permutes_alpha(mode):
    batch = random_batch((5,), seed=8)
    order = torch.tensor([3, 0, 4, 2, 1])
    at, layout = permute_teachers(batch.layout, order)
    config = CompactConfig(mode=mode)
    a = run(batch, config)
    b = compact_loss(
        batch.hidden[at], batch.weight, layout, consensus=batch.consensus[order],
        attention=batch.attention[order], config=config,
    )  # fmt: skip
    torch.testing.assert_close(b.weights, a.weights[order], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-12, atol=0)


def padded_batch(extra_pad=0, seed=9):
    """Three rationales of one question, right-padded, PAD positions with hidden states too."""
    gen = torch.Generator().manual_seed(seed)
    lengths = [6, 9, 7]
    L = max(lengths) + extra_pad
    ids = torch.randint(1, 30, (3, 20), generator=gen)[:, :L].clone()
    mask = torch.zeros(3, L, dtype=torch.long)
    for s, n in enumerate(lengths):
        mask[s, :n] = 1
    ids[mask == 0] = 0
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :3] = -100
    layout = TokenLayout.from_padded(
        ids, mask, labels, [0, 3], thinking_ids=[5, 6, 7],
        gold_ids=torch.tensor([4, 9]), cu_gold=torch.tensor([0, 2]),
        answer_spans=torch.tensor([[3, 5], [L + 4, L + 7], [0, 0]]),
    )  # fmt: skip
    hidden = torch.randn(3, 20, 8, generator=gen, dtype=torch.float64)[:, :L].reshape(-1, 8)
    weight = torch.randn(30, 8, generator=gen, dtype=torch.float64)
    return hidden, weight, layout, lengths, L


def test_reference_mode_is_the_authors_computation():
    """Straight from METHOD's formulas on the padded batch, in other words than reference.py's."""
    hidden, weight, layout, lengths, L = padded_batch(extra_pad=2)
    attention = torch.tensor([0.9, 0.7, 1.1], dtype=torch.float64)
    out = compact_loss(
        hidden, weight, layout, attention=attention, config=CompactConfig(mode="reference")
    )
    h = hidden.view(3, L, 8)
    ids = layout.input_ids.view(3, L)
    info = (h @ weight[[4, 9]].T).mean(-1)
    gain = (info[:, 1:] - info[:, :-1]).clamp(min=0)
    thinks = (ids == 5) | (ids == 6) | (ids == 7)
    factor = torch.full(ids.shape, 0.1, dtype=torch.float64).masked_fill(thinks, 1.0)[:, 1:]
    mi = (gain * factor).sum(1)  # PAD positions included
    torch.testing.assert_close(out.mi, mi, rtol=1e-12, atol=0)
    logp = (h @ weight.T).log_softmax(-1)
    nll = torch.stack(
        [-torch.stack([logp[s, t - 1, ids[s, t]] for t in range(3, lengths[s])]).mean()
         for s in range(3)]
    )  # fmt: skip
    z = [(v - v.mean()) / (v.std() + 1e-4) for v in (mi, attention, nll)]
    alpha = (z[0] + z[1] - 0.5 * z[2]).softmax(0)
    torch.testing.assert_close(out.weights, alpha, rtol=1e-12, atol=0)
    pull = 0.0
    for i in range(3):
        for j in range(i + 1, 3):
            n = min(lengths[i], lengths[j])
            a, b = logp[i, :n], logp[j, :n]
            kl = F.kl_div(b, a, log_target=True, reduction="sum")
            kl = kl + F.kl_div(a, b, log_target=True, reduction="sum")
            pull = pull + alpha[i] * alpha[j] * kl / n
    torch.testing.assert_close(out.loss, (alpha * nll).sum() + 0.1 * pull, rtol=1e-12, atol=0)


def test_only_reference_mode_sees_padding():
    attention = torch.tensor([0.9, 0.7, 1.1], dtype=torch.float64)
    results = {}
    for pad in (0, 4):
        hidden, weight, layout, *_ = padded_batch(extra_pad=pad)
        for mode in ("paper", "reference"):
            out = compact_loss(
                hidden, weight, layout, attention=attention, config=CompactConfig(mode=mode)
            )
            results[mode, pad] = out
    same = [results["paper", p] for p in (0, 4)]
    torch.testing.assert_close(same[0].weights, same[1].weights, rtol=1e-12, atol=0)
    quirky = [results["reference", p] for p in (0, 4)]
    assert (quirky[0].mi < quirky[1].mi).all()  # more PAD, more "information"
    torch.testing.assert_close(quirky[0].nll, quirky[1].nll, rtol=1e-12, atol=0)


def test_consistency_all_needs_right_padding():
    hidden, weight, layout, *_ = padded_batch(extra_pad=1)
    left = dataclasses.replace(layout, real=layout.real.view(3, -1).flip(1).reshape(-1))
    with pytest.raises(ValueError, match="pad on the right"):
        compact_loss(
            hidden, weight, left, attention=torch.ones(3).double(),
            config=CompactConfig(mode="reference"),
        )  # fmt: skip


def test_attention_consensus_by_hand():
    """Two heads of one feature, one key head; diagonal zeroed after the softmax."""
    q = torch.tensor([[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    k = torch.tensor([[1.0], [2.0], [0.5]], dtype=torch.float64)
    logits = (q.sum(1)[:, None] * k[:, 0][None, :]) / math.sqrt(2)
    a = logits.softmax(1)
    want = [sum(a[j, i].item() for j in range(3) if j != i) for i in range(3)]
    got = attention_consensus(q, k, torch.tensor([0, 3]), num_heads=2, num_kv_heads=1)
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_attention_consensus_repeat_differs_only_under_grouped_queries():
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(5, 12, generator=gen, dtype=torch.float64)
    cu = torch.tensor([0, 4, 5])

    def both(kv, k):
        return [
            attention_consensus(q, k, cu, num_heads=4, num_kv_heads=kv, gqa=g)
            for g in ("heads", "repeat")
        ]

    mha = both(4, torch.randn(5, 12, generator=gen, dtype=torch.float64))
    assert torch.equal(mha[0], mha[1])
    k = torch.randn(5, 6, generator=gen, dtype=torch.float64)
    heads, repeat = both(2, k)
    assert (heads - repeat).abs().max() > 1e-3
    # the authors': feature i of the query meets feature i // rep of the key
    logits = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(12):
        logits += q[:4, i][:, None] * k[:4, i // 2][None, :]
    a = (logits / math.sqrt(12)).softmax(1).fill_diagonal_(0)
    torch.testing.assert_close(repeat[:4], a.sum(0), rtol=1e-12, atol=0)
    assert heads[4] == 0  # a lone rationale has nobody to agree with


def test_pairs_below_the_floor_are_left_out():
    batch = random_batch((3,), seed=10)
    config = CompactConfig(weighting=(1.0, 1e-5, 1.0), consistency="all")
    with_floor = run(batch, config)
    without = run(batch, dataclasses.replace(config, pair_floor=0.0))
    assert with_floor.consistency.item() < without.consistency.item()


def test_a_teacher_with_infinite_loss_does_not_poison_the_rest():
    batch = random_batch((3,), seed=11)
    hidden = batch.hidden.clone()
    a, b = batch.layout.cu_seqlens[1:3].tolist()
    hidden[a:b] = torch.nan
    out = run(batch, hidden=hidden.requires_grad_())
    assert out.nonfinite.tolist() == [False, True, False]
    assert out.loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 16).double()}, "hidden has 3 rows, the layout"),
        ({"weight": torch.zeros(97, 4).double()}, r"expected hidden \[T, D\]"),
        ({"weight": torch.zeros(97, 16)}, "float64 goes with float64"),
        ({"weight": torch.zeros(20, 16).double()}, r"targets\[\d+\] = \d+ is outside the head's"),
        ({"config": CompactConfig(mode="paper"), "attention": None}, "needs attention="),
        ({"config": CompactConfig(consensus="both"), "attention": None}, "needs both"),
        ({"consensus": torch.ones(2).double()}, r"consensus: expected shape"),
        ({"config": CompactConfig(weighting=(1.0, 2.0))}, "2 fixed weights; the batch has teach"),
        ({"head_bias": torch.zeros(3).double()}, "head_bias: expected shape"),
    ],
)
def test_arguments_that_contradict_are_named(change, message):
    batch = random_batch(seed=12)
    arguments = {
        "hidden": batch.hidden, "weight": batch.weight, "consensus": batch.consensus,
        "attention": batch.attention, "config": CompactConfig(), "head_bias": None, **change,
    }  # fmt: skip
    hidden, weight = arguments.pop("hidden"), arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        compact_loss(hidden, weight, batch.layout, **arguments)


@pytest.mark.parametrize(
    ("field", "config", "message"),
    [
        ("correct", CompactConfig(weighting="correct"), "needs layout.correct"),
        ("question_ids", CompactConfig(weighting="random"), "needs layout.question_ids"),
        ("prior_logp", CompactConfig(mi="pvi"), "needs layout.prior_logp"),
    ],
)
def test_what_a_configuration_needs_of_the_layout(field, config, message):
    batch = random_batch(seed=12)
    layout = dataclasses.replace(batch.layout, **{field: None})
    with pytest.raises(ValueError, match=message):
        compact_loss(batch.hidden, batch.weight, layout, config=config)
    bare = dataclasses.replace(batch.layout, gold_ids=None, cu_gold=None)
    with pytest.raises(ValueError, match=r"needs layout\.gold_ids"):
        compact_loss(batch.hidden, batch.weight, bare)
    assert compact_loss(
        batch.hidden, batch.weight, bare, config=CompactConfig(weighting="uniform")
    ).mi.isnan().all()  # fmt: skip


@pytest.mark.parametrize("mode", ["compact", "paper"])
def test_small_gradients_are_left_out_entry_by_entry(mode):
    """Gradients are those of a surrogate whose logit gradients were cut by hand."""
    batch, eps = random_batch(seed=3, scale=1.5, unlabelled=False), 0.02
    config = CompactConfig(mode=mode, skip_below=eps)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    out = run(batch, config, head_bias=batch.bias)
    plain = run(batch, dataclasses.replace(config, skip_below=0.0), head_bias=batch.bias)
    assert torch.equal(out.loss, plain.loss)
    assert plain.kept_share is None
    layout = batch.layout
    g = (hidden @ weight.T + batch.bias).softmax(-1).detach()
    rows = layout.labelled.nonzero().squeeze(1)
    g[rows, layout.targets[rows]] -= 1
    scale = (out.weights / layout.label_counts)[layout.token_sequence] * layout.labelled
    cut = torch.where(g.abs() < eps, g, 0.0) * scale[:, None] / layout.num_questions
    for own, exact, missing in zip(
        torch.autograd.grad(out.loss, (hidden, weight)),
        torch.autograd.grad(plain.loss, (hidden, weight)),
        (cut @ weight.detach(), cut.T @ hidden.detach()),
        strict=True,
    ):
        torch.testing.assert_close(exact - own, missing, rtol=1e-9, atol=1e-12)
    live = scale > 0
    assert out.kept_share.item() == pytest.approx(float((g[live].abs() >= eps).double().mean()))
    norms, sizes = weight.detach().norm(dim=1), hidden.detach().norm(dim=1)
    want = [(cut.abs() @ norms).norm(), (cut.abs().T @ sizes).norm(), cut.abs().sum(0).norm()]
    assert out.gradient_error.tolist() == pytest.approx([float(w) for w in want])
