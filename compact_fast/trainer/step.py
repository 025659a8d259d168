"""From tokenised questions to the loss: the one path that training and scoring share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compact_fast.backends import CompactBackend, RunSpec
from compact_fast.config import CompactConfig
from compact_fast.data.collate import collate, collate_layout, collate_priors
from compact_fast.inputs import mi_is_used
from compact_fast.layout import TokenLayout
from compact_fast.loss import compact_loss, token_logp
from compact_fast.output import CompactOutput
from compact_fast.reference import attention_consensus
from compact_fast.scores import segment_sum
from compact_fast.students import (
    BodyAndHead,
    attention_projections,
    body_and_head,
    causal_model,
    inference,
    through,
    unwrap,
)
from compact_fast.trainer.batching import IDLE
from compact_fast.trainer.packing import (
    Packing,
    is_cheaper,
    pack_segments,
    pack_shared,
    packing_on,
    read_segments,
    shared_mask,
)
from compact_fast.trainer.segments import (
    attend_by_segments,
    attending_by_segments,
    attends_by_segments,
)

_COMPILED_MULTIPLE = 128  # few shapes, so that a compiled body is compiled few times

Body = Callable[..., Tensor]  # (input_ids, attention_mask, **kwargs) -> [rows, length, D]


@dataclass(frozen=True)
class Collator:
    """Rows of whole questions to the tensors of one step, by name. Picklable, for workers."""

    thinking_ids: tuple[int, ...]
    pad_id: int
    keep_padding: bool = False  # for mode="reference"
    priors: bool = False  # for mi="pvi"
    packing: Packing = field(default_factory=Packing)
    multiple: int = 1  # masked rows are padded to multiples of it

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        config: CompactConfig,
        thinking_ids: Sequence[int],
        *,
        share_prompts: bool = True,
        device: torch.device | None = None,
        compiled: bool = False,
        lasting: bool = True,
        autocast: torch.dtype | None = None,
    ) -> Collator:
        """The collator that a student and a configuration need, on the device it will run on.

        autocast: the dtype that the body computes in, if not that of its weights.

        Where it packs segments, the student's attention heeds them from now on; unless `lasting`
        is false and the caller sees to that, with `heeding`.
        """
        where = device or next(model.parameters()).device
        packing = packing_on(
            model,
            where,
            share=share_prompts,
            keep_padding=config.mode == "reference",
            compiled=compiled,
            autocast=autocast,
        )
        if packing.kind == "segments" and lasting:
            attend_by_segments(model)
        return cls(
            tuple(thinking_ids),
            pad_token(tokenizer, model),
            keep_padding=config.mode == "reference",
            priors=config.mi == "pvi" and mi_is_used(config),
            packing=packing,
            multiple=_COMPILED_MULTIPLE if compiled else 1,
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        kind, shared = self.packing.kind, self.packing.shared
        common: dict[str, Any] = {"thinking_ids": self.thinking_ids, "pad_id": self.pad_id}
        if kind == "segments":
            out = collate_layout(rows, thinking_ids=self.thinking_ids)
            out |= pack_segments(rows, shared=shared)
        elif kind == "mask" and (self.multiple > 1 or is_cheaper(rows, self.packing.width)):
            out = collate_layout(rows, thinking_ids=self.thinking_ids)
            out |= pack_shared(rows, self.pad_id, multiple=self.multiple)
        else:
            # Always padded on the right: a causal body cannot see it there, so it needs no mask.
            out = dict(vars(collate(rows, keep_padding=self.keep_padding, **common)))
        if rows[0].get(IDLE):
            out[IDLE] = True
        if self.priors:
            out["priors"] = dict(vars(collate_priors(rows, **common)))
        return out


def pad_token(tokenizer: Any, model: Any) -> int:
    """An id to pad with; what it is matters in mode="reference" alone, which reads padding."""
    config = causal_model(model).config.get_text_config()
    for owner, name in (
        (tokenizer, "pad_token_id"),
        (config, "pad_token_id"),
        (tokenizer, "eos_token_id"),
        (config, "eos_token_id"),
    ):
        value: Any = getattr(owner, name, None)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None and 0 <= value < config.vocab_size:
            return int(value)
    return 0


def run_spec(
    model: Any, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> RunSpec:
    """What the loss of a student asks of a backend; where and as the head lies unless told."""
    head = body_and_head(model)
    vocabulary, width = head.weight.shape
    return RunSpec(
        device or head.weight.device,
        dtype or head.weight.dtype,
        vocabulary,
        width,
        head.bias is not None,
        softcap=head.softcap,
    )


def heeding(model: Any, packing: Packing) -> AbstractContextManager[None]:
    """Inside, the model's attention heeds what this packing makes."""
    return attending_by_segments(model) if packing.kind == "segments" else nullcontext()


