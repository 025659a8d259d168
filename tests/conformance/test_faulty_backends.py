"""Backends with one deliberate fault each: the suite must fail and say which fault it is."""

import dataclasses
import inspect

import pytest
import torch

from compact_fast import reference, scores
from compact_fast.backends.head import Head
from compact_fast.backends.protocol import Gradients
from compact_fast.backends.reference_backend import ReferenceBackend
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.testing import check_backend, random_batch


class Faulty(ReferenceBackend):
    """The reference with its result changed by `spoil`."""

    def __init__(self, spoil):
        super().__init__(name="faulty")
        object.__setattr__(self, "spoil", spoil)

    def score_and_loss(self, hidden, weight, bias, layout, consensus, attention, config, *rest):
        args = (hidden, weight, bias, layout, consensus, attention, config, *rest)
        good = super().score_and_loss(*args)
        return self.spoil(good, args)


def with_hidden(good, gradient):
    return good._replace(gradients=good.gradients._replace(hidden=gradient))


def wrong_weight(good, args):
    """One teacher's gradient is taken 1.3 times."""
    if good.gradients.hidden is None:
        return good
    layout = args[3]
    g = good.gradients.hidden.clone()
    g[layout.token_sequence == 0] *= 1.3
    return with_hidden(good, g)


def ignored_weights(good, args):
    config = dataclasses.replace(args[6], weighting="uniform")
    even = ReferenceBackend().score_and_loss(*args[:6], config, *args[7:])
    return good._replace(loss=even.loss, loss_sft=even.loss_sft, gradients=even.gradients)


def live_alpha(good, args):
    """The gradient runs through the weights as well."""
    hidden, weight, bias, layout, consensus, attention, config = args[:7]
    if good.gradients.hidden is None or config.weighting != "compact" or layout.real is not None:
        return good

    def run():
        h = hidden.detach().clone().requires_grad_()
        logp = reference.log_softmax(h, weight, bias)
        nll = scores.difficulty(reference.pick_targets(logp, layout.targets), layout)
        shares = inspect.unwrap(scores.teacher_weights)(
            good.mi, nll, consensus, attention, layout.cu_teachers, config,
            teachers=layout.teachers,
        )  # fmt: skip
        loss = (shares.weights * nll).nan_to_num().sum() / layout.num_questions
        return torch.autograd.grad(loss, h)[0]

    return with_hidden(good, run())


def bf16_accumulation(good, args):
    g = good.gradients
    low = [None if t is None else t.bfloat16().to(t.dtype) for t in (g.weight, g.bias)]
    return good._replace(gradients=Gradients(g.hidden, *low))


def swapped_teachers(good, args):
    w = good.weights.clone()
    a, b = args[3].cu_teachers[:2].tolist()
    w[a:b] = w[a:b].flip(0)
    return good._replace(weights=w)


def not_summing_to_one(good, args):
    return good._replace(weights=good.weights * 0.9)


def dropped_last_token(good, args):
    layout = args[3]
    at = torch.where(layout.labelled, torch.arange(layout.num_tokens), -1)
    last = torch.full((layout.num_sequences,), -1).scatter_reduce(
        0, layout.token_sequence, at, "amax"
    )
    logp = good.token_logp.clone()
    logp[last[last >= 0]] = 0
    nll = -scores.segment_sum(logp, layout) / (layout.label_counts - 1)
    return good._replace(nll=nll.to(good.nll.dtype))


def sum_over_tokens(good, args):
    return good._replace(nll=good.nll * args[3].label_counts)


def sum_over_questions(good, args):
    return good._replace(loss=good.loss * args[3].num_questions)


def no_consistency(good, args):
    return good._replace(loss=good.loss_sft)


def mi_everywhere(good, args):
    config = dataclasses.replace(args[6], mi_positions="all")
    return good._replace(mi=ReferenceBackend().score_and_loss(*args[:6], config, *args[7:]).mi)


def gradient_without_labels(good, args):
    if good.gradients.hidden is None:
        return good
    g = good.gradients.hidden.clone()
    g[~args[3].labelled] = 1e-3
    return with_hidden(good, g)


def unfiltered(good, args):
    config = dataclasses.replace(args[6], filter_below=0.0)
    return ReferenceBackend().score_and_loss(*args[:6], config, *args[7:])


def poisoned(good, args):
    bad = args[0].isnan().any()
    return good._replace(loss=good.loss * torch.nan) if bad else good


def undone_by_a_mask(good, args):
    """Takes -inf from -inf where all teachers mask an entry."""
    masked = args[2].isinf().any() and args[6].consistency != "off"
    return good._replace(consistency=good.consistency * torch.nan) if masked else good


def aliased(good, args):
    return good._replace(consensus=args[4])


