"""fusion="per_teacher": forward and backward one rationale at a time, fused when alpha is known.

The loss of a question is linear in its weights, which need the scores of all its rationales:

    dL/dtheta = sum_k alpha_k g_k + lambda sum_{i<j} alpha_i alpha_j dD_ij/dtheta
    g_k = dNLL_k/dtheta

So each g_k is made as soon as rationale k has been read and kept apart, and memory holds the
activations of one rationale and the trained weights' gradients K times. The consistency term of a
rationale needs the others' answers: where alpha_i alpha_j gives it weight, the rationale is read a
second time, with the same dropout, for that term alone. Apart, gradients can be compared: their
norms and cosines tell where teachers pull in different directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from compact_fast.backends import CompactBackend
from compact_fast.backends.consistency import compare_stretches
from compact_fast.backends.head import Head
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.output import CompactOutput
from compact_fast.reference import attention_consensus, consistency_spans
from compact_fast.scores import TeacherWeights, layout_weights, statistics_dtype
from compact_fast.students import attention_projections, body_and_head
from compact_fast.trainer.step import Body, compact_step, direct_body, prior_logp

_HEAD_BYTES = 16 << 20  # logits of answer rows made at once
LARGE = 4_000_000_000  # bytes of gradients kept apart that are worth a word


@dataclass(frozen=True)
class PerTeacherOutput(CompactOutput):
    """What the loss returns, and how the rationales' own gradients g_k compare, unweighted."""

    grad_norms: Tensor = field(kw_only=True)  # [S] float32
    pairs: Tensor = field(kw_only=True)  # [M, 2] int64; teacher ids of a question's rationales
    cosines: Tensor = field(kw_only=True)  # [M] float32; of the gradients of each pair