def to_device(inputs: Any, device: torch.device) -> Any:
    """What a collator made, with everything that can be moved on the device."""
    if isinstance(inputs, dict):
        return {name: to_device(value, device) for name, value in inputs.items()}
    return inputs.to(device, non_blocking=True) if hasattr(inputs, "to") else inputs


def direct_body(model: Any) -> Body:
    """The body called by itself, past any wrapper."""
    return body_and_head(model).body


def wrapped_body(model: nn.Module) -> Body:
    """The body called through the model's wrappers, whose hooks keep replicas together."""
    if unwrap(model) is model:
        return direct_body(model)

    return partial(through, model)


def packed_hidden(body: Body, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden states of the packed positions, [T, D]."""
    layout: TokenLayout = inputs["layout"]
    ids = inputs["input_ids"]
    if "trees" in inputs:
        hidden = read_segments(body, inputs, ids.device)
    elif "segments" in inputs:
        hidden = body(ids, shared_mask(inputs["segments"]), position_ids=inputs["position_ids"])
    else:
        # PAD positions only count where the layout holds them (mode="reference").
        seen = inputs["attention_mask"] if layout.real is not None else None
        hidden = body(ids, seen)
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, inputs["gather"])


def compact_step(
    body: Body,
    model: Any,
    inputs: Mapping[str, Any],
    *,
    config: CompactConfig,
    backend: CompactBackend | str = "auto",
    normalizer: float | None = None,
) -> CompactOutput:
    """The loss of one batch from the collator; the model's own head and loss are never called."""
    head = body_and_head(model)
    layout: TokenLayout = inputs["layout"]
    if "trees" in inputs and not attends_by_segments(model):
        raise ValueError("this batch was packed for another student: its attention heeds no trees")
    if "priors" in inputs:
        layout = replace(layout, prior_logp=prior_logp(model, inputs["priors"], backend))
    hidden, weight = packed_hidden(body, inputs), head.weight
    if not torch.is_grad_enabled():
        weight = weight.detach()  # or a trained head's gradient would be made for nothing
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    attention = None
    if config.consensus in ("attention", "both"):
        attention = attention_scores(model, hidden, layout, config)
    return compact_loss(
        hidden,
        weight,
        layout,
        consensus=inputs["consensus"],
        attention=attention,
        config=config,
        backend=backend,
        normalizer=normalizer,
        head_bias=head.bias,
        softcap=head.softcap,
    )


@torch.no_grad()
def attention_scores(
    model: Any, hidden: Tensor, layout: TokenLayout, config: CompactConfig
) -> Tensor:
    """The student's attention among a question's rationales, from each one's last token: [S]."""
    maps = attention_projections(model)
    last = hidden.detach()[layout.last_real]
    return attention_consensus(
        maps.queries(last),
        maps.keys(last),
        layout.cu_teachers,
        num_heads=maps.num_heads,
        num_kv_heads=maps.num_kv_heads,
        gqa=config.attention_gqa,
    )


@torch.no_grad()
def prior_logp(model: Any, inputs: Mapping[str, Any], backend: CompactBackend | str) -> Tensor:
    """log p(gold | question) of each question, [Q], from one short sequence each; no dropout."""
    head: BodyAndHead = body_and_head(model)
    with inference(causal_model(model)):
        hidden = packed_hidden(head.body, inputs)
    layout: TokenLayout = inputs["layout"]
    logp = token_logp(
        hidden,
        head.weight,
        layout.on_host.targets,
        backend=backend,
        head_bias=head.bias,
        softcap=head.softcap,
    )
    return segment_sum(logp, layout).float()
