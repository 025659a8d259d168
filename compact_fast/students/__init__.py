"""Students: loading by name, adapters, and the parts of a causal language model that are used."""

from compact_fast.students.adapters import (
    LORA_TARGETS,
    LoraSettings,
    add_lora,
    merged,
    prepare_checkpointing,
)
from compact_fast.students.loading import Student, load_student, resolve_dtype
from compact_fast.students.parts import (
    BodyAndHead,
    body_and_head,
    causal_model,
    check_head,
    inference,
    is_sharded,
    logit_scale,
    through,
    unwrap,
)
from compact_fast.students.projections import AttentionProjections, attention_projections

__all__ = [
    "LORA_TARGETS",
    "AttentionProjections",
    "BodyAndHead",
    "LoraSettings",
    "Student",
    "add_lora",
    "attention_projections",
    "body_and_head",
    "causal_model",
    "check_head",
    "inference",
    "is_sharded",
    "load_student",
    "logit_scale",
    "merged",
    "prepare_checkpointing",
    "resolve_dtype",
    "through",
    "unwrap",
]
