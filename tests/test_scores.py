"""Weights from scores: hand-worked numbers, invariants, baselines, non-finite scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fast import CompactConfig, TokenLayout
from compact_fast.scores import adaptability, difficulty, teacher_weights

NAN, INF = math.nan, math.inf


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def weights(mi, cons, nll, config=None, sizes=None, **rest):
    cu = torch.tensor([0, *(sizes or [len(nll)])]).cumsum(0)
    return teacher_weights(
        f64(*mi), f64(*nll), None if cons is None else f64(*cons), None, cu,
        config or CompactConfig(), **rest,
    )  # fmt: skip


def test_hand_worked_alpha():
    # z of (1, 2, 3) is (-1, 0, 1) / 1.0001, z of (.9, 1, .95) is (-1, 1, 0) * .05 / .0501
    out = weights([1, 2, 3], [0.9, 1.0, 0.95], [2, 2, 2])
    z1, z2 = 1 / 1.0001, 0.05 / 0.0501
    logits = [-z1 - z2, z2, z1]
    total = sum(math.exp(v) for v in logits)
    expected = [math.exp(v) / total for v in logits]
    assert out.weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert out.score.tolist() == pytest.approx(logits, rel=1e-12)


def test_two_teachers_are_always_one_standard_deviation_apart_unless_floored():
    near = weights([1.0, 1.001], None, [2, 2])
    far = weights([1.0, 9.0], None, [2, 2])
    assert far.score.tolist() == pytest.approx([-0.7071, 0.7071], abs=1e-4)
    assert near.score[1] > 0.6
    floored = weights([1.0, 1.001], None, [2, 2], CompactConfig(z_floor=0.1))
    assert floored.score[1].item() == pytest.approx(0.0005 / 0.1001, rel=1e-9)


def test_temperature_and_betas():
    config = CompactConfig(tau=2.0, beta_mi=0.0, beta_consensus=0.0, beta_difficulty=3.0)
    out = weights([5, 1, 3], None, [1, 2, 3], config)
    z = 1 / 1.0001
    ratio = math.exp(3 * z / 2.0)
    assert (out.weights[0] / out.weights[1]).item() == pytest.approx(ratio, rel=1e-12)


def test_filter_drops_what_is_off_the_mainstream_and_never_everybody():
    out = weights([1, 2, 3], [0.5, 0.79, 1.0], [1, 1, 1])
    assert out.filtered.tolist() == [True, True, False]
    assert out.weights.tolist() == [0, 0, 1]
    kept = weights([1, 2, 3], [0.8, 0.9, 1.0], [1, 1, 1])
    assert not kept.filtered.any()
    nothing = weights([1, 2], [0.0, 0.0], [1, 1])
    assert not nothing.filtered.any()
    assert nothing.weights.sum().item() == pytest.approx(1, abs=1e-15)


def test_filtered_teachers_still_count_in_the_z_scores():
    out = weights([1, 2, 6], [0.1, 1.0, 1.0], [1, 1, 1], CompactConfig(beta_consensus=0))
    z = (6 - 2) / (7**0.5 + 1e-4)
    assert (out.weights[2] / out.weights[1]).item() == pytest.approx(math.exp(z), rel=1e-9)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["mi", "cons", "nll"])
def test_a_score_that_is_not_finite_costs_its_teacher_the_weight(bad, where):
    scores = {"mi": [1.0, 2.0, 4.0], "cons": [0.9, 1.0, 1.0], "nll": [1.0, 2.0, 2.0]}
    scores[where][0] = bad
    out = weights(scores["mi"], scores["cons"], scores["nll"])
    assert out.nonfinite.tolist() == [True, False, False]
    assert out.weights[0] == 0
    rest = weights(*[scores[k][1:] for k in ("mi", "cons", "nll")])
    assert torch.equal(out.weights[1:], rest.weights)
    assert not out.skipped.any()


def test_unused_scores_may_be_anything():
    out = weights([NAN, NAN], None, [1, 2], CompactConfig(weighting="uniform"))
    assert out.weights.tolist() == [0.5, 0.5]
    assert weights([NAN, 1], None, [1, 2], CompactConfig(beta_mi=0)).nonfinite.sum() == 0


def test_a_question_without_finite_teachers_is_skipped_alone():
    out = weights([NAN, NAN, 1, 2], None, [1, 1, 1, 1], sizes=[2, 2])
    assert out.skipped.tolist() == [True, False]
    assert out.weights.tolist()[:2] == [0, 0]
    assert out.weights[2:].sum().item() == pytest.approx(1, abs=1e-15)


def test_one_teacher_gets_exactly_one():
    for config in (CompactConfig(), CompactConfig(tau=0.01), CompactConfig(weighting="best")):
        assert weights([7.3], [0.2], [900.0], config).weights.tolist() == [1.0]


def test_baselines():
    args = ([1, 2, 3, 3], [1.0, 1.0, 0.9, 0.9], [1, 1, 1, 1])
    teachers = torch.arange(4)

    def run(weighting, **rest):
        return weights(*args, CompactConfig(weighting=weighting), teachers=teachers, **rest).weights

    assert run("uniform").tolist() == [0.25] * 4
    assert run("correct", correct=torch.tensor([1, 0, -1, 1])).tolist() == [0.5, 0, 0, 0.5]
    none_right = weights(
        *args, CompactConfig(weighting="correct"), correct=torch.tensor([0, 0, -1, 0])
    )
    assert none_right.skipped.tolist() == [True]
    assert run((1.0, 3.0, 0.0, 0.0)).tolist() == [0.25, 0.75, 0, 0]
    best = run("best")
    assert best.sum() == 1
    assert set(best.tolist()) <= {0.0, 0.5, 1.0}
    tie = weights([1, 3, 3], None, [1, 1, 1], CompactConfig(weighting="best"))
    assert tie.weights.tolist() == [0, 0.5, 0.5]
    assert run("mi")[0] < run("mi")[1] < run("mi")[2]
    assert run("consensus")[0] > run("consensus")[2]


def test_random_weights_depend_on_question_teacher_and_seed_only():
    config = CompactConfig(weighting="random", seed=5)
    n, k = 4000, 4
    ids, teachers = torch.arange(n), torch.arange(k).repeat(n)
    z = torch.zeros(n * k)
    cu = torch.arange(n + 1) * k
    table = teacher_weights(
        z, z, None, None, cu, config, teachers=teachers, question_ids=ids
    ).weights.view(n, k)
    flipped = teacher_weights(
        z, z, None, None, cu, config, teachers=teachers.flip(0), question_ids=ids.flip(0)
    ).weights.view(n, k)
    torch.testing.assert_close(flipped.flip(0).flip(1), table, rtol=1e-6, atol=1e-7)
    # uniform on the simplex: mean 1/k, variance (k-1) / (k^2 (k+1)), pairwise covariance -var/(k-1)
    variance = (k - 1) / (k**2 * (k + 1))
    error = 5 * (variance / n) ** 0.5
    assert (table.mean(0) - 1 / k).abs().max() < error
    covariance = table.T.cov()
    assert (covariance.diagonal() - variance).abs().max() < 0.1 * variance
    off = covariance - torch.diag(covariance.diagonal())
    assert (off[off != 0] + variance / (k - 1)).abs().max() < 0.06 * variance
    other = teacher_weights(
        z, z, None, None, cu, CompactConfig(weighting="random", seed=6),
        teachers=teachers, question_ids=ids,
    )  # fmt: skip
    assert (other.weights.view(n, k) - table).abs().mean() > 0.1


def test_both_is_the_mean_of_the_two_z_scores():
    graph, attention = f64(0.9, 1.0, 0.8), f64(3.0, 1.0, 2.0)
    config = CompactConfig(consensus="both", beta_mi=0, beta_difficulty=0, filter_below=0)
    out = teacher_weights(
        f64(0, 0, 0), f64(0, 0, 0), graph, attention, torch.tensor([0, 3]), config
    )
    z = [(v - v.mean()) / (v.std() + 1e-4) for v in (graph, attention)]
    assert torch.allclose(out.consensus, (z[0] + z[1]) / 2, atol=1e-12)


scores_of_one = st.tuples(*[st.floats(-50, 50) for _ in range(3)])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(scores_of_one, min_size=1, max_size=16), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_sum_to_one_permutation_and_packing(questions, rnd):
    sizes = [len(q) for q in questions]
    flat = [s for q in questions for s in q]
    columns = list(zip(*flat, strict=True))
    cons = [abs(c) / 50 for c in columns[1]]
    out = weights(columns[0], cons, columns[2], sizes=sizes)
    start = 0
    for n in sizes:
        here = slice(start, start + n)
        assert out.weights[here].sum().item() == pytest.approx(1, abs=1e-12)
        alone = weights(columns[0][here], cons[here], columns[2][here])
        assert torch.equal(alone.weights, out.weights[here])  # same bits in any company
        order = list(range(start, start + n))
        rnd.shuffle(order)
        moved = weights(*[[c[i] for i in order] for c in (columns[0], cons, columns[2])])
        torch.testing.assert_close(moved.weights, out.weights[order], rtol=1e-8, atol=1e-12)
        start += n


def test_adaptability_by_hand():
    layout = TokenLayout(
        targets=torch.tensor([-100, 1, 1, 1, -100, 1, -100]),
        cu_seqlens=torch.tensor([0, 5, 7]),
        cu_teachers=torch.tensor([0, 2]),
        thinking=torch.tensor([0, 0, 1, 0, 0, 0, 1]).bool(),
    )
    info = f64(0.0, 1.0, 3.0, 2.0, 2.5, 10.0, 9.0)
    # gains 0 1 2 -1 .5 | 0 -1; the assistant's tokens are 2, 3, 4 and 6
    assistant = adaptability(info, layout, CompactConfig())
    assert assistant.tolist() == pytest.approx([2.0 + 0.1 * 0.5, 0.0])
    everywhere = adaptability(info, layout, CompactConfig(mi_positions="all"))
    assert everywhere.tolist() == pytest.approx([0.1 * 1 + 2.0 + 0.1 * 0.5, 0.0])
    mean = adaptability(info, layout, CompactConfig(mi_length_norm=True))
    assert mean.tolist() == pytest.approx([2.05 / 3, 0.0])


def test_difficulty_is_a_mean_over_labels_and_nan_without_any():
    layout = TokenLayout(
        targets=torch.tensor([-100, 1, 1, -100, -100]),
        cu_seqlens=torch.tensor([0, 3, 5]),
        cu_teachers=torch.tensor([0, 2]),
    )
    out = difficulty(f64(0, -2, -4, 0, 0), layout)
    assert out[0] == 3
    assert out[1].isnan()
