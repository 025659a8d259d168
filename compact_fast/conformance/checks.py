"""The checks. Each takes a Subject and raises Fault with a message that names what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compact_fast import scores
from compact_fast.backends.protocol import CompactBackend, LossResult, Needs
from compact_fast.config import CompactConfig
from compact_fast.conformance.guesses import (
    gradient_hint,
    head_gradient_hint,
    hint,
    last_labels,
    show,
    weights_hint,
)
from compact_fast.conformance.judge import (
    REFERENCE,
    Fault,
    Subject,
    call,
    close,
    compare,
    in_float64,
    on_device,
    truth,
)
from compact_fast.conformance.soft_cap import check_soft_cap
from compact_fast.testing import RandomBatch, random_batch

PLAIN = CompactConfig(consistency="off", filter_below=0.0)
UNEVEN = CompactConfig(weighting=(0.6, 0.3, 0.07, 0.03), consistency="off")


def _batch(
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    teachers: tuple[int, ...] = (3, 1, 4, 2),
    *,
    scale: float = 0.5,
    unlabelled: bool = True,
) -> RandomBatch:
    return random_batch(teachers, seed=seed, dtype=dtype, scale=scale, unlabelled=unlabelled)


def _both(
    subject: Subject, batch: RandomBatch, config: CompactConfig
) -> tuple[LossResult, LossResult, LossResult]:
    """(the backend's, the reference's in the same dtype, the truth)."""
    return subject.run(batch, config), call(REFERENCE, batch, config), truth(batch, config)


def _gradients(*results: LossResult) -> Iterator[tuple[Any, ...]]:
    """(name, each result's gradient) of hidden states, weight and bias."""
    return zip(Needs._fields, *(r.gradients for r in results), strict=True)


def check_shapes_and_dtypes(subject: Subject) -> None:
    """Every result has its documented shape, figures are float32, gradients of their owner."""
    batch = _batch()
    got = subject.run(batch, CompactConfig(), statistics=True)
    T, S, Q = (
        batch.layout.num_tokens,
        batch.layout.num_sequences,
        batch.layout.num_questions,
    )
    sizes = {
        **dict.fromkeys(("loss", "loss_sft", "loss_consistency"), ()),
        **dict.fromkeys(("weights", "nll", "mi", "consensus", "score"), (S,)),
        **dict.fromkeys(("filtered", "nonfinite"), (S,)),
        **dict.fromkeys(("token_logp", "token_entropy", "token_correct"), (T,)),
        **dict.fromkeys(("consistency", "skipped"), (Q,)),
    }
    for name, size in sizes.items():
        value = getattr(got, name)
        if value is None:
            raise Fault(f"{name}: None although statistics were asked for")
        if tuple(value.shape) != size:
            raise Fault(f"{name}: shape {tuple(value.shape)}, expected {size}")
        flag = name in ("filtered", "nonfinite", "skipped", "token_correct")
        expected = torch.bool if flag else torch.float32
        if value.dtype != expected:
            raise Fault(f"{name}: dtype {value.dtype}, expected {expected}")
    owners = (batch.hidden, batch.weight, batch.bias)
    for name, g, owner in zip(Needs._fields, got.gradients, owners, strict=True):
        if g is None or g.shape != owner.shape or g.dtype != owner.dtype:
            raise Fault(f"gradient of {name}: expected {tuple(owner.shape)} {owner.dtype}")


def check_only_wanted_gradients(subject: Subject) -> None:
    """A gradient that is not wanted is None: a frozen head must cost nothing."""
    for needs in (Needs(True, False, False), Needs(False, True, False), Needs(False, False, False)):
        got = subject.run(_batch(), PLAIN, needs=needs)
        for name, g, wanted in zip(Needs._fields, got.gradients, needs, strict=True):
            if (g is not None) != wanted:
                raise Fault(f"gradient of {name}: wanted {wanted}, got {g is not None}")


def check_normalisation(subject: Subject) -> None:
    """The probabilities of one position sum to 1."""
    batch = _batch()
    vocab = batch.weight.shape[0]
    hidden = batch.hidden[:1].expand(vocab, -1).contiguous().to(subject.device)
    logp, _, _ = subject.backend.token_logp(
        hidden,
        batch.weight.to(subject.device),
        batch.bias.to(subject.device),
        torch.arange(vocab, device=subject.device),
        False,
    )
    total = float(logp.double().exp().sum())
    if abs(total - 1) > 1e-4:
        raise Fault(
            f"token_logp is not normalised: the probabilities of one position sum to {total:.6g}; "
            "is the log-sum-exp missing?"
        )


def check_token_logp(subject: Subject) -> None:
    """Log-likelihoods, entropy and correctness against float64, with labels ignored as asked."""
    batch = _batch()
    wide = in_float64(batch)

    def run(backend: CompactBackend, b: RandomBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return backend.token_logp(b.hidden, b.weight, b.bias, b.layout.targets, True)

    got = run(subject.backend, on_device(batch, subject.device))
    own, exact = run(REFERENCE, batch), run(REFERENCE, wide)
    for name, g, o, e in zip(("token_logp", "entropy"), got, own, exact, strict=False):
        compare(name, None if g is None else g.cpu(), o, e)
    assert exact[2] is not None
    if got[2] is None or not torch.equal(got[2].cpu(), exact[2]):
        raise Fault("token_correct: other positions than the reference")
    with_loss = subject.run(batch, PLAIN, statistics=True)
    for name, o, e in zip(("token_logp", "token_entropy"), own, exact, strict=False):
        compare(f"{name} beside the loss", getattr(with_loss, name), o, e)
    correct = with_loss.token_correct
    if correct is None or not torch.equal(correct, exact[2] & batch.layout.labelled):
        raise Fault("token_correct beside the loss: other positions than the reference")


def check_difficulty(subject: Subject) -> None:
    """S_NLL is a mean over all labels of a rationale."""
    batch = _batch()
    got, own, exact = _both(subject, batch, PLAIN)
    layout = batch.layout
    last = last_labels(batch)
    without = torch.where(last, 0.0, exact.token_logp)
    fewer = layout.label_counts - 1
    unbiased = replace(batch, bias=torch.zeros_like(batch.bias))
    guesses = {
        "the head's bias is left out": truth(unbiased, PLAIN).nll,
        "it leaves out each rationale's last labelled token": -scores.segment_sum(without, layout)
        / fewer,
        "the last labelled token counts as 0": -scores.segment_sum(without, layout)
        / layout.label_counts,
        "it is a sum over tokens, not a mean": exact.nll * layout.label_counts,
        "it is divided by all positions, not by the labelled ones": exact.nll
        * layout.label_counts
        / layout.sequence_lengths,
    }
    compare("nll", got.nll, own.nll, exact.nll, partial(hint, got.nll, guesses))


def check_adaptability(subject: Subject) -> None:
    """S_MI in its three forms."""
    for mi in ("logit", "logprob", "pvi"):
        config = replace(PLAIN, mi=mi, mi_positions="assistant")
        batch = _batch()
        got, own, exact = _both(subject, batch, config)
        everywhere = truth(batch, replace(config, mi_positions="all")).mi
        flat = truth(batch, replace(config, other_weight=1.0)).mi
        guesses = {
            "it counts positions outside the assistant's turn": everywhere,
            "thinking tokens are not set apart": flat,
        }
        compare(f"mi ({mi})", got.mi, own.mi, exact.mi, partial(hint, got.mi, guesses))


def check_weights(subject: Subject) -> None:
    """Alpha follows from the scores that the backend itself reports."""
    for seed in (1, 2):
        for config in (PLAIN, replace(PLAIN, tau=0.5, z_floor=0.2), CompactConfig()):
            batch = _batch(seed)
            got = subject.run(batch, config)
            want = scores.teacher_weights(
                got.mi,
                got.nll,
                batch.consensus,
                batch.attention,
                batch.layout.cu_teachers,
                config,
                teachers=batch.layout.teachers,
            )
            why = partial(weights_hint, got, batch, config)
            _judge_weights(got.weights, want.weights, batch, why)
            for name in ("filtered", "nonfinite", "skipped"):
                if not torch.equal(getattr(got, name), getattr(want, name)):
                    raise Fault(f"{name}: other teachers or questions than the scores say")


def _judge_weights(got: Tensor, want: Tensor, batch: RandomBatch, why: Callable[[], str]) -> None:
    if close(got, want, 1e-5):
        return
    for q, (a, b) in enumerate(
        zip(batch.layout.cu_teachers, batch.layout.cu_teachers[1:], strict=False)
    ):
        mine, right = got[a:b], want[a:b]
        if close(mine, right, 1e-5):
            continue
        what = f"weights of question {q}: {show(mine)}, expected {show(right)}"
        if close(mine.sort().values, right.sort().values, 1e-5):
            raise Fault(f"{what}: the right weights at the wrong teachers (swapped)")
        if abs(float(mine.sum()) - 1) > 1e-4 and float(right.sum()) > 0:
            raise Fault(f"{what}: they sum to {float(mine.sum()):.6g}, not 1 (not normalised)")
        if close(mine, torch.full_like(mine, 1 / mine.numel())):
            raise Fault(f"{what}: uniform, the scores are ignored")
        raise Fault(f"{what}; {why()}" if why() else what)


def check_loss(subject: Subject) -> None:
    """The loss is the mean over questions of sum_k alpha_k NLL_k plus lambda times consistency."""
    batch = _batch(unlabelled=False)
    for config in (UNEVEN, replace(UNEVEN, consistency="answer", consistency_weight=0.5)):
        got, own, exact = _both(subject, batch, config)
        Q = batch.layout.num_questions
        even = truth(batch, replace(config, weighting="uniform"))
        guesses = {
            "the weights are ignored, every teacher counts the same": even.loss,
            "it is a sum over questions, not a mean": exact.loss * Q,
            "the consistency term is missing": exact.loss_sft,
            "the consistency term is not multiplied by lambda": exact.loss_sft
            + exact.loss_consistency / config.consistency_weight,
        }
        if config.consistency == "off":
            guesses = dict(list(guesses.items())[:2])
        compare("loss", got.loss, own.loss, exact.loss, partial(hint, got.loss, guesses))
        compare("consistency", got.consistency, own.consistency, exact.consistency)
        given = subject.run(batch, config, normalizer=8.0)
        if not close(given.loss * 8, exact.loss * Q):
            raise Fault("loss: the normalizer that was given is not what it is divided by")


def check_hidden_gradient(subject: Subject) -> None:
    """Every rationale's gradient has its weight; rows without a label have none."""
    # two teachers at least: a lone teacher's alpha is constant, whatever flows through it
    batch = _batch(teachers=(3, 2, 4, 2), unlabelled=False)
    for config in (
        UNEVEN,
        PLAIN,
        CompactConfig(consistency_weight=0.5),
        CompactConfig(mode="reference"),
    ):
        got, own, exact = _both(subject, batch, config)
        g, o, e = (r.gradients.hidden for r in (got, own, exact))
        assert e is not None
        why = str if g is None else partial(gradient_hint, g, e, exact, batch, config)
        compare(f"gradient of hidden ({config.weighting})", g, o, e, why)


def check_head_gradient(subject: Subject) -> None:
    """Gradients of the head, over many rows, so that accumulation in low precision shows."""
    batch = random_batch((4,) * 8, longest=40, seed=3, dtype=torch.float32)
    got, own, exact = _both(subject, batch, PLAIN)
    for name in ("weight", "bias"):
        g, o, e = (getattr(r.gradients, name) for r in (got, own, exact))
        error = float((g.double() - e).abs().max() / e.abs().max())
        if 2e-5 < error < 3e-2:
            raise Fault(
                f"gradient of {name}: relative error {error:.1e} in float32; is it accumulated or "
                "kept in bfloat16 or float16?"
            )
        compare(f"gradient of {name}", g, o, e, partial(head_gradient_hint, name, g, exact, batch))


def check_low_precision(subject: Subject) -> None:
    """bf16 and fp16 inputs: statistics stay float32, so log-likelihoods stay exact."""
    for dtype in (torch.bfloat16, torch.float16):
        if subject.can_run(dtype) is not True:
            continue
        batch = _batch(dtype=dtype)
        got, own, exact = _both(subject, batch, PLAIN)
        error = float((got.token_logp.double() - exact.token_logp).abs().max())
        if 1e-4 < error < 0.5:
            raise Fault(
                f"token_logp of {dtype} inputs is off by {error:.1e} nats: are logits rounded to "
                f"{dtype} on the way?"
            )
        compare(f"token_logp ({dtype})", got.token_logp, own.token_logp, exact.token_logp)
        for name, g, o, e in _gradients(got, own, exact):
            if g is not None and g.dtype != dtype:
                raise Fault(f"gradient of {name}: dtype {g.dtype} for {dtype} inputs")
            compare(f"gradient of {name} ({dtype})", g, o, e)


def check_mixed_precision(subject: Subject) -> None:
    """Hidden states and head of two dtypes: neither is rounded to the other's."""
    wide, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for dtype, head in ((wide, bf16), (wide, fp16), (bf16, wide), (fp16, bf16)):
        if subject.can_run(dtype, head_dtype=head) is not True:
            continue
        batch = _batch()
        batch = replace(batch, hidden=batch.hidden.to(dtype), weight=batch.weight.to(head))
        got, own, exact = _both(subject, batch, UNEVEN)
        what = f"{dtype} states, {head} head"
        compare(f"token_logp ({what})", got.token_logp, own.token_logp, exact.token_logp)
        for name, g, o, e in _gradients(got, own, exact):
            owner = head if name == "weight" else dtype if name == "hidden" else wide
            if g is not None and g.dtype != owner:
                raise Fault(f"gradient of {name} ({what}): dtype {g.dtype}, expected {owner}")
            compare(f"gradient of {name} ({what})", g, o, e)


def check_extreme_logits(subject: Subject) -> None:
    """Logits tens of units apart overflow exp() where the maximum is not taken off."""
    batch = _batch(scale=25.0)
    got, own, exact = _both(subject, batch, UNEVEN)
    compare("token_logp at large logits", got.token_logp, own.token_logp, exact.token_logp)
    compare("loss at large logits", got.loss, own.loss, exact.loss)


def check_masked_vocabulary(subject: Subject) -> None:
    """Entries that a bias of -inf masks count for nothing: not for consistency either, where they
    are the difference of two of -inf."""
    batch = _batch()
    used = torch.zeros_like(batch.bias, dtype=torch.bool)
    used[batch.layout.targets[batch.layout.labelled]] = True
    if batch.layout.gold_ids is not None:
        used[batch.layout.gold_ids] = True
    assert not bool(used.all())
    batch = replace(batch, bias=batch.bias.masked_fill(~used, -torch.inf))
    for mode in ("answer", "all"):
        config = CompactConfig(consistency=mode, consistency_weight=1.0)
        got, own, exact = _both(subject, batch, config)
        what = f"masked entries of the vocabulary, consistency={mode}"
        compare(f"loss ({what})", got.loss, own.loss, exact.loss)
        compare(f"consistency ({what})", got.consistency, own.consistency, exact.consistency)
        for name, g, o, e in _gradients(got, own, exact):
            compare(f"gradient of {name} ({what})", g, o, e)


def check_non_finite(subject: Subject) -> None:
    """A rationale with NaN gets weight 0 and leaves the others' gradients clean."""
    batch = _batch(unlabelled=False)
    a, b = batch.layout.cu_seqlens[1:3].tolist()
    hidden = batch.hidden.clone()
    hidden[a:b] = torch.nan
    got = subject.run(replace(batch, hidden=hidden), CompactConfig())
    if not bool(got.nonfinite[1]) or float(got.weights[1]) != 0:
        raise Fault("a rationale whose hidden states are NaN keeps a weight")
    if not bool(got.loss.isfinite()):
        raise Fault("one rationale's NaN reaches the loss")
    for name, g in zip(Needs._fields, got.gradients, strict=True):
        if g is not None and not bool(g.isfinite().all()):
            raise Fault(f"one rationale's NaN reaches the gradient of {name}")


def check_company(subject: Subject) -> None:
    """A question's figures do not depend on what else is in the batch."""
    batch = _batch()
    whole = subject.run(batch, CompactConfig())
    for q in range(batch.layout.num_questions):
        s = slice(*batch.layout.cu_teachers[q : q + 2].tolist())
        alone = RandomBatch(
            batch.hidden[batch.layout.question_positions([q])],
            batch.weight,
            batch.bias,
            batch.layout.select_questions([q]),
            batch.consensus[s],
            batch.attention[s],
        )
        part = subject.run(alone, CompactConfig())
        for name in ("nll", "mi", "weights"):
            if not close(getattr(part, name), getattr(whole, name)[s]):
                raise Fault(f"{name} of question {q} changes with the rest of the batch")


def check_determinism(subject: Subject) -> None:
    """The same call gives the same bits."""
    batch = _batch()
    first = subject.run(batch, CompactConfig())
    for _ in range(5):
        again = subject.run(batch, CompactConfig())
        pairs: list[tuple[str, Tensor | None, Tensor | None]] = [
            ("loss", first.loss, again.loss),
            ("weights", first.weights, again.weights),
            *zip(
                (f"gradient of {n}" for n in Needs._fields),
                first.gradients,
                again.gradients,
                strict=True,
            ),
        ]
        for name, x, y in pairs:
            if x is None or y is None or not torch.equal(x.nan_to_num(), y.nan_to_num()):
                raise Fault(f"{name}: other bits on a second call with the same input")


def check_strides(subject: Subject) -> None:
    """Arguments may be views with any strides."""
    batch = _batch()
    config = CompactConfig(consensus="both", mi="logprob")
    columns = torch.stack([batch.consensus, batch.attention], 1)
    views = replace(
        batch,
        hidden=batch.hidden.T.contiguous().T,
        weight=batch.weight.T.contiguous().T,
        bias=torch.stack([batch.bias, batch.bias], 1)[:, 0],
        consensus=columns[:, 0],
        attention=columns[:, 1],
    )
    plain, got = subject.run(batch, config), subject.run(views, config)
    for name in ("nll", "mi", "weights", "loss", "token_logp"):
        if not close(getattr(got, name), getattr(plain, name)):
            raise Fault(f"{name} changes when the same numbers come as views with other strides")
    for name, x, y in zip(Needs._fields, plain.gradients, got.gradients, strict=True):
        if x is None or y is None or not close(x, y):
            raise Fault(f"gradient of {name} changes when arguments come with other strides")


def check_small_gradients(subject: Subject) -> None:
    """With skip_below, for backends that offer it: figures stay, the reported bound holds."""
    if not getattr(subject.backend, "skips_blocks", False):
        return
    batch, eps = _batch(unlabelled=False, scale=1.0), 0.05
    plain = subject.run(batch, PLAIN)
    got = subject.run(batch, replace(PLAIN, skip_below=eps))
    # what may be left out at most: every entry by itself, and those that rounding puts below
    most = truth(batch, replace(PLAIN, skip_below=eps * (1 + 1e-3)))
    assert most.gradient_error is not None
    assert most.kept_share is not None
    for name in ("loss", "nll", "mi", "weights", "token_logp"):
        if not close(getattr(got, name), getattr(plain, name), 1e-6):
            raise Fault(f"{name} changes with skip_below; only gradients may")
    if got.kept_share is None or not 0 < float(got.kept_share) < 1:
        raise Fault(f"kept_share: {got.kept_share}, expected a share between 0 and 1")
    if got.gradient_error is None or tuple(got.gradient_error.shape) != (3,):
        raise Fault("gradient_error: expected 3 bounds, for hidden, weight and bias")
    if float(got.kept_share) < float(most.kept_share) - 1e-6:
        raise Fault(
            f"kept_share: {float(got.kept_share):.4g}, but entries of at least skip_below={eps} "
            f"are {float(most.kept_share):.4g} of all, and none of them may be left out"
        )
    bounds = zip(got.gradient_error.tolist(), most.gradient_error.tolist(), strict=True)
    for name, whole, part, (bound, limit) in zip(
        Needs._fields, plain.gradients, got.gradients, bounds, strict=True
    ):
        assert whole is not None
        assert part is not None
        error = float((whole - part).double().norm()) - 1e-6 * float(whole.double().norm())
        if error > bound:
            raise Fault(
                f"gradient of {name} is off by {error:.3g} with skip_below, more than the bound "
                f"{bound:.3g} that is reported"
            )
        if error > limit:
            raise Fault(
                f"gradient of {name} is off by {error:.3g} with skip_below={eps}, more than the "
                f"{limit:.3g} that all smaller entries together can be"
            )


def check_arguments_untouched(subject: Subject) -> None:
    """Arguments are neither changed nor handed back as results."""
    batch = _batch()
    copies = [t.clone() for t in (batch.hidden, batch.weight, batch.bias, batch.consensus)]
    result = call(subject.backend, batch, CompactConfig()) if subject.device.type == "cpu" else None
    if result is None:
        subject.run(batch, CompactConfig())
        return
    for name, now, then in zip(
        ("hidden", "weight", "bias", "consensus"),
        (batch.hidden, batch.weight, batch.bias, batch.consensus),
        copies,
        strict=True,
    ):
        if not torch.equal(now, then):
            raise Fault(f"{name} was changed in place")
    if result.consensus.data_ptr() == batch.consensus.data_ptr():
        raise Fault("consensus: the argument itself is handed back; return a copy")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_shapes_and_dtypes,
    check_only_wanted_gradients,
    check_normalisation,
    check_token_logp,
    check_difficulty,
    check_adaptability,
    check_weights,
    check_loss,
    check_hidden_gradient,
    check_head_gradient,
    check_low_precision,
    check_mixed_precision,
    check_extreme_logits,
    check_masked_vocabulary,
    check_non_finite,
    check_company,
    check_determinism,
    check_strides,
    check_small_gradients,
    check_soft_cap,
    check_arguments_untouched,
)