def configured(good, args, **change):
    config = dataclasses.replace(args[6], **change)
    return ReferenceBackend().score_and_loss(*args[:6], config, *args[7:])


def cold(good, args):
    return configured(good, args, tau=1.0)


def without_floor(good, args):
    return configured(good, args, z_floor=0.0)


def deaf(good, args):
    """Hears nothing of consensus."""
    return ReferenceBackend().score_and_loss(*args[:4], torch.ones_like(args[4]), *args[5:])


def fond_of_difficulty(good, args):
    return configured(good, args, beta_difficulty=-args[6].beta_difficulty)


def half_consistency(good, args):
    return configured(good, args, consistency_weight=args[6].consistency_weight / 2)


def value_without_pull(good, args):
    return good._replace(gradients=configured(good, args, consistency="off").gradients)


def unweighted_head(good, args):
    if good.gradients.weight is None:
        return good
    even = configured(good, args, weighting="uniform").gradients
    return good._replace(gradients=good.gradients._replace(weight=even.weight))


def summed_head(good, args):
    if good.gradients.weight is None:
        return good
    g = good.gradients.weight * args[3].num_questions
    return good._replace(gradients=good.gradients._replace(weight=g))


def bias_left_alone(good, args):
    g = good.gradients
    return good if g.bias is None else good._replace(gradients=g._replace(bias=0 * g.bias))


def without_bias(good, args):
    bias = torch.zeros_like(args[2])
    return ReferenceBackend().score_and_loss(*args[:2], bias, *args[3:])


def half_precision(good, args):
    g = good.gradients.hidden
    return good if g is None else with_hidden(good, g.half().to(g.dtype))


def wide_gradient(good, args):
    g = good.gradients.hidden
    return good if g is None else with_hidden(good, g.float() if g.dtype.itemsize == 2 else g)


def always_correct(good, args):
    if good.token_correct is None:
        return good
    return good._replace(token_correct=torch.ones_like(good.token_correct))


def blind_to_strides(good, args):
    """Reads scores as they lie in memory."""
    lie = torch.as_strided(args[4], args[4].shape, (1,))
    return ReferenceBackend().score_and_loss(*args[:4], lie, *args[5:])


class Overconfident(TorchBackend):
    """Leaves small gradients out and says that nothing is missing."""

    skips_blocks = True

    def score_and_loss(self, hidden, weight, bias, layout, consensus, attention, config, *rest):
        eps, config = config.skip_below, dataclasses.replace(config, skip_below=0.0)
        args = (hidden, weight, bias, layout, consensus, attention, config, *rest)
        good = super().score_and_loss(*args)
        if eps == 0:
            return good
        g = good.gradients
        cut = [torch.where(t.abs() < eps, 0.0, t) for t in g]
        none = torch.zeros(3)
        return good._replace(
            gradients=Gradients(*cut), kept_share=torch.tensor(0.5), gradient_error=none
        )


class Blunt(ReferenceBackend):
    """Leaves out what is up to four times as large as it may, and says so."""

    def score_and_loss(self, hidden, weight, bias, layout, consensus, attention, config, *rest):
        config = dataclasses.replace(config, skip_below=4 * config.skip_below)
        return super().score_and_loss(
            hidden, weight, bias, layout, consensus, attention, config, *rest
        )


class Rounded(ReferenceBackend):
    """Rounds hidden states to the head's dtype."""

    def score_and_loss(self, hidden, weight, *rest):
        low = hidden.to(weight.dtype) if weight.dtype.itemsize < hidden.dtype.itemsize else hidden
        good = super().score_and_loss(low, weight, *rest)
        g = good.gradients.hidden
        return good if g is None else with_hidden(good, g.to(hidden.dtype))


class Forgetful(ReferenceBackend):
    """Leaves the log-sum-exp out of token_logp."""

    def token_logp(self, hidden, weight, bias, targets, statistics, softcap=0.0):
        logits = hidden @ weight.T + bias
        _, entropy, correct = super().token_logp(hidden, weight, bias, targets, statistics)
        return reference.pick_targets(logits, targets), entropy, correct


class Rounding(ReferenceBackend):
    """Rounds low-precision logits to their dtype before the log-softmax."""

    def score_and_loss(self, hidden, weight, bias, layout, *rest):
        good = super().score_and_loss(hidden, weight, bias, layout, *rest)
        if hidden.dtype == torch.float32:
            return good
        logits = (hidden.float() @ weight.float().T + bias.float()).to(hidden.dtype).float()
        logp = reference.pick_targets(logits.log_softmax(-1), layout.targets)
        return good._replace(token_logp=logp)


