"""Random ragged batches: the backend and the reference agree whatever the shape."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compact_fast import CompactConfig
from compact_fast.backends.protocol import Needs
from compact_fast.backends.reference_backend import ReferenceBackend
from compact_fast.backends.triton_backend import TritonBackend
from compact_fast.layout import TokenLayout

CONFIGS = (
    {},
    {"mode": "paper"},
    {"consensus": "both", "mi": "logprob"},
    {"weighting": "best", "consistency": "all"},
    {"weighting": "random", "consistency_weight": 1.0},
)


@st.composite
def problems(draw):
    questions = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    S = sum(questions)
    prompts = draw(st.lists(st.integers(0, 3), min_size=S, max_size=S))
    labels = draw(st.lists(st.integers(0, 6), min_size=S, max_size=S))
    if draw(st.booleans()):
        labels = [0] * S if draw(st.booleans()) else [n or 1 for n in labels]
    lengths = torch.tensor([p + n or 1 for p, n in zip(prompts, labels, strict=True)])
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    V, D = draw(st.sampled_from([(3, 5), (70, 16)]))
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    T = int(cu[-1])
    targets = torch.full((T,), -100)
    spans = torch.zeros(S, 2, dtype=torch.long)
    for s, n in enumerate(labels):
        end = int(cu[s + 1])
        targets[end - n : end] = torch.randint(0, V, (n,), generator=g)
        if n > 1:
            spans[s] = torch.tensor([end - 2, end])
    layout = TokenLayout(
        targets=targets,
        cu_seqlens=cu,
        cu_teachers=torch.tensor([0, *questions]).cumsum(0),
        gold_ids=torch.randint(0, V, (len(questions),), generator=g),
        cu_gold=torch.arange(len(questions) + 1),
        answer_spans=spans,
        question_ids=torch.arange(len(questions)),
    )
    scale = draw(st.sampled_from([0.0, 1.0, 20.0]))  # all logits equal; usual; up to +-80
    hidden = scale * torch.randn(T, D, generator=g)
    weight = torch.randn(V, D, generator=g) / D**0.5
    scores = torch.rand(2, S, generator=g)
    return hidden, weight, layout, scores[0], scores[1]


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from(CONFIGS), st.booleans(), st.booleans())
def test_any_layout(problem, options, frozen, fused):
    hidden, weight, layout, consensus, attention = problem
    dtype = torch.bfloat16 if fused else torch.float32
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    needs = Needs(True, not frozen, False)
    rest = (None, layout, consensus, attention, CompactConfig(**options), None, needs, False)
    got = TritonBackend().score_and_loss(hidden, weight, *rest)
    want = ReferenceBackend().score_and_loss(hidden.double(), weight.double(), *rest)
    for name in ("filtered", "nonfinite", "skipped"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    size = float(hidden.float().abs().max()) + 1
    for name in ("token_logp", "nll", "mi", "loss", "weights", "consistency"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name),
            rtol=1e-4, atol=5e-6 * size, equal_nan=True, msg=name,
        )  # fmt: skip
    for value, exact in zip(got.gradients[:2], want.gradients[:2], strict=True):
        if value is not None:
            step = 2.0**-7 if fused else 1e-4
            assert (value.double() - exact).norm() <= step * exact.norm() + 1e-6 * size