def check_fusion(
    model: nn.Module,
    config: CompactConfig,
    teachers: int,
    checkpointing: Any = None,
) -> list[str]:
    """What a user of fusion="per_teacher" should know about this model, a sentence each.

    `checkpointing`: the arguments of gradient checkpointing, None at their defaults. Raises
    ValueError for what cannot be done one rationale at a time.
    """
    if config.mode == "reference" or config.consistency == "all":
        named = "mode='reference'" if config.mode == "reference" else "consistency='all'"
        raise ValueError(
            f"fusion='per_teacher': {named} compares whole rationales with each other, so all must "
            "be in memory; use fusion='packed', or consistency='answer'"
        )
    if checkpointing and checkpointing.get("use_reentrant"):
        raise ValueError(
            "fusion='per_teacher' needs gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    size = gradient_bytes(model)
    if (teachers + 1) * size < LARGE:
        return []
    return [
        f"fusion='per_teacher' keeps {teachers + 1} gradients of {size / 1e9:.1f} GB each, one a "
        "teacher and their sum; train an adapter (lora: true) to make them small"
    ]


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of one gradient as this module keeps it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(p.numel() for p in trained) * _kept_dtype(trained).itemsize


def _kept_dtype(trained: Sequence[Tensor]) -> torch.dtype:
    return max((statistics_dtype(p.dtype) for p in trained), key=lambda d: d.itemsize)


def per_teacher_step(
    body: Body,
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    config: CompactConfig,
    backend: CompactBackend | str = "auto",
    normalizer: float | None = None,
) -> PerTeacherOutput:
    """`compact_step`, one rationale at a time. Gradients exist when it returns.

    Backward of the loss hands them over to the trained parameters, once.
    """
    layout: TokenLayout = inputs["layout"]
    if "priors" in inputs:
        layout = replace(layout, prior_logp=prior_logp(model, inputs["priors"], backend))
    work = _Fusion(body, model, layout, inputs["consensus"], config, backend)
    found = [work.question(q) for q in range(layout.num_questions)]
    shares = [f.shares for f in found]
    skipped = torch.cat([s.skipped for s in shares])
    divisor = max(1, int((~skipped).sum())) if normalizer is None else normalizer
    alpha = torch.cat([s.weights for s in shares])
    nll = torch.cat([f.nll for f in found])
    divergence = torch.stack([f.divergence for f in found])
    sft = torch.where(alpha > 0, alpha * nll, 0.0).double().sum() / divisor
    pull = config.consistency_weight * divergence.double().sum() / divisor
    work.total.div_(divisor)
    kept_share = gradient_error = None
    if config.skip_below > 0:
        left = torch.cat([f.left for f in found if f.left is not None])
        kept_share, gradient_error = _left_out(left, alpha, layout.label_counts, divisor)
    loss: Tensor = _HandOver.apply((sft + pull).to(nll.dtype), work.total, *work.trained)  # type: ignore[no-untyped-call]
    return PerTeacherOutput(
        loss=loss,
        loss_sft=sft.to(nll.dtype),
        loss_consistency=pull.to(nll.dtype),
        weights=alpha,
        nll=nll,
        mi=torch.cat([f.mi for f in found]),
        consensus=torch.cat([s.consensus for s in shares]),
        score=torch.cat([s.score for s in shares]),
        token_logp=torch.cat([f.token_logp for f in found]),
        consistency=divergence,
        filtered=torch.cat([s.filtered for s in shares]),
        nonfinite=torch.cat([s.nonfinite for s in shares]),
        skipped=skipped,
        kept_share=kept_share,
        gradient_error=gradient_error,
        grad_norms=torch.cat([f.norms for f in found]),
        pairs=torch.cat([f.pairs for f in found]),
        cosines=torch.cat([f.cosines for f in found]),
    )


@dataclass(frozen=True)
class _Question:
    """What one question came to; its K rationales in order."""

    shares: TeacherWeights  # [K]
    nll: Tensor  # [K]
    mi: Tensor  # [K]
    token_logp: Tensor  # [T of the question]
    divergence: Tensor  # scalar
    norms: Tensor  # [K]
    pairs: Tensor  # [K(K-1)/2, 2]
    cosines: Tensor  # [K(K-1)/2]
    left: Tensor | None  # [K, 4]; kept_share and gradient_error of each, with skip_below


@dataclass(frozen=True)
class _Read:
    """One rationale, read once; its gradient lies in the table of gradients."""

    out: CompactOutput
    answer: Tensor  # [n, D]; hidden states that state the answer
    last: Tensor  # [1, D]
    random: list[Tensor]  # state of the generators before it was read


class _Fusion:
    """The passes of one batch, and the sum of its gradients."""

    def __init__(
        self,
        body: Body,
        model: nn.Module,
        layout: TokenLayout,
        consensus: Tensor | None,  # [S]
        config: CompactConfig,
        backend: CompactBackend | str,
    ) -> None:
        # Replicas meet in a forward pass through their wrapper: as often on one rank as on another,
        # so once a batch, however many rationales it has.
        self.bodies = chain([body], repeat(direct_body(model)))
        self.model, self.layout = model, layout
        self.consensus, self.config, self.backend = consensus, config, backend
        # Alone, a rationale has weight 1 whatever the method; only its statistics are wanted.
        self.alone = replace(
            config, weighting="uniform", consensus="none", consistency="off", filter_below=0.0
        )
        self.head = body_and_head(model)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.starts = layout.cu_seqlens.tolist()
        self.teachers = layout.cu_teachers.tolist()
        self.gold = None if layout.cu_gold is None else layout.cu_gold.tolist()
        self.spans: list[tuple[int, int]] = [(0, 0)] * layout.num_sequences
        if config.consistency == "answer":
            first, lengths = consistency_spans(layout, config)
            self.spans = [(a, a + n) for a, n in zip(first, lengths, strict=True)]
        size, wide = sum(p.numel() for p in self.trained), _kept_dtype(self.trained)
        device = layout.device
        widest = int(layout.teachers_per_question.max())
        self.total = torch.zeros(size, dtype=wide, device=device)
        self.apart = torch.empty((widest, size), dtype=wide, device=device)

    def question(self, q: int) -> _Question:
        """Read a question's rationales, weigh them, and add their gradients to the total."""
        sequences = range(self.teachers[q], self.teachers[q + 1])
        read = [self._read(s, q, self.apart[k]) for k, s in enumerate(sequences)]
        nll = torch.cat([r.out.nll for r in read])
        mi = torch.cat([r.out.mi for r in read])
        shares = self._weigh(q, nll, mi, read)
        apart, keep = self.apart[: len(read)], shares.weights > 0
        alpha = shares.weights.to(self.total.dtype)
        for k in keep.nonzero().flatten().tolist():  # apart[keep] would copy every gradient
            self.total.addcmul_(apart[k], alpha[k])
        norms, pairs, cosines = _compare(apart, self.layout.teachers[_slice(sequences)])
        return _Question(
            shares=shares,
            nll=nll,
            mi=mi,
            token_logp=torch.cat([r.out.token_logp for r in read]),
            divergence=self._consistency(q, sequences, read, shares.weights),
            norms=norms,
            pairs=pairs,
            cosines=cosines,
            left=_stack_left([r.out for r in read]),
        )

    def _read(self, s: int, q: int, gradient: Tensor) -> _Read:
        """Statistics of sequence s, and the gradient of its NLL into `gradient`, [P]."""
        layout = _sequence(self.layout, s, q, self.starts, self.gold)
        kept: list[Tensor] = []
        run = next(self.bodies)

        def body(input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
            hidden = run(input_ids, attention_mask, **kwargs)
            kept.append(hidden.detach()[0])
            return hidden

        random = _random_state(self.layout.device)
        out = compact_step(
            body,
            self.model,
            _inputs(layout),
            config=self.alone,
            backend=self.backend,
            normalizer=1.0,
        )
        found = torch.autograd.grad(out.loss, self.trained, allow_unused=True)
        for part, g in zip(self._parts(gradient), found, strict=True):
            # a trained head's comes as a result of the loss's operator, with a graph
            part.copy_(g.detach().reshape(-1)) if g is not None else part.zero_()
        a, b = (place - self.starts[s] for place in self.spans[s])
        answer = kept[0][a:b].clone() if b > a else kept[0][:0]
        return _Read(replace(out, loss=out.loss.detach()), answer, kept[0][-1:].clone(), random)

    def _weigh(self, q: int, nll: Tensor, mi: Tensor, read: Sequence[_Read]) -> TeacherWeights:
        layout, config = self.layout, self.config
        s = slice(self.teachers[q], self.teachers[q + 1])
        cu_teachers = layout.cu_teachers[q : q + 2] - s.start
        attention = None
        if config.consensus in ("attention", "both"):
            maps, last = attention_projections(self.model), torch.cat([r.last for r in read])
            attention = attention_consensus(
                maps.queries(last),
                maps.keys(last),
                cu_teachers,
                num_heads=maps.num_heads,
                num_kv_heads=maps.num_kv_heads,
                gqa=config.attention_gqa,
            )
        consensus = None if self.consensus is None else self.consensus[s]
        return layout_weights(mi, nll, consensus, attention, layout, config, slice(q, q + 1))

    def _consistency(
        self, q: int, sequences: range, read: Sequence[_Read], alpha: Tensor
    ) -> Tensor:
        """sum_{i<j} alpha_i alpha_j D_ij; lambda times its gradient is added to the total."""
        weights = alpha.tolist()
        members = [k for k, r in enumerate(read) if r.answer.shape[0] > 0 and weights[k] > 0]
        if len(members) < 2:
            return alpha.new_zeros(())
        weight, bias = self.head.weight.detach(), self.head.bias
        dtype = _head_dtype(weight)
        head = Head(
            weight.to(dtype),
            None if bias is None else bias.detach(),
            _HEAD_BYTES,
            self.head.softcap,
        )
        value, pulls = compare_stretches(
            [head.logits(read[k].answer.to(dtype)).clone() for k in members],
            [weights[k] for k in members],
            self.config.pair_floor,
            self.head.softcap,
        )
        for i, pull in pulls.items():
            k = members[i]
            pull *= self.config.consistency_weight
            self._add_pull(sequences[k], q, read[k], head, pull)
        return value.to(alpha.dtype)

    def _add_pull(self, s: int, q: int, read: _Read, head: Head, pull: Tensor) -> None:
        """Read sequence s again and add the gradient that `pull` [n, V] on its answer's logits is.

        A trained head's share is made here, as in the packed step: from the same hidden states.
        """
        layout = _sequence(self.layout, s, q, self.starts, self.gold)
        assert layout.input_ids is not None
        with _same_random(read.random, layout.device):
            hidden = next(self.bodies)(layout.input_ids[None], None)[0]
        a, b = (place - self.starts[s] for place in self.spans[s])
        rows = hidden[a:b]
        found = torch.autograd.grad(
            rows, self.trained, head.back_to_rows([pull]).to(rows.dtype), allow_unused=True
        )
        x = read.answer.to(_head_dtype(self.head.weight)).to(pull.dtype)
        own = {id(self.head.weight): lambda: pull.T @ x, id(self.head.bias): lambda: pull.sum(0)}
        for p, g, part in zip(self.trained, found, self._parts(self.total), strict=True):
            if g is not None:
                part += g.reshape(-1)
            if id(p) in own:
                part += own[id(p)]().reshape(-1)

    def _parts(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Each parameter's stretch of a flat gradient, [P]."""
        return torch.split(gradient, [p.numel() for p in self.trained])


def _stack_left(outs: Sequence[CompactOutput]) -> Tensor | None:
    rows = [
        torch.cat([out.kept_share[None], out.gradient_error])
        for out in outs
        if out.kept_share is not None and out.gradient_error is not None
    ]
    return torch.stack(rows) if rows else None


def _left_out(
    left: Tensor,  # [S, 4]; kept_share and gradient_error of each rationale alone
    alpha: Tensor,  # [S]
    label_counts: Tensor,  # [S]
    divisor: float,
) -> tuple[Tensor, Tensor]:
    """kept_share and gradient_error [3] of the whole batch, as CompactOutput has them."""
    rows = torch.where(alpha > 0, label_counts, 0).to(left.dtype)
    kept = (left[:, 0] * rows).sum() / rows.sum().clamp(min=1)
    scaled = left[:, 1:] * alpha.to(left.dtype)[:, None] / divisor
    # rationales share no hidden states, but all of them the head
    bounds = torch.cat([scaled[:, :1].norm(dim=0), scaled[:, 1:].sum(0)])
    return torch.where(rows.sum() > 0, kept, 1.0), bounds


class _HandOver(torch.autograd.Function):
    """A loss whose gradients were made before: backward gives them out, scaled, once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, total: Tensor, *trained: Tensor) -> Tensor:
        ctx.total = total
        ctx.like = [(p.shape, p.dtype) for p in trained]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        if ctx.total is None:
            raise RuntimeError("fusion='per_teacher': backward ran twice; call the step again")
        total, ctx.total = ctx.total.mul_(upstream[0]), None
        parts = torch.split(total, [shape.numel() for shape, _ in ctx.like])
        grads = [g.view(s).to(dtype) for g, (s, dtype) in zip(parts, ctx.like, strict=True)]
        return None, None, *grads


def _compare(apart: Tensor, teachers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """apart [K, P], teachers [K] -> norms [K], pairs of teachers [M, 2], their cosines [M]."""
    gram = (apart @ apart.T).float()
    norms = gram.diagonal().clamp(min=0).sqrt()
    at = torch.combinations(torch.arange(apart.shape[0], device=apart.device))
    i, j = at.unbind(1)
    return norms, teachers[at], gram[i, j] / (norms[i] * norms[j])


def _sequence(
    layout: TokenLayout, s: int, q: int, starts: Sequence[int], gold: Sequence[int] | None
) -> TokenLayout:
    """Sequence s of question q as a batch of its own."""
    at, one = slice(starts[s], starts[s + 1]), torch.tensor([0, 1], device=layout.device)
    found: dict[str, Tensor] = {"cu_seqlens": one * (at.stop - at.start), "cu_teachers": one}
    for name in ("targets", "input_ids", "thinking", "assistant"):
        if (value := getattr(layout, name)) is not None:
            found[name] = value[at]
    if layout.answer_spans is not None:
        span = layout.answer_spans[s : s + 1]
        found["answer_spans"] = torch.where(span[:, :1] < span[:, 1:], span - at.start, 0)
    if layout.gold_ids is not None and gold is not None:
        found["gold_ids"] = layout.gold_ids[gold[q] : gold[q + 1]]
        found["cu_gold"] = one * (gold[q + 1] - gold[q])
    if layout.prior_logp is not None:
        found["prior_logp"] = layout.prior_logp[q : q + 1]
    return TokenLayout(**found)


def _inputs(layout: TokenLayout) -> dict[str, Any]:
    """One sequence as the collator would give it: nothing to pad, so no mask."""
    assert layout.input_ids is not None
    return {
        "input_ids": layout.input_ids[None],
        "attention_mask": None,
        "gather": torch.arange(layout.num_tokens, device=layout.device),
        "layout": layout,
        "consensus": None,
    }


def _head_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the loss reads hidden states and head."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _slice(places: range) -> slice:
    return slice(places.start, places.stop)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _same_random(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those that followed these states; outside, none has been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
