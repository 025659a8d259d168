"""torch.library operators `compact_fast::...`: the stable numeric interface.

Schemas only ever grow, by new operators and by arguments with a default at the end. Configurations
travel as text (`CompactConfig.text`), backends by name; gradients are made in the forward pass and
handed over in backward.

Under autocast the operators compute as without it: inputs are taken in the dtype they have, and
every statistic is float32 (float64 for float64).
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from compact_fast.backends import RunSpec, choose, resolve
from compact_fast.backends.protocol import CompactBackend, Gradients, Needs
from compact_fast.backends.triton_backend import can_launch
from compact_fast.config import CompactConfig
from compact_fast.inputs import check_head, check_ids, check_loss_inputs, check_softcap
from compact_fast.layout import TokenLayout
from compact_fast.scores import statistics_dtype
from compact_fast.scores import teacher_weights as _teacher_weights

_LAYOUT = (
    "Tensor targets, Tensor cu_seqlens, Tensor cu_teachers, Tensor? input_ids, Tensor? thinking, "
    "Tensor? assistant, Tensor? real, Tensor? gold_ids, Tensor? cu_gold, Tensor? answer_spans, "
    "Tensor? prior_logp, Tensor? teacher_ids, Tensor? question_ids, Tensor? correct"
)
LAYOUT_FIELDS = tuple(part.split()[-1] for part in _LAYOUT.split(","))

SCORE_AND_LOSS = (
    f"(Tensor hidden, Tensor weight, Tensor? bias, {_LAYOUT}, Tensor? consensus, "
    "Tensor? attention, str config, float? normalizer, bool need_hidden, bool need_weight, "
    "bool need_bias, bool statistics, str backend, float softcap=0.0) -> (Tensor loss, "
    "Tensor loss_sft, "
    "Tensor loss_consistency, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, "
    "Tensor weights, Tensor nll, Tensor mi, Tensor consensus, Tensor score, Tensor token_logp, "
    "Tensor consistency, Tensor filtered, Tensor nonfinite, Tensor skipped, Tensor token_entropy, "
    "Tensor token_correct, Tensor kept_share, Tensor gradient_error)"
)
RESULTS = tuple(part.split()[-1].rstrip(")") for part in SCORE_AND_LOSS.split("->")[1].split(","))

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"


_latest = threading.local()


def layout_tensors(layout: TokenLayout) -> tuple[Tensor | None, ...]:
    """A layout as operators take it. The operator finds the latest again: it was validated, and
    what is derived from it is computed once a batch."""
    _latest.layout = weakref.ref(layout)
    return tuple(getattr(layout, name) for name in LAYOUT_FIELDS)


def _layout(tensors: tuple[Tensor | None, ...]) -> TokenLayout:
    latest: TokenLayout | None = getattr(_latest, "layout", lambda: None)()
    if latest is not None and all(
        getattr(latest, name) is given for name, given in zip(LAYOUT_FIELDS, tensors, strict=True)
    ):
        return latest
    return TokenLayout(**dict(zip(LAYOUT_FIELDS, tensors, strict=True)))  # type: ignore[arg-type]


def _resolve(
    backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float
) -> tuple[CompactBackend, tuple[float, ...]]:
    """The backend, and what only one is told that caps logits."""
    V, D = weight.shape
    more = (bias is not None, weight.dtype, softcap)
    run = resolve(backend, RunSpec(hidden.device, hidden.dtype, V, D, *more))
    return run, (softcap,) if softcap else ()


def _gradients(found: Gradients, like: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor]:
    """Gradients as operator results: absent ones are empty."""
    return [like[0].new_empty(0) if g is None else g for g in found]


# ---- score_and_loss ------------------------------------------------------------------------------


@torch.library.custom_op("compact_fast::score_and_loss", mutates_args=(), schema=SCORE_AND_LOSS)
def score_and_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    """Scores, weights, loss and gradients of one packed batch; see `compact_fast.compact_loss`."""
    layout = _layout(rest[:14])
    # the dispatcher drops a last argument that has its default
    consensus, attention, config_text, normalizer, *more = (*rest[14:], 0.0)[:10]
    *flags, statistics, backend, softcap = more
    config = CompactConfig.from_text(config_text)
    check_loss_inputs(hidden, weight, layout, consensus, attention, config, bias, softcap)
    run, cap = _resolve(backend, hidden, weight, bias, softcap)
    if config.skip_below > 0 and not getattr(run, "skips_blocks", False):
        raise ValueError(
            f"skip_below={config.skip_below}: backend {run.name!r} leaves no gradients out; set it "
            "to 0, or use backend 'torch'"
        )
    if not getattr(run, "takes_host_layout", False):
        layout = layout.to(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        result = run.score_and_loss(
            hidden, weight, bias, layout, consensus, attention, config, normalizer,
            Needs(*flags), statistics, *cap,
        )  # fmt: skip
    values = result._asdict()
    grads = dict(
        zip(
            ("grad_hidden", "grad_weight", "grad_bias"),
            _gradients(values.pop("gradients"), (hidden, weight, bias)),
            strict=True,
        )
    )
    empty = {
        "token_entropy": result.token_logp.new_empty(0),
        "token_correct": result.skipped.new_empty(0),
        "kept_share": result.token_logp.new_empty(0),
        "gradient_error": result.token_logp.new_empty(0),
    }
    found = {**values, **grads}
    return tuple(empty[n] if found.get(n) is None else found[n] for n in RESULTS)


@score_and_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    targets, cu_seqlens, cu_teachers = rest[:3]
    need_hidden, need_weight, need_bias, statistics = rest[18:22]
    skips = CompactConfig.from_text(rest[16]).skip_below > 0
    T, S, Q = targets.shape[0], cu_seqlens.shape[0] - 1, cu_teachers.shape[0] - 1

    def new(size: tuple[Any, ...], dtype: torch.dtype | None = None) -> Tensor:
        return hidden.new_empty(size, dtype=dtype or statistics_dtype(hidden.dtype))

    flag = torch.bool
    return (
        new(()),
        new(()),
        new(()),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias and bias is not None else hidden.new_empty(0),
        *(new((S,)) for _ in range(5)),
        new((T,)),
        new((Q,)),
        new((S,), flag),
        new((S,), flag),
        new((Q,), flag),
        new((T,) if statistics else (0,)),
        new((T,) if statistics else (0,), flag),
        new(() if skips else (0,)),
        new((3,) if skips else (0,)),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    # kept as attributes, not by save_for_backward: backward scales them in place and lets go, for
    # a second [V, D] gradient would double the memory
    ctx.gradients = [
        g if need else None for g, need in zip(output[3:6], inputs[21:24], strict=True)
    ]
    ctx.num_inputs = len(inputs)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """In place, except while torch traces with tensor subclasses and has to see no mutation."""
    if type(gradient) is not Tensor:
        return gradient * upstream
    # mostly 1, and a pass over the head's gradient for nothing; a device is not asked for its value
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return gradient
    if gradient.is_contiguous() and can_launch(gradient.device):
        from compact_fast.triton_kernels.gradient_scale import multiply_unless_one

        return multiply_unless_one(gradient, upstream)  # type: ignore[no-any-return]
    return gradient.mul_(upstream)


def _hand_over(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.gradients is None:
        raise RuntimeError(
            "compact_loss: backward ran twice; its gradients are made once, in the forward pass. "
            "Call compact_loss again for a second backward"
        )
    found, ctx.gradients = ctx.gradients, None
    upstream = grads[0]
    if upstream is None:
        return (None,) * int(ctx.num_inputs)
    scaled = [None if g is None else _scaled(g, upstream) for g in found]
    return (*scaled, *(None,) * (int(ctx.num_inputs) - 3))


score_and_loss.register_autograd(_hand_over, setup_context=_keep_gradients)


# ---- token_logp ----------------------------------------------------------------------------------


def _targets_for(backend: CompactBackend, targets: Tensor, hidden: Tensor) -> Tensor:
    """Targets where the backend reads them: on the CPU only if they are there, and it may."""
    if targets.device not in (hidden.device, torch.device("cpu")):
        raise ValueError(
            f"targets are on {targets.device}, hidden on {hidden.device}; leave them on the CPU, "
            "or move them there"
        )
    reads = getattr(backend, "takes_host_layout", False)
    return targets if reads else targets.to(hidden.device)


@torch.library.custom_op(
    "compact_fast::token_logp",
    mutates_args=(),
    schema=f"({_HEAD}, bool statistics, str backend, float softcap=0.0) -> "
    "(Tensor logp, Tensor entropy, Tensor correct)",
)
def token_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    statistics: bool,
    backend: str,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihood, entropy and correctness of each target; see `compact_fast.token_logp`."""
    check_head(hidden, weight, bias)
    check_ids("targets", targets, weight.shape[0])
    check_softcap(softcap)
    run, cap = _resolve(backend, hidden, weight, bias, softcap)
    targets = _targets_for(run, targets, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logp, entropy, correct = run.token_logp(hidden, weight, bias, targets, statistics, *cap)
    return (
        logp,
        logp.new_empty(0) if entropy is None else entropy,
        logp.new_empty(0, dtype=torch.bool) if correct is None else correct,
    )


@token_logp.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    statistics: bool,
    backend: str,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    logp = hidden.new_empty(targets.shape, dtype=statistics_dtype(hidden.dtype))
    more = torch.empty_like(logp) if statistics else logp.new_empty(0)
    return logp, more, torch.empty_like(more, dtype=torch.bool)


@torch.library.custom_op(
    "compact_fast::token_logp_gradients",
    mutates_args=(),
    schema=f"(Tensor grad_logp, {_HEAD}, bool need_hidden, bool need_weight, bool need_bias, "
    "str backend, float softcap=0.0) -> "
    "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
def token_logp_gradients(
    grad_logp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_t grad_logp_t logp_t; empty where not wanted."""
    run, cap = _resolve(backend, hidden, weight, bias, softcap)
    targets = _targets_for(run, targets, hidden)
    needs = Needs(need_hidden, need_weight, need_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        found = run.token_logp_gradients(grad_logp, hidden, weight, bias, targets, needs, *cap)
    a, b, c = _gradients(found, (hidden, weight, bias))
    return a, b, c


@token_logp_gradients.register_fake
def _(
    grad_logp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias and bias is not None else hidden.new_empty(0),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, bias, targets, _, *ctx.how = inputs
    ctx.save_for_backward(hidden, weight, bias, targets)
    ctx.set_materialize_grads(False)


def _recompute(ctx: Any, grad_logp: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_logp is None:
        return (None,) * 7
    needs = [bool(n) for n in ctx.needs_input_grad[:3]]
    found = torch.ops.compact_fast.token_logp_gradients(
        grad_logp, *ctx.saved_tensors, *needs, *ctx.how
    )
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 4)


token_logp.register_autograd(_recompute, setup_context=_save_inputs)


# ---- teacher_weights -----------------------------------------------------------------------------


@torch.library.custom_op(
    "compact_fast::teacher_weights",
    mutates_args=(),
    schema="(Tensor mi, Tensor nll, Tensor? consensus, Tensor? attention, Tensor cu_teachers, "
    "Tensor? teacher_ids, Tensor? question_ids, Tensor? correct, str config) -> (Tensor weights, "
    "Tensor score, Tensor consensus, Tensor filtered, Tensor nonfinite, Tensor skipped)",
)
def teacher_weights(
    mi: Tensor,
    nll: Tensor,
    consensus: Tensor | None,
    attention: Tensor | None,
    cu_teachers: Tensor,
    teacher_ids: Tensor | None,
    question_ids: Tensor | None,
    correct: Tensor | None,
    config: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights from scores that are already there, without gradient; METHOD section 4."""
    out = _teacher_weights(
        mi,
        nll,
        consensus,
        attention,
        cu_teachers,
        CompactConfig.from_text(config),
        teachers=teacher_ids,
        question_ids=question_ids,
        correct=correct,
    )
    return out.weights, out.score, out.consensus, out.filtered, out.nonfinite, out.skipped


@teacher_weights.register_fake
def _(
    mi: Tensor,
    nll: Tensor,
    consensus: Tensor | None,
    attention: Tensor | None,
    cu_teachers: Tensor,
    teacher_ids: Tensor | None,
    question_ids: Tensor | None,
    correct: Tensor | None,
    config: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    flag = torch.empty_like(nll, dtype=torch.bool)
    skipped = nll.new_empty(cu_teachers.shape[0] - 1, dtype=torch.bool)
    empty = torch.empty_like
    return empty(nll), empty(nll), empty(nll), flag, empty(flag), skipped


def backend_name(backend: Any) -> str:
    """What an operator is told: names as they are, objects by a handle."""
    return backend if isinstance(backend, str) else choose(backend).handle
