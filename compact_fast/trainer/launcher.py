"""What `accelerate launch` asks for through the environment: sharding and precision."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

ALONE = (
    "sharding='fsdp': one process has nobody to share with; start several (torchrun "
    "--nproc-per-node N -m compact_fast train ...), or set sharding='none'"
)

_ASKED = "ACCELERATE_USE_FSDP"
# The launcher's settings that this trainer answers to: what it does, and what to do instead.
_DONE = {
    "FSDP_VERSION": ("2", "set fsdp_version: 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "weights stay on the device"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "every process reads the student's files"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "set gradient_checkpointing in the run"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "layers are released after their forward pass"),
    "FSDP_AUTO_WRAP_POLICY": ("transformer_based_wrap", "a unit is a decoder layer"),
    "FSDP_STATE_DICT_TYPE": ("full_state_dict", "checkpoints hold whole tensors"),
}


def launched_sharding(environment: MutableMapping[str, str] | None = None) -> bool:
    """Whether the launcher was told to shard (`distributed_type: FSDP`). Asked once: accelerate is
    then told nothing of it, as this trainer shards in its own way.

    Raises ValueError for a setting of the launcher's that would not be followed.
    """
    found = os.environ if environment is None else environment
    if found.get(_ASKED, "false").lower() not in ("true", "1"):
        return False
    for name, (value, remedy) in _DONE.items():
        if found.get(name, value).lower() != value:
            raise ValueError(f"{name}={found[name]} (from accelerate): expected {value}; {remedy}")
    found[_ASKED] = "false"
    return True


def processes() -> int:
    """How many processes the launcher has started; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave() -> None:
    """End this process's part in the group, once all is done. What the group's threads still do
    when Python ends would abort the process, and the launcher then ends the others."""
    dist = sys.modules.get("torch.distributed")  # a run that was finished before has not loaded it
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def launched_bf16(
    bf16: bool | None, environment: MutableMapping[str, str] | None = None
) -> bool | None:
    """The run's `bf16`, or where that is open (None) what the launcher was told, if anything.

    Raises ValueError where the two contradict each other, and for fp16 and fp8.
    """
    found = os.environ if environment is None else environment
    asked = found.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == "no":
        return bf16
    if asked != "bf16":
        raise ValueError(
            f"mixed_precision={asked} (from accelerate): not supported; use bf16 or no"
        )
    if bf16 is False:
        raise ValueError("mixed_precision=bf16 (from accelerate), but bf16=False: give one of them")
    return True
