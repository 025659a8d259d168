"""Low-rank adapters, by peft."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compact_fast.students.parts import head_name

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter. `targets` are names of linear modules; those the student has are used."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.1
    targets: tuple[str, ...] = LORA_TARGETS


def add_lora(model: Any, settings: LoraSettings, *, base: str | None = None, seed: int = 0) -> Any:
    """Wrap a model by peft; only the adapter trains. `base` is the spec stored in the adapter.

    Raises ValueError when none of the targets exists (naming those that do), or when the head is
    a target.
    """
    from peft import LoraConfig, get_peft_model

    head = head_name(model)
    if head in settings.targets:
        raise ValueError(f"lora_targets: {head}: an adapter on the head is not supported")
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    targets = [name for name in settings.targets if name in linear]
    if not targets:
        raise ValueError(
            f"lora_targets={','.join(settings.targets)}: {type(model).__name__} has none of them; "
            f"its linear modules are {', '.join(sorted(linear - {head}))}"
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
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
