"""Everything a run can be told, as flat keys: in a YAML file, and as flags of the same names.

The method's keys are the fields of `CompactConfig`. Beyond the keys here, every field of
`transformers.TrainingArguments` is accepted by its name.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from compact_fast.config import MODES, CompactConfig, Weighting
from compact_fast.flat_yaml import Setting, check, describe, near, read_flat_yaml

ARITHMETIC = "arithmetic"
"""As `data` or `student`: the built-in world, and its student."""

SINGLE = "single"
"""In `compare`: all weight on the teacher that is most often right in the training data."""

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class RunSettings:
    """What is trained, on what, and where it goes."""

    student: str | None = None
    """The student: a model id, a folder, a .gguf file, package:NAME (the GGUF file inside an
    installed Python package), or arithmetic (the built-in one). Required."""

    data: str | None = None
    """The teachers' rationales: a file (JSONL, JSON, CSV, parquet), a dataset id, or arithmetic
    (the built-in world). Required."""

    output_dir: str = "runs/compact"
    """Folder of the run: metrics, checkpoints, the trained model, evaluation and report."""

    student_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision the weights are loaded in. auto: bf16 where a GPU has it and only an adapter is
    trained, else fp32."""

    compare: list[str] = field(default_factory=list)
    """Weightings to train as well, each from the same start at the same budget, and to compare in
    one table: any `weighting`, or single (only the teacher that is most often right)."""

    resume: str = "auto"
    """auto continues from the newest undamaged checkpoint in output_dir; never refuses a folder
    that holds a run; a checkpoint folder continues from exactly that one."""

    overwrite: bool = False
    """Delete the run that output_dir holds, and start afresh."""

    def __post_init__(self) -> None:
        known = (*get_args(Weighting), SINGLE)
        _require(self, "compare", lambda v: set(v) <= set(known), f"some of {', '.join(known)}")


@dataclass(frozen=True)
class DataSettings:
    """How records are read and become tokens."""

    split: str = "train"
    """Split of a dataset id."""

    limit: int | None = None
    """Use only so many questions, the first ones."""

    teachers: list[str] | None = None
    """Use only these teachers, in this order. null: all, in order of appearance."""

    on_error: Literal["strict", "skip"] = "strict"
    """A broken record stops the run (strict), or goes to quarantine.jsonl and is counted."""

    holdout: float = 0.05
    """Share of the questions kept out of training, for the loss on unseen rationales."""

    max_length: int = 2560
    """Longest sequence in tokens, prompt and rationale together."""

    truncation: Literal["drop_rationale", "middle", "error"] = "drop_rationale"
    """A longer one is left out, loses the middle of its rationale (the answer stays), or stops
    the run. Always counted."""

    system_prompt: str | None = None
    """System message put before every question. null: whatever the chat template does."""

    system_role: Literal["system", "merge"] = "system"
    """merge opens the user's message with the system prompt, for templates without that role."""

    cache_dir: str | None = None
    """Where tokenised data and consensus scores are kept. null: the user's cache folder."""

    def __post_init__(self) -> None:
        _require(self, "limit", lambda v: v is None or v >= 1, "null or a whole number >= 1")
        _require(self, "holdout", lambda v: 0 <= v < 1, "a share, at least 0 and below 1")
        _require(self, "max_length", lambda v: v >= 2, "a whole number >= 2")
        _require(self, "teachers", lambda v: v is None or v, "null or at least one name")


