"""Low-rank adapters, by peft."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compact_fast.students.parts import head_name

logger = logging.getLogger(__name__)

# What Llama and most families after it call the linear modules of a layer.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ROUTERS = ("gate", "router", "shared_expert_gate")  # which expert takes a token is left alone


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter.

    `targets` are names of linear modules, of which those the student has are used. The default,
    LORA_TARGETS, stands for all linear modules of a layer where some have other names.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.1
    targets: tuple[str, ...] = LORA_TARGETS


def add_lora(model: Any, settings: LoraSettings, *, base: str | None = None, seed: int = 0) -> Any:
    """Wrap a model by peft; only the adapter trains. `base` is the spec stored in the adapter.

    The log says when the adapter sits on other modules than those that were named. Raises
    ValueError when there is none to sit on (naming those that the model has), or when the head is a
    target.
    """
    from peft import LoraConfig, get_peft_model

    head = head_name(model)
    if head in settings.targets:
        raise ValueError(f"lora_targets: {head}: an adapter on the head is not supported")
    linear = {n: m for n, m in model.named_modules() if _is_linear(m)}
    targets = _targets(settings.targets, [name for name in linear if name != head], model)
    chosen = [m for n, m in linear.items() if n.rsplit(".", 1)[-1] in targets]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=all(not isinstance(m, nn.Linear) for m in chosen),
        task_type="CAUSAL_LM",
    )
    # The adapter's start must not depend on what ran before.
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(model, config)
    if base is not None:
        model.peft_config["default"].base_model_name_or_path = _lasting(base)
    return model


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _targets(wanted: tuple[str, ...], linear: list[str], model: Any) -> list[str]:
    """Names of the modules that get an adapter, of those that are wanted."""
    there = {name.rsplit(".", 1)[-1] for name in linear}
    missing = [name for name in wanted if name not in there]
    if not missing:
        return list(wanted)
    kind = type(model).__name__
    if wanted == LORA_TARGETS:
        # in a layer: some part of the whole name is its number
        inside = {n.rsplit(".", 1)[-1] for n in linear if any(map(str.isdigit, n.split(".")))}
        found = sorted(inside.difference(_ROUTERS))
        if found:
            logger.info("%s: the adapter sits on %s", kind, ", ".join(found))
            return found
    found = [name for name in wanted if name in there]
    if not found:
        raise ValueError(
            f"lora_targets={','.join(wanted)}: {kind} has none of them; its linear modules are "
            f"{', '.join(sorted(there))}"
        )
    logger.warning("lora_targets: %s has no %s", kind, ", ".join(missing))
    return found


def _lasting(spec: str) -> str:
    """A student's spec that means the same from any folder: paths here become absolute, names
    of models and packages stay."""
    return str(Path(spec).absolute()) if Path(spec).exists() and spec != "arithmetic" else spec


def merged(model: Any) -> Any:
    """The model with its adapter folded into its weights, as transformers knows it; a model without
    adapter as it is. ValueError when the sum is not finite. The given model is used up."""
    if not hasattr(model, "merge_and_unload"):
        return model
    return model.merge_and_unload(safe_merge=True)


def prepare_checkpointing(model: Any) -> None:
    """Let gradients reach a frozen body's first layer, without which recomputation has none."""
    if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        model.enable_input_require_grads()
