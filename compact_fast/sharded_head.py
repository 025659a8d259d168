"""Heads that are DTensors, as FSDP and tensor parallelism leave them: gathered for the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is spread over processes; without the import of DTensor, which is slow."""
    return type(value) not in (Tensor, nn.Parameter) and hasattr(value, "device_mesh")


def whole(name: str, value: Tensor) -> Tensor:
    """The whole of a head's weight or bias; plain tensors as they are.

    All processes of its mesh must call it. Gradients come back as a DTensor with the placements of
    `value`: the MEAN over the mesh's processes, as FSDP and DDP reduce theirs.
    Raises ValueError for placements other than Shard and Replicate.
    """
    if not is_dtensor(value):
        return value
    from torch.distributed.tensor import Replicate, Shard

    part: Any = value
    for placement in part.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"{name} is a DTensor placed as {placement!r}; only Shard and Replicate are "
                f"supported: redistribute it, or give {name}.full_tensor()"
            )
    gathered: Tensor = _Gather.apply(part)  # type: ignore[no-untyped-call]
    return gathered


def refuse_parts(name: str, value: Tensor) -> None:
    """ValueError where a tensor that belongs to one process is a DTensor."""
    if is_dtensor(value):
        raise ValueError(
            f"{name} is a DTensor; give the rows that this process has read, {name}.to_local(), "
            "with their own layout"
        )


class _Gather(torch.autograd.Function):
    """All-gather forward; backward the mean of the processes' gradients, each its own part."""

    @staticmethod
    def forward(ctx: Any, part: Any) -> Tensor:
        ctx.mesh, ctx.placements = part.device_mesh, part.placements
        gathered: Tensor = part.full_tensor()
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        share = grads[0] / ctx.mesh.size()
        total = DTensor.from_local(share, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return total.redistribute(placements=ctx.placements)