@dataclass(frozen=True)
class WorldSettings:
    """The built-in world of word problems and its teachers (data: arithmetic)."""

    world_questions: int = 3000
    """Problems to train on."""

    world_seed: int = 0
    """Seed of problems and teachers."""

    world_scenario: Literal["clean", "misleading", "complementary", "colluding"] = "misleading"
    """How the teachers fail."""

    world_shuffle_styles: bool = True
    """Deal the writing styles to the teachers anew in every question."""

    def __post_init__(self) -> None:
        _require(self, "world_questions", lambda v: v >= 1, "a whole number >= 1")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters instead of training every weight."""

    lora: bool = True
    """Train adapters (true) or the whole student (false)."""

    lora_r: int = 16
    """Rank of the adapters."""

    lora_alpha: int = 32
    """Scale of the adapters, over the rank."""

    lora_dropout: float = 0.1
    """Dropout before the adapters."""

    lora_targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    """Modules that get an adapter. The default stands for all linear modules of a layer where the
    student has other names for them; of a list of your own, those it lacks are passed over."""

    def __post_init__(self) -> None:
        _require(self, "lora_r", lambda v: v >= 1, "a whole number >= 1")
        _require(self, "lora_dropout", lambda v: 0 <= v < 1, "a share, at least 0 and below 1")
        _require(self, "lora_targets", lambda v: not self.lora or v, "at least one module name")


@dataclass(frozen=True)
class TrainingSettings:
    """Steps, schedule, precision, logging, checkpoints."""

    questions_per_step: int = 1
    """Questions in one forward pass on one device; all their rationales belong to it."""

    max_tokens_per_step: int | None = None
    """Tokens in one forward pass on one device, in place of questions_per_step: as many whole
    questions of similar length as fit; a longer question goes alone. null: off."""

    gradient_accumulation_steps: int = 4
    """Forward passes in one optimizer step."""

    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""

    lr_scheduler_type: str = "constant"
    """Schedule of the learning rate, by its name in transformers."""

    num_train_epochs: float = 5.0
    """Passes over the questions."""

    max_steps: int = -1
    """Optimizer steps; overrides num_train_epochs unless -1."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    bf16: bool | Literal["auto"] = "auto"
    """bf16 autocast. auto: where the device has it in hardware."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    compile_body: bool = False
    """Compile the student's body by torch.compile, as one graph. Rationales are then padded to
    multiples of 128 tokens, as every new shape is compiled anew."""

    share_prompts: bool = True
    """Read a question's prompt once for all its rationales, where the student can take it and it
    saves work. Equal but for rounding."""

    fusion: Literal["auto", "packed", "per_teacher"] = "auto"
    """packed: all rationales of a step in one forward pass. per_teacher: one rationale at a time,
    with the memory of one; gradients of teachers are compared in the logs. auto: packed, unless
    the forecast says that only per_teacher fits the device's memory."""

    sharding: Literal["none", "fsdp"] = "none"
    """With several processes, none: each holds the whole student. fsdp: each holds a part of its
    weights, gradients and optimizer state. The losses are the same."""

    backend: str = "auto"
    """Backend of the loss: auto, torch, triton, reference, or an installed one by its name."""

    consensus_backend: Literal["auto", "native", "rustworkx"] = "auto"
    """Implementation of the graph consensus."""

    consensus_threads: int | None = None
    """Threads of the graph consensus. null: one a core."""

    logging_steps: int = 5
    """Write a row of metrics every so many steps."""

    eval_steps: int | None = None
    """Measure the held-out loss every so many steps. null: before and after training only."""

    save_steps: int = 50
    """Write a checkpoint every so many steps."""

    save_total_limit: int | None = 2
    """Checkpoints kept; the newest stay. null: all."""

    report_to: str | list[str] = "none"
    """Experiment trackers, by their names in transformers."""

    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """A progress bar, one line a log, or nothing; auto: a bar on a terminal, lines elsewhere."""

    def __post_init__(self) -> None:
        for key in ("questions_per_step", "gradient_accumulation_steps", "logging_steps"):
            _require(self, key, lambda v: v >= 1, "a whole number >= 1")
        budget = self.max_tokens_per_step
        _require(self, "max_tokens_per_step", lambda v: v is None or v > 0, "null or a number >= 1")
        if budget is not None and self.questions_per_step != 1:
            raise ValueError(
                f"max_tokens_per_step={budget} and questions_per_step={self.questions_per_step}: "
                "give one of the two"
            )
        if self.sharding == "fsdp" and (self.fusion == "per_teacher" or self.compile_body):
            other = "compile_body=True" if self.compile_body else "fusion='per_teacher'"
            raise ValueError(f"sharding='fsdp': not together with {other}")
        if self.compile_body and (self.gradient_checkpointing or self.fusion == "per_teacher"):
            other = "gradient_checkpointing" if self.gradient_checkpointing else "per_teacher"
            raise ValueError(f"compile_body=True: not together with {other}")
        _require(self, "save_steps", lambda v: v >= 1, "a whole number >= 1")
        _require(self, "eval_steps", lambda v: v is None or v >= 1, "null or a number >= 1")
        _require(self, "save_total_limit", lambda v: v is None or v >= 1, "null or a number >= 1")
        _require(self, "consensus_threads", lambda v: v is None or v >= 1, "null or a number >= 1")
        _require(self, "max_steps", lambda v: v == -1 or v >= 1, "-1 or a whole number >= 1")
        for key in ("learning_rate", "num_train_epochs"):
            _require(self, key, lambda v: 0 < v < float("inf"), "a finite number > 0")
        _require(self, "max_grad_norm", lambda v: v > 0, "a number > 0")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured on the student before and after training, and by `eval`."""

    eval_data: str | None = None
    """Questions with answers to evaluate on; rationales are not needed. null: fresh problems where
    `data` is the built-in world, else none."""

    eval_questions: int | None = None
    """Evaluate on so many questions, the first ones of eval_data. null: all of a file, 300 problems
    of the built-in world."""

    eval_batch_size: int = 32
    """Questions answered at once."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""

    generate: bool = True
    """Let the student answer each question greedily, and compare with the gold answer."""

    samples: int = 0
    """Answers drawn at temperature 1 for each question, beside the greedy one."""

    likelihood: bool | Literal["auto"] = "auto"
    """Pick the option that the student finds likeliest. auto: where questions have choices."""

    forget_text: str | None = None
    """A text file; its perplexity before and after shows what training forgot."""

    def __post_init__(self) -> None:
        for key in ("eval_batch_size", "max_new_tokens"):
            _require(self, key, lambda v: v >= 1, "a whole number >= 1")
        _require(self, "eval_questions", lambda v: v is None or v >= 0, "null or a number >= 0")
        _require(self, "samples", lambda v: v >= 0, "a whole number >= 0")


