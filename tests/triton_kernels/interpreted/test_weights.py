"""Scores and weights on the device against the plain-torch rules."""

import pytest
import torch
from compact_fast.triton_kernels.teacher_weights import (
    sequence_scores,
    sequence_scores_ref,
    teacher_weights,
    teacher_weights_ref,
)

from compact_fast import CompactConfig
from compact_fast.backends.triton_plan import information_of, make_plan, weight_rule
from compact_fast.layout import TokenLayout
from compact_fast.scores import (
    adaptability,
    difficulty,
    information_positions,
    pointwise_information,
)
from compact_fast.scores import teacher_weights as plain_weights

LENGTHS = [3, 1, 700, 2, 40, 5, 9]  # one longer than a block, one of a single token
LABELS = [2, 0, 650, 1, 30, 5, 4]
TEACHERS = [1, 4, 2]


def layout(seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.cat(
        [
            torch.cat([torch.full((n - k,), -100), torch.randint(0, 50, (k,), generator=g)])
            for n, k in zip(LENGTHS, LABELS, strict=True)
        ]
    )
    cu = torch.tensor([0, *LENGTHS]).cumsum(0)
    spans = torch.stack([cu[1:] - torch.tensor(LABELS).clamp(max=2), cu[1:]], 1)
    return TokenLayout(
        targets=targets,
        cu_seqlens=cu,
        cu_teachers=torch.tensor([0, *TEACHERS]).cumsum(0),
        thinking=torch.rand(len(targets), generator=g) < 0.2,
        gold_ids=torch.randint(0, 50, (5,), generator=g),
        cu_gold=torch.tensor([0, 1, 3, 5]),
        answer_spans=spans,
        prior_logp=torch.randn(3, generator=g),
        question_ids=torch.tensor([7, 8, 9]),
        correct=torch.tensor([1, 0, 1, -1, 1, 0, 0]),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mi": "logprob", "mi_length_norm": True, "thinking_weight": 0.7},
        {"mi_positions": "all"},
        {"mi": "pvi"},
    ],
)
def test_sequence_scores(options):
    config, batch = CompactConfig(**options), layout()
    g = torch.Generator().manual_seed(1)
    logp = -torch.rand(batch.num_tokens, generator=g)
    logp = torch.where(batch.labelled, logp, 0.0)
    values = torch.randn(batch.num_tokens, generator=g)
    values = torch.where(information_positions(batch, config), values, torch.nan)
    lse = torch.randn(batch.num_tokens, generator=g)
    plan = make_plan(batch, config, batch.device, max_rows=1000)
    information = information_of(plan, config, values, lse)
    mi, nll = sequence_scores(logp, batch.targets, batch.cu_seqlens, information)
    ref_mi, ref_nll = sequence_scores_ref(logp, batch.targets, batch.cu_seqlens, information)
    if config.mi == "pvi":
        want = pointwise_information(logp, batch)
    else:
        used = values - lse if config.mi == "logprob" else values
        want = adaptability(used, batch, config)
    near = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(nll, difficulty(logp, batch), **near)
    torch.testing.assert_close(mi, want, **near)
    torch.testing.assert_close(mi, ref_mi.float(), **near)
    torch.testing.assert_close(nll, ref_nll.float(), **near)


CASES = [
    {},
    {"consensus": "attention"},
    {"consensus": "both", "z_floor": 0.05, "tau": 0.7},
    {"consensus": "none"},
    {"mode": "paper"},
    {"weighting": "consensus"},
    {"weighting": "mi"},
    {"weighting": "difficulty"},
    {"weighting": "best"},
    {"weighting": "uniform"},
    {"weighting": "uniform", "filter_below": 0.6},
    {"weighting": "correct"},
    {"weighting": "random"},
    {"weighting": (0.5, 2.0, 0.0, 1.0)},
    {"beta_mi": 0.0, "beta_consensus": 0.0, "filter_below": 0.0},
]


@pytest.mark.parametrize("faulty", [False, True])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_teacher_weights(options, faulty):
    config, batch = CompactConfig(**options), layout()
    g = torch.Generator().manual_seed(2)
    mi, nll, graph, attention = torch.rand(4, 7, generator=g)
    graph = graph.double()
    if faulty:
        mi[1], nll[2], graph[3], mi[5], nll[6] = (
            torch.nan,
            torch.inf,
            torch.nan,
            -torch.inf,
            torch.nan,
        )
    consensus = None if options.get("mode") == "paper" else graph
    want = plain_weights(
        mi, nll, consensus, attention, batch.cu_teachers, config,
        teachers=batch.teachers, question_ids=batch.question_ids, correct=batch.correct,
    )  # fmt: skip
    rule, given = weight_rule(config, consensus, attention)
    shares = make_plan(batch, config, batch.device, max_rows=1000).shares
    got = teacher_weights(
        mi, nll, given, attention, shares, batch.cu_teachers, rule, most_teachers=max(TEACHERS)
    )
    for name in ("filtered", "nonfinite", "skipped"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("weights", "score", "consensus"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=1e-6, atol=1e-7, equal_nan=True
        )
    twin = teacher_weights_ref(mi, nll, given, attention, shares, batch.cu_teachers, rule)
    for name in ("filtered", "nonfinite", "skipped"):
        assert torch.equal(getattr(got, name), getattr(twin, name)), name
    for name in ("weights", "score", "consensus"):
        torch.testing.assert_close(
            getattr(got, name), getattr(twin, name), rtol=1e-6, atol=1e-7, equal_nan=True
        )
    part = teacher_weights(  # the second question alone, its sequences counted from 0
        mi[1:5], nll[1:5], None if given is None else given[1:5], attention[1:5],
        None if shares is None else shares[1:5], batch.cu_teachers[1:3], rule,
        most_teachers=16, first_sequence=1,
    )  # fmt: skip
    assert torch.equal(part.weights, got.weights[1:5])
