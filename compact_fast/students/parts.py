"""The parts of a causal language model that this project uses.

The model's own head and loss are never called: `body_and_head` gives the decoder that makes hidden
states and the matrix that would make logits of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compact_fast.softcap import capped

# How known families name what they do to logits; `check_head` compares with the model's own.
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier")
_MULTIPLIES = ("hyperclovax",)  # where `logits_scaling` is a factor; elsewhere it divides


@dataclass(frozen=True)
class BodyAndHead:
    """The two halves of a causal language model.

    body: (input_ids, attention_mask=None) -> last hidden state [S, L, D], times the logits' scale,
        so that the head's products are the logits, but for the cap.
    softcap: logits are softcap tanh(product / softcap); 0: they are the products.
    """

    body: Callable[..., Tensor]
    head: Any
    softcap: float = 0.0

    @property
    def weight(self) -> Tensor:
        """The unembedding [V, D], tied to the embedding or not; of a sharded student a DTensor,
        and after its body has run the whole weight, until the backward pass."""
        weight: Tensor = self.head.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """[V], or None."""
        bias: Tensor | None = getattr(self.head, "bias", None)
        return bias

    @property
    def trainable(self) -> bool:
        return self.weight.requires_grad


def unwrap(model: Any) -> Any:
    """Without the wrappers of data-parallel training and compilation; adapters stay."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def causal_model(model: Any) -> Any:
    """The transformers model itself; its layers hold the adapters that peft injected."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_and_head(model: Any) -> BodyAndHead:
    """Split a causal language model into the body that makes hidden states, and the head.

    Raises ValueError, naming it, for an adapter on the head, which would make logits differ from
    `hidden @ W.T`.
    """
    causal = causal_model(model)
    body, head = causal.base_model, causal.get_output_embeddings()
    if body is causal or head is None:
        raise ValueError(f"{type(causal).__name__} is not a causal language model with a head")
    if hasattr(head, "modules_to_save"):  # peft trains a whole copy of the head
        head = head.modules_to_save[head.active_adapter]
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise ValueError(
            f"{type(causal).__name__}: an adapter on the head ({head_name(causal)}) is not "
            "supported; take it out of the adapter's target modules"
        )

    def run(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if is_sharded(causal):  # its own hooks gather embeddings, last norm and head
            return through(causal, input_ids, attention_mask, **kwargs)
        return hidden_states(causal, input_ids, attention_mask, **kwargs)

    return BodyAndHead(run, head, _softcap(causal))


def logit_scale(model: Any) -> float:
    """What a model multiplies its head's products with (Cohere, Granite, Falcon-H1 and alike)."""
    config = causal_model(model).config.get_text_config()
    scale = 1.0
    for name in _FACTORS:
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return float(scale * scaling if config.model_type in _MULTIPLIES else scale / scaling)


def _softcap(causal: Any) -> float:
    config = causal.config.get_text_config()
    return float(next(filter(None, (getattr(config, name, None) for name in _SOFTCAPS)), 0.0))


def is_sharded(model: Any) -> bool:
    """Whether the model's weights are spread over processes, by torch's `fully_shard`."""
    return is_unit(causal_model(model))


def is_unit(module: Any) -> bool:
    """Whether a module is sharded, and gathered by itself."""
    # what FSDPModule adds to a module; its import is slow, and mostly for nothing
    return hasattr(module, "unshard") and hasattr(module, "reshard")


def through(
    outer: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Last hidden state [S, L, D] by a call of `outer`, the model in or without its wrappers, so
    that their hooks see one; the head is not called."""
    causal = causal_model(outer)

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **given: Any) -> Tensor:
        # wrappers add arguments that the body lacks
        named = {name: given[name] for name in kwargs}
        return hidden_states(causal, input_ids, attention_mask, **named)

    before = causal.__dict__.get("forward")
    causal.forward = forward
    try:
        hidden: Tensor = outer(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    finally:
        if before is None:
            del causal.forward
        else:
            causal.forward = before
    return hidden


def hidden_states(
    causal: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Last hidden state [S, L, D] after the final norm, as the head is to be multiplied with it;
    the one way in which bodies are called."""
    body, scale = causal.base_model, logit_scale(causal)
    if "use_cache" in inspect.signature(body.forward).parameters or _takes_kwargs(body):
        kwargs["use_cache"] = False
    out = body(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
    hidden: Tensor = out.last_hidden_state
    return hidden if scale == 1 else hidden * scale


def _takes_kwargs(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def head_name(model: Any) -> str:
    """The head's name among the model's modules."""
    head = causal_model(model).get_output_embeddings()
    names = [n for n, m in causal_model(model).named_modules() if m is head]
    return names[0] if names else "lm_head"


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the model's own logits with `hidden @ W.T + b`, capped, on three tokens.

    Raises ValueError when they differ: such a model changes its logits in a way this project does
    not know, and would be trained on wrong likelihoods.
    """
    causal, parts = causal_model(model), body_and_head(model)
    if parts.weight.is_meta:
        return
    ids = torch.arange(1, 4, device=parts.weight.device)[None]
    with inference(causal):
        own = causal(input_ids=ids).logits.float()
        ours = nn.functional.linear(parts.body(ids), parts.weight, parts.bias).float()
        ours = capped(ours, parts.softcap)
    if not bool(own.isfinite().all()):
        raise ValueError(f"{type(causal).__name__}: its logits are not finite; are its weights?")
    error = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
    if not error < (1e-4 if parts.weight.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{type(causal).__name__}: its logits are not hidden states times the head (relative "
            f"difference {error:.2g}); such models are not supported"
        )


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's mode is put back afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