def _require(settings: Any, key: str, good: Callable[[Any], Any], expected: str) -> None:
    value = getattr(settings, key)
    if not good(value):
        raise ValueError(f"{key}={value!r}: expected {expected}")


GROUPS: Mapping[str, type] = {
    "run": RunSettings,
    "data": DataSettings,
    "world": WorldSettings,
    "method": CompactConfig,
    "lora": LoraSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
}

# The method's seed is the seed of the whole run here.
DOCS: Mapping[str, str] = {
    "seed": "Seed of all that is random: data order, holdout, adapters, sampling, "
    'weighting="random".'
}

# Fields of TrainingArguments that have another name here, or that this trainer cannot honour.
INSTEAD: Mapping[str, str] = {
    "per_device_train_batch_size": "use questions_per_step",
    "per_device_eval_batch_size": "use eval_batch_size",
    "resume_from_checkpoint": "use resume",
    "activation_checkpointing": "use gradient_checkpointing",
    "eval_strategy": "set eval_steps, or leave it out",
    "save_strategy": "set save_steps",
    "logging_strategy": "set logging_steps",
    "label_smoothing_factor": "this loss has no label smoothing",
    "remove_unused_columns": "rows carry exactly what the loss reads",
    "train_sampling_strategy": "questions are drawn in an order fixed by seed",
    "use_liger_kernel": "the loss has kernels of its own; set backend",
    "fsdp": "use sharding",
    "fsdp_config": "use sharding",
}


@dataclass(frozen=True)
class Key:
    """One key of the schema."""

    name: str
    group: str
    hint: Any
    default: Any
    doc: str

    @property
    def expected(self) -> str:
        """The allowed values in words."""
        return describe(self.hint)


