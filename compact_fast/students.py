"""Students: loading by name, adapters, and the parts of a causal language model this project uses.

The model's own head and loss are never called: `body_and_head` gives the decoder that makes hidden
states and the matrix that would make logits of them. `attention_projections` gives the query and
key maps of the last layer, for the attention consensus.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Settings by which known families change logits after the head; neutral values are harmless.
_LOGIT_CHANGES = {
    "final_logit_softcapping": (None, 0),
    "output_logit_soft_cap": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
}


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter. `targets` are names of linear modules; those the student has are used."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.1
    targets: tuple[str, ...] = LORA_TARGETS


@dataclass
class Student:
    """A loaded student. `source` is the spec it came from, `description` one line for people."""

    model: Any
    tokenizer: Any
    source: str
    description: str


@dataclass(frozen=True)
class BodyAndHead:
    """The two halves of a causal language model."""

    body: Callable[..., Tensor]  # (input_ids, attention_mask=None) -> last hidden state [S, L, D]
    head: Any

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


@dataclass(frozen=True)
class AttentionProjections:
    """Query and key maps of the last decoder layer: no rotation, no norm, adapters included."""

    queries: Callable[[Tensor], Tensor]  # [S, D] -> [S, num_heads * head_dim]
    keys: Callable[[Tensor], Tensor]  # [S, D] -> [S, num_kv_heads * head_dim]
    num_heads: int
    num_kv_heads: int
    head_dim: int


# ---- loading ---------------------------------------------------------------------------------


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


def add_lora(model: Any, settings: LoraSettings, *, base: str | None = None, seed: int = 0) -> Any:
    """Wrap a model by peft; only the adapter trains. `base` is the spec stored in the adapter.

    Raises ValueError when none of the targets exists (naming those that do), or when the head is
    a target.
    """
    from peft import LoraConfig, get_peft_model

    head = _head_name(model)
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


def describe(model: Any, spec: str, *, training: bool = True) -> str:
    """One line: class, parameters, trained share (in training), dtype."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    name = type(causal_model(model)).__name__
    share = f"{trained / 1e6:.2f}M trained, " if trained < total else "all trained, "
    return f"{spec}: {name}, {total / 1e6:.1f}M parameters, {share if training else ''}{dtype}"


# ---- parts -----------------------------------------------------------------------------------


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

    Raises ValueError, naming the value, for what would make logits differ from `hidden @ W.T`:
    soft-capping, a logit scale, an adapter on the head.
    """
    causal = causal_model(model)
    body, head = causal.base_model, causal.get_output_embeddings()
    if body is causal or head is None:
        raise ValueError(f"{type(causal).__name__} is not a causal language model with a head")
    config = causal.config.get_text_config()
    for name, neutral in _LOGIT_CHANGES.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise ValueError(f"{type(causal).__name__}: {name}={value} is not supported")
    if hasattr(head, "modules_to_save"):  # peft trains a whole copy of the head
        head = head.modules_to_save[head.active_adapter]
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise ValueError(
            f"{type(causal).__name__}: an adapter on the head ({_head_name(causal)}) is not "
            "supported; take it out of the adapter's target modules"
        )

    def run(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if is_sharded(causal):  # its own hooks gather embeddings, last norm and head
            return through(causal, input_ids, attention_mask, **kwargs)
        return hidden_states(body, input_ids, attention_mask, **kwargs)

    return BodyAndHead(run, head)


def is_sharded(model: Any) -> bool:
    """Whether the model's weights are spread over processes, by torch's `fully_shard`."""
    return _is_unit(causal_model(model))


def _is_unit(module: Any) -> bool:
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
        return hidden_states(causal.base_model, input_ids, attention_mask, **named)

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
    body: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Last hidden state [S, L, D] after the final norm; the one way in which bodies are called."""
    if "use_cache" in inspect.signature(body.forward).parameters or _takes_kwargs(body):
        kwargs["use_cache"] = False
    out = body(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
    hidden: Tensor = out.last_hidden_state
    return hidden


def _takes_kwargs(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _head_name(model: Any) -> str:
    head = causal_model(model).get_output_embeddings()
    names = [n for n, m in causal_model(model).named_modules() if m is head]
    return names[0] if names else "lm_head"


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


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the model's own logits with `hidden @ W.T + b` on three tokens.

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
    if not bool(own.isfinite().all()):
        raise ValueError(f"{type(causal).__name__}: its logits are not finite; are its weights?")
    error = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
    if not error < (1e-4 if parts.weight.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{type(causal).__name__}: its logits are not hidden states times the head (relative "
            f"difference {error:.2g}); such models are not supported"
        )


def attention_projections(model: Any) -> AttentionProjections:
    """Query and key maps of the last decoder layer (Llama, Qwen, Gemma, Mistral, Phi and alike).

    Raises ValueError, naming the layer's class, where there are none.
    """
    causal = causal_model(model)
    config = causal.config.get_text_config()
    layers = getattr(causal.base_model, "layers", None)
    last = layers[-1] if layers is not None else None
    attention = getattr(last, "self_attn", None)
    heads, kv_heads, dim = _head_sizes(config, type(causal).__name__)
    q, k = getattr(attention, "q_proj", None), getattr(attention, "k_proj", None)
    fused = getattr(attention, "qkv_proj", None)
    if q is not None and k is not None:
        widths = (q.out_features, k.out_features)
        queries, keys = _without_dropout(q, last), _without_dropout(k, last)
    elif fused is not None:
        widths = (heads * dim, kv_heads * dim)
        both = _without_dropout(fused, last)
        bounds = (widths[0], sum(widths))

        def queries(x: Tensor) -> Tensor:
            return both(x)[..., : bounds[0]]

        def keys(x: Tensor) -> Tensor:
            return both(x)[..., bounds[0] : bounds[1]]
    else:
        where = type(attention).__name__ if attention is not None else type(causal).__name__
        raise ValueError(
            f"{where}: no q_proj and k_proj in the last layer; attention consensus is not "
            'supported for this student (use consensus="graph")'
        )
    if widths != (heads * dim, kv_heads * dim):
        raise ValueError(
            f"{type(attention).__name__}: q_proj and k_proj make {widths} features, expected "
            f"{(heads * dim, kv_heads * dim)}; attention consensus is not supported for it"
        )
    return AttentionProjections(queries, keys, heads, kv_heads, dim)


def _head_sizes(config: Any, model: str) -> tuple[int, int, int]:
    """(query heads, key heads, features of a head); ValueError where layers differ in them."""
    try:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
    except RuntimeError as error:  # the host's, of a class that older versions lack
        raise ValueError(
            f"{model}: its layers differ in the number or size of attention heads; attention "
            'consensus is not supported for this student (use consensus="graph")'
        ) from error


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


def _without_dropout(module: nn.Module, layer: Any) -> Callable[[Tensor], Tensor]:
    """A part of `layer`, called by itself; a sharded layer is gathered for the call."""

    def run(x: Tensor) -> Tensor:
        if _is_unit(layer):
            layer.unshard()
        with inference(module):
            out: Tensor = module(x)
        if _is_unit(layer):
            layer.reshard()
        return out

    return run