class Uncapped(ReferenceBackend):
    """Takes a cap and does nothing with it."""

    def score_and_loss(self, hidden, weight, bias, layout, consensus, attention, config, *rest):
        normalizer, needs, statistics = rest[:3]
        return super().score_and_loss(
            hidden, weight, bias, layout, consensus, attention, config, normalizer, needs,
            statistics,
        )  # fmt: skip


class Flat(TorchBackend):
    """Caps logits, but its gradients take the cap for the identity."""

    def score_and_loss(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Head, "slope", lambda head, z, out=None: None)
            return super().score_and_loss(*args)


class Restless(ReferenceBackend):
    """Not the same bits twice."""

    calls = [0]

    def score_and_loss(self, *args):
        good = super().score_and_loss(*args)
        self.calls[0] += 1
        return good._replace(loss=good.loss * (1 + 1e-7 * (self.calls[0] % 3)))


FAULTS = {
    wrong_weight: r"rationale 0 has 1\.3 times the gradient that its weight .* \(wrong weight\)",
    ignored_weights: r"the weights are ignored, every teacher counts the same",
    live_alpha: r"flows through alpha, which must be a constant \(detached\)",
    bf16_accumulation: r"is it accumulated or kept in bfloat16",
    swapped_teachers: r"the right weights at the wrong teachers \(swapped\)",
    not_summing_to_one: r"they sum to 0\.9, not 1 \(not normalised\)",
    dropped_last_token: r"leaves out each rationale's last labelled token",
    sum_over_tokens: r"it is a sum over tokens, not a mean",
    sum_over_questions: r"it is a sum over questions, not a mean",
    no_consistency: r"the consistency term is missing",
    mi_everywhere: r"it counts positions outside the assistant's turn",
    gradient_without_labels: r"positions without a label have a gradient",
    unfiltered: r"filtered: other teachers or questions than the scores say|weights of question",
    poisoned: r"one rationale's NaN reaches the loss",
    undone_by_a_mask: r"consistency \(masked entries .*\): NaN in other places",
    aliased: r"consensus: the argument itself is handed back",
    cold: r"the temperature tau is ignored",
    without_floor: r"z_floor is ignored",
    deaf: r"the consensus is ignored",
    fond_of_difficulty: r"difficulty counts for a teacher, not against it",
    half_consistency: r"the consistency term's gradient is taken 0\.5 times",
    value_without_pull: r"the consistency term has no gradient",
    unweighted_head: r"gradient of weight.*the weights are ignored",
    summed_head: r"8 times too large: the division by questions is off",
    bias_left_alone: r"gradient of bias.*it is 0",
    without_bias: r"the head's bias is left out",
    half_precision: r"gradient of hidden.*is it kept in bfloat16 or float16",
    wide_gradient: r"gradient of hidden: dtype torch.float32 for torch.bfloat16 inputs",
    always_correct: r"token_correct beside the loss: other positions than the reference",
    blind_to_strides: r"weights changes when the same numbers come as views with other strides",
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda f: f.__name__)
def test_a_faulty_backend_is_told_its_fault(spoil):
    with pytest.raises(AssertionError, match=FAULTS[spoil]):
        check_backend(Faulty(spoil))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (Forgetful(), "token_logp is not normalised: .* is the log-sum-exp missing"),
        (Rounding(), r"are logits rounded to torch.bfloat16 on the way"),
        (Restless(), "loss: other bits on a second call"),
        (Overconfident(name="overconfident"), "more than the bound 0 that is reported"),
        (Blunt(), r"entries of at least skip_below=0\.05 are .* none of them may be left out"),
        (Uncapped(name="uncapped"), r"nll \(softcap\).*logits without their cap"),
        (Flat(name="flat"), r"gradient of hidden \(softcap\).*the cap's slope, .* is missing"),
        (Rounded(), r"token_logp \(torch.float32 states, torch.bfloat16 head\)"),
    ],
    ids=[
        "no normalisation",
        "rounded logits",
        "not repeatable",
        "false bound",
        "blunt",
        "no cap",
        "no slope",
        "rounded states",
    ],
)
def test_faults_beyond_the_result(backend, message):
    with pytest.raises(AssertionError, match=message):
        check_backend(backend)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_our_backends_pass(name):
    check_backend(name)


def test_the_torch_backend_passes_with_tiny_chunks():
    check_backend(TorchBackend(chunk_bytes=97 * 4 * 16, hold_bytes=0))


def test_random_batches_hold_the_awkward_cases():
    found = set()
    for seed in range(10):
        layout = random_batch(seed=seed).layout
        found |= {"unlabelled"} if (layout.label_counts == 0).any() else set()
        spans = layout.answer_spans
        found |= {"no answer"} if (spans[:, 0] == spans[:, 1]).any() else set()
    assert found == {"unlabelled", "no answer"}