@cache
def schema() -> Mapping[str, Key]:
    """Every key of the project's own, by name, in the order of the groups."""
    keys: dict[str, Key] = {}
    for group, owner in GROUPS.items():
        hints = get_type_hints(owner)
        docs = field_docs(owner)
        for f in fields(owner):
            default = _default(f)
            hint = hints[f.name] if default is not None else hints[f.name] | None
            assert f.name not in keys, f.name
            doc = DOCS.get(f.name) or docs.get(f.name, "")
            if f.name in MODES["compact"]:
                doc += " null: by mode."
            keys[f.name] = Key(f.name, group, hint, default, doc)
    return keys


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def field_docs(owner: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, as one line."""
    module = inspect.getsourcefile(owner)
    if module is None:
        return {}
    tree = ast.parse(Path(module).read_text(encoding="utf-8"))
    docs: dict[str, str] = {}
    body = next(
        n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner.__name__
    )
    for line, following in itertools.pairwise(body):
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[line.target.id] = re.sub(r"\s+", " ", following.value.value.strip())
    return docs


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, group by group; `flat()` has them as the user wrote them."""

    run: RunSettings
    data: DataSettings
    world: WorldSettings
    method: CompactConfig
    lora: LoraSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of transformers.TrainingArguments."""

    settings: Mapping[str, Setting] = field(default_factory=dict, repr=False, compare=False)
    """What the user set, by key, and where; all else is at its default."""

    def flat(self) -> dict[str, Any]:
        """Every key and its value, JSON-friendly."""
        values: dict[str, Any] = {}
        for group in GROUPS:
            owner = getattr(self, group)
            values.update({f.name: getattr(owner, f.name) for f in fields(owner)})
        values.update(self.extra)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def require(self, *keys: str) -> None:
        """ValueError naming the first of these keys that the user has not set."""
        values = self.flat()
        for key in keys:
            if values[key] is None:
                raise ValueError(
                    f"{key}: not set; write `{key}: ...` in the configuration or give "
                    f"{flag_name(key)} VALUE"
                )

    def replace(self, **changes: Any) -> RunConfig:
        """The same configuration with some keys set anew; checked like the user's own."""
        flags = {key: Setting(value, flag_name(key)) for key, value in changes.items()}
        return build({**self.settings, **flags})


def flag_name(key: str) -> str:
    """The flag of a key: "--learning-rate"."""
    return "--" + key.replace("_", "-")


def load(path: str | Path | None, overrides: Iterable[tuple[str, Setting]] = ()) -> RunConfig:
    """The configuration in a file (or none: defaults) with flags on top.

    Raises ValueError naming the place: unknown key (with the nearest name), wrong type (with what
    was expected and got), a value out of range.
    """
    settings = read_flat_yaml(path) if path is not None else {}
    settings.update(overrides)
    return build(settings)


def build(settings: Mapping[str, Setting]) -> RunConfig:
    """A configuration from settings by key; raises ValueError as `load` does."""
    keys = schema()
    foreign = {k: s for k, s in settings.items() if k not in keys}
    extra = _check_foreign(foreign) if foreign else {}
    values: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, setting in settings.items():
        if name in keys:
            values[keys[name].group][name] = check(setting, name, keys[name].hint)
    groups: dict[str, Any] = {}
    for group, owner in GROUPS.items():
        try:
            groups[group] = owner(**values[group])
        except ValueError as error:
            name, _, rest = str(error).partition("=")
            if name not in settings:
                raise
            # "key=value: expected ..." gains the place; the key is named once
            raise ValueError(f"{settings[name].place}: {name}={rest}") from None
    return RunConfig(**groups, extra=extra, settings=dict(settings))


def _check_foreign(foreign: Mapping[str, Setting]) -> dict[str, Any]:
    """Values of keys that are not ours, checked as fields of transformers.TrainingArguments."""
    for key, setting in foreign.items():
        if key in INSTEAD:
            raise setting.error(key, f"not used here; {INSTEAD[key]}")
        if key in GROUPS and isinstance(setting.value, dict):
            raise setting.error(key, "keys are flat; write the keys under it at the top level")
    hints = _training_arguments()
    names = [*schema(), *(n for n in hints if n not in INSTEAD)]
    for key, setting in foreign.items():
        if key not in hints:
            raise setting.error(key, f"unknown key{near(key, names)}")
    return {key: check(setting, key, hints[key]) for key, setting in foreign.items()}


@cache
def _training_arguments() -> Mapping[str, Any]:
    """Type hints of the fields of transformers.TrainingArguments; imports transformers."""
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in fields(TrainingArguments) if f.init}
