"""sharding="fsdp": a student's weights, gradients and optimizer state spread over the processes.

Torch's `fully_shard` (FSDP2), a unit a decoder layer, and one of all the rest (embeddings, last
norm, head). The rest stays gathered from a forward pass to its backward pass, so that the loss
finds the head whole, and what it adds to the head's gradient is reduced with the embeddings'.
Processes meet in every unit of every forward pass: all must make equally many, for which
`in_step` cares where their work differs.

Checkpoints hold whole tensors, gathered on the main process, in the files of an unsharded run:
either can be resumed on any number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compact_fast.sharded_head import is_dtensor
from compact_fast.students import body_and_head, causal_model, inference, is_sharded
from compact_fast.trainer.launcher import ALONE

_SHARDED: WeakSet[nn.Module] = WeakSet()  # transformers models, by `shard`


def refuse_parts(model: nn.Module) -> None:
    """ValueError for weights that anything else than `shard` has spread over processes."""
    if causal_model(model) in _SHARDED:
        return
    for name, p in model.named_parameters():
        if is_dtensor(p):
            raise ValueError(
                f"{name} is a DTensor: the student has been sharded before; give it whole, with "
                "sharding='fsdp'"
            )


@torch.no_grad()
def shard(model: nn.Module, device: torch.device) -> list[str]:
    """Spread a student's weights over all processes, in place; those of process 0 count.

    Returns sentences for the user. Raises ValueError, with the remedy, where there is nothing to
    spread over, and for weights outside the transformers model. A sharded student stays as it is.
    """
    if causal_model(model) in _SHARDED:
        return []
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        raise ValueError(ALONE)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    causal = causal_model(model)
    inside = {id(p) for p in causal.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in inside]
    if outside:
        raise ValueError(
            f"sharding='fsdp': {outside[0]} lies outside the transformers model (an adapter of "
            "prompts?); set sharding='none'"
        )
    for value in (*model.parameters(), *model.buffers()):
        shared = value.data.to(device).contiguous()
        dist.broadcast(shared, 0)
        value.data.copy_(shared)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    kinds = set(causal._no_split_modules or ())
    layers = [m for m in causal.modules() if type(m).__name__ in kinds]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(causal, mesh=mesh, reshard_after_forward=False)
    causal.register_load_state_dict_pre_hook(_split_state)
    _SHARDED.add(causal)
    if layers:
        return []
    return [
        f"sharding='fsdp': {type(causal).__name__} names no layers, so that all its weights are "
        "gathered at once in every pass"
    ]


def reshard(model: Any) -> None:
    """Release what a sharded model has gathered; its parameters are then the DTensors."""
    for module in causal_model(model).modules():
        if hasattr(module, "reshard"):
            module.reshard()


# ---- equally many forward passes -----------------------------------------------------------------


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Inside, each process calls a sharded model as often as it likes, without gradients.

    One that leaves keeps the pace of the others until all have: it reads one token whenever
    another process reads something. Models that are not sharded need no such care.
    """
    if not is_sharded(model):
        yield
        return
    causal = causal_model(model)
    device = next(causal.parameters()).device

    def busy(count: int) -> bool:
        """Whether any process has something to read; all must ask at once."""
        total = torch.tensor(count, device=device)
        dist.all_reduce(total)
        return bool(total.item())

    def announce(*_: Any) -> None:
        busy(1)

    handle = causal.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        token = torch.zeros((1, 1), dtype=torch.long, device=device)
        with inference(causal), torch.no_grad():
            while busy(0):
                body_and_head(model).body(token)
        reshard(model)


# ---- whole tensors -------------------------------------------------------------------------------


@dataclass
class WholeState:
    """Whole tensors of a sharded run, on the CPU of the main process; empty on all others."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def gather(model: Any, optimizer: Any = None) -> WholeState | None:
    """What a checkpoint of a sharded model holds, None for any other; all processes must call it.

    Of a model with adapters only what is trained, and the embeddings, which peft may want.
    """
    if not is_sharded(model):
        return None
    reshard(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    if hasattr(model, "peft_config"):
        causal = causal_model(model)
        ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
        wanted = {id(p) for end in ends for p in end.parameters()}
        named = {n: p for n, p in named.items() if p.requires_grad or id(p) in wanted}
    main, once = dist.get_rank() == 0, {}
    for p in named.values():
        if id(p) not in once:
            once[id(p)] = _whole(p.detach(), main)
    persistent = model.state_dict().keys()
    buffers = {n: b for n, b in model.named_buffers() if n in persistent}
    weights = {n: once[id(p)] for n, p in named.items()} | buffers
    state = {} if optimizer is None else _whole(optimizer.state_dict(), main)
    return WholeState(weights, state) if main else WholeState({}, {})


def _whole(value: Any, keep: bool) -> Any:
    """The same tree with whole tensors on the CPU, for those who keep it."""
    if isinstance(value, dict):
        return {key: _whole(part, keep) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole(part, keep) for part in value]
    if not isinstance(value, Tensor):
        return value
    part: Any = value
    whole = part.full_tensor() if is_dtensor(part) else part
    return whole.cpu() if keep else None


def _split_like(whole: Tensor, like: Any) -> Tensor:
    """This process's part of a whole tensor; that of the first process counts, all must ask."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def _split_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a sharded model loads a state: whole tensors in it become parts."""
    reshard(module)
    for name, p in module.named_parameters(remove_duplicate=False):
        value = state.get(prefix + name)
        if value is not None and not is_dtensor(value) and value.shape == p.shape:
            state[prefix + name] = _split_like(value, p)


def split_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Before the optimizer of a sharded model loads a state: whole tensors in it become parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    if len(parameters) != len(numbers):
        return state  # which the optimizer refuses, with a reason
    by_number = dict(zip(numbers, parameters, strict=True))
    parts = {
        number: {
            key: _split_like(value, by_number[number])
            if _is_whole(value, by_number[number])
            else value
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}


def _is_whole(value: Any, like: Tensor) -> bool:
    """Whether a value of an optimizer's state goes with a parameter, element by element."""
    return isinstance(value, Tensor) and not is_dtensor(value) and value.shape == like.shape
