"""Students by name: a model id, a folder, a GGUF file, a package or the built-in one."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compact_fast.students.adapters import (
    LORA_TARGETS,
    LoraSettings,
    add_lora,
    prepare_checkpointing,
)
from compact_fast.students.parts import causal_model, check_head

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Student:
    """A loaded student. `source` is the spec it came from, `description` one line for people."""

    model: Any
    tokenizer: Any
    source: str
    description: str


def load_student(
    spec: str,
    *,
    dtype: str | torch.dtype = "auto",
    lora: LoraSettings | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    training: bool = True,
) -> Student:
    """Load a student and its tokenizer.

    `spec` is a model id, a folder (a full model, or an adapter whose base is found by its own
    spec), a GGUF file, "package:NAME" (the one GGUF file inside an installed Python package) or
    "arithmetic" (the built-in student). `dtype` is "fp32", "bf16" or "auto": bf16 on a GPU that
    has it, else fp32. With `lora` the student is wrapped by peft and only the adapter trains; a
    folder that holds an adapter trains on with that adapter. `seed` draws the adapter's start.
    Where `training` is false the description does not say how much is trained.
    Raises ValueError naming the spec and what is wrong with it.
    """
    torch_dtype = resolve_dtype(dtype)
    adapter = Path(spec) / "adapter_config.json"
    if adapter.is_file():
        model, tokenizer = _load_adapter(spec, torch_dtype, trainable=lora is not None)
    else:
        model, tokenizer = _load_full(spec, torch_dtype)
        if lora is not None:
            model = add_lora(model, lora, base=spec, seed=seed)
    if gradient_checkpointing:
        prepare_checkpointing(model)
    check_vocabulary(model, tokenizer, spec)
    check_head(model)
    return Student(model, tokenizer, spec, describe(model, spec, training=training))


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of "fp32", "bf16" or "auto"; a torch float dtype stays."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if gpu else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"student_dtype={dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _load_full(spec: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if spec == "arithmetic":
        from compact_fast.arithmetic import load_student as load_arithmetic

        model, tokenizer = load_arithmetic(dtype)
        return model, tokenizer
    if spec.startswith("package:"):
        return _load_gguf(_package_gguf(spec), spec, dtype)
    if spec.endswith(".gguf"):
        if not Path(spec).is_file():
            raise ValueError(f"student={spec!r}: no such file")
        return _load_gguf(Path(spec), spec, dtype)
    if Path(spec).is_file():
        raise ValueError(f"student={spec!r}: a file, but not a .gguf; give the model's folder")
    if Path(spec).is_dir() and not (Path(spec) / "config.json").is_file():
        raise ValueError(f"student={spec!r}: the folder has neither config.json nor an adapter")
    return _from_pretrained(spec, spec, dtype)


def _load_gguf(path: Path, spec: str, dtype: torch.dtype) -> tuple[Any, Any]:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"student={spec!r}: reading GGUF needs the package gguf: pip install gguf")
    from transformers.utils import quantization_config

    options: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(quantization_config, "GgufConfig"):
        # Plain weights: newer versions may keep them packed, and bar such a model from training.
        options["quantization_config"] = quantization_config.GgufConfig(dequantize=True)
    return _from_pretrained(str(path.parent), spec, dtype, **options)


def _package_gguf(spec: str) -> Path:
    name = spec.removeprefix("package:")
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        remedy = f"pip install {name.replace('_', '-')}"
        raise ValueError(f"student={spec!r}: the package is not installed ({remedy})")
    files = sorted(p for d in found.submodule_search_locations for p in Path(d).rglob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise ValueError(f"student={spec!r}: expected one .gguf file in the package, found {names}")
    return files[0]


def _from_pretrained(where: str, spec: str, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not Path(where).exists():
        kwargs["local_files_only"] = not _on_hub(spec)
    try:
        # First the tokenizer: the model, without a hub, would ask it for an adapter time and again.
        named = {k: v for k, v in kwargs.items() if k != "quantization_config"}
        tokenizer = AutoTokenizer.from_pretrained(where, **named)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        if kwargs.get("local_files_only"):
            raise ValueError(
                f"student={spec!r}: no such folder here, not in the local cache of the model hub, "
                "and the hub cannot be reached"
            ) from error
        raise ValueError(f"student={spec!r}: {_why_not_loaded(error)}") from error
    return model, tokenizer


def _why_not_loaded(error: Exception) -> str:
    text = " ".join(str(error).split())
    # transformers goes on with the names of all classes that it would have taken
    other = re.match(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'>", text)
    if other:
        return (
            f"{other[1].removesuffix('Config')} is no causal language model; name one that "
            "continues text, such as a Llama, a Qwen or a SmolLM"
        )
    return f"cannot be loaded: {text[:300]}"


def _on_hub(spec: str) -> bool:
    """Whether the hub answers and has the model; False when it cannot be reached.

    Asked once and first, as a loader without network retries for most of a minute.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        model_info(spec, timeout=10)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"student={spec!r}: no such folder here, and no such model on the hub "
            "(or a private one, without access)"
        ) from error
    except Exception:  # the transport's own errors differ from version to version
        return False
    return True


def _load_adapter(spec: str, dtype: torch.dtype, *, trainable: bool) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    base = PeftConfig.from_pretrained(spec).base_model_name_or_path
    if not base:
        raise ValueError(f"student={spec!r}: adapter_config.json names no base model")
    try:
        model, tokenizer = _load_full(base, dtype)
    except ValueError as error:
        reason = str(error).removeprefix(f"student={base!r}: ")
        raise ValueError(
            f"student={spec!r}: an adapter whose base {base!r} cannot be had: {reason} (the base "
            f"is base_model_name_or_path in {Path(spec) / 'adapter_config.json'}; correct it there "
            "if the base has moved)"
        ) from error
    model = PeftModel.from_pretrained(model, spec, is_trainable=trainable)
    if (Path(spec) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(spec)
    return model, tokenizer


def describe(model: Any, spec: str, *, training: bool = True) -> str:
    """One line: class, parameters, trained share (in training) and where it lies if not where it
    mostly does, dtype."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    name = type(causal_model(model)).__name__
    share = f"{trained / 1e6:.2f}M trained, " if trained < total else "all trained, "
    adapter = getattr(model, "peft_config", {}).get("default")
    where = getattr(adapter, "target_modules", None)
    if where and set(where) != set(LORA_TARGETS):
        names = where if isinstance(where, str) else ", ".join(sorted(where))
        share = f"{trained / 1e6:.2f}M trained on {names}, "
    return f"{spec}: {name}, {total / 1e6:.1f}M parameters, {share if training else ''}{dtype}"


def check_vocabulary(model: Any, tokenizer: Any, spec: str) -> None:
    """Raise ValueError where the tokenizer has ids, added tokens included, beyond the embedding.

    An embedding with more rows than the tokenizer has tokens is usual: rows are padded.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= rows:
        raise ValueError(
            f"student={spec!r}: its tokenizer has ids up to {largest} ({token!r}), its embedding "
            f"{rows} rows, for ids up to {rows - 1}; save it with its own tokenizer, or enlarge "
            f"the model first: model.resize_token_embeddings({largest + 1})"
        )
