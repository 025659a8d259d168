"""From the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def send(tensors: Mapping[str, Tensor | None], device: torch.device) -> dict[str, Any]:
    """Tensors on the CPU, of any dtype, to the device: one pinned buffer, one copy. None stays.

    A copy from memory that is not pinned would wait for the stream.
    """
    places: dict[str, slice] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor is not None:
            places[name] = slice(end, end + tensor.numel() * tensor.element_size())
            end = -(-places[name].stop // 16) * 16
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def part(buffer: Tensor, name: str, like: Tensor) -> Tensor:
        return buffer[places[name]].view(like.dtype).view(like.shape)

    for name, tensor in tensors.items():
        if tensor is not None:
            part(packed, name, tensor).copy_(tensor)
    there = packed.to(device, non_blocking=True)
    return {n: None if t is None else part(there, n, t) for n, t in tensors.items()}
