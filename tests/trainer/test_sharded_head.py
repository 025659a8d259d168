"""The public loss takes heads that are spread over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_group import in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from compact_fast import CompactConfig, compact_loss, token_logp
from compact_fast.testing import random_batch

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")

CONFIG = CompactConfig()
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((2,), (Shard(0),)),
    "columns": ((2,), (Shard(1),)),
    "copies": ((2,), (Replicate(),)),
    "copies of rows": ((1, 2), (Replicate(), Shard(0))),
    "rows of rows": ((2, 1), (Shard(0), Shard(0))),
}


def start() -> None:
    dist.init_process_group("gloo")


def step(batch: Any, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Any:
    hidden = batch.hidden.clone().requires_grad_()
    out = compact_loss(
        hidden,
        weight,
        batch.layout,
        consensus=batch.consensus,
        config=CONFIG,
        head_bias=bias,
        **kwargs,
    )
    return out, hidden


@pytest.mark.parametrize("case", PLACEMENTS)
def test_a_head_in_parts_is_as_good_as_a_whole_one(tmp_path: Path, case: str) -> None:
    """97 rows over two processes: parts of unequal size."""
    shape, placements = PLACEMENTS[case]
    batch = random_batch()
    bias_placements = [Replicate() if p == Shard(1) else p for p in placements]

    def work(rank: int) -> Any:
        start()
        mesh = init_device_mesh("cpu", shape)
        weight = nn.Parameter(distribute_tensor(batch.weight, mesh, placements))
        bias = nn.Parameter(distribute_tensor(batch.bias, mesh, bias_placements))
        out, hidden = step(batch, weight, bias)
        out.loss.backward()
        assert weight.grad.placements == weight.placements
        assert bias.grad.placements == bias.placements
        assert weight.grad.to_local().shape == weight.to_local().shape
        logp = token_logp(batch.hidden, weight, batch.layout.targets, head_bias=bias)
        logp.sum().backward()  # a second loss adds to the same gradients
        return {
            "loss": out.loss.detach(),
            "alpha": out.weights,
            "hidden": hidden.grad,
            "weight": weight.grad.full_tensor(),
            "bias": bias.grad.full_tensor(),
            "logp": logp.detach(),
        }

    weight = batch.weight.clone().requires_grad_()
    bias = batch.bias.clone().requires_grad_()
    out, hidden = step(batch, weight, bias)
    out.loss.backward()
    logp = token_logp(batch.hidden, weight, batch.layout.targets, head_bias=bias)
    logp.sum().backward()
    expected = {
        "loss": out.loss.detach(),
        "alpha": out.weights,
        "hidden": hidden.grad,
        "weight": weight.grad,
        "bias": bias.grad,
        "logp": logp.detach(),
    }
    for found in in_processes(tmp_path / "two", 2, work):
        assert isinstance(found, dict), found
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_gradients_of_different_batches_are_averaged(tmp_path: Path) -> None:
    """As FSDP and DDP do: what is divided by the global count and times the processes is exact."""
    batches = [random_batch((3, 1), seed=0), random_batch((4, 2, 2), seed=1)]
    weight = batches[0].weight.clone().requires_grad_()
    for batch in batches:
        step(batch, weight, None, normalizer=5.0)[0].loss.backward()

    def work(rank: int) -> Any:
        start()
        mesh = init_device_mesh("cpu", (2,))
        part = nn.Parameter(distribute_tensor(batches[0].weight, mesh, [Shard(0)]))
        out, _ = step(batches[rank], part, None, normalizer=5.0)
        (out.loss * 2).backward()
        return part.grad.full_tensor()

    for found in in_processes(tmp_path / "two", 2, work):
        torch.testing.assert_close(found, weight.grad, rtol=1e-12, atol=1e-14)


class _Student(nn.Module):
    """Embedding, one layer, and a head that may be the embedding; the loss is outside."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(97, 16, dtype=torch.float64)
        self.layer = nn.Linear(16, 16, dtype=torch.float64)
        self.head = nn.Linear(16, 97, bias=False, dtype=torch.float64)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + torch.tanh(self.layer(self.embed(ids)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_loop_of_ones_own_around_a_sharded_student(
    tmp_path: Path, tied: bool, frozen: bool
) -> None:
    """The head is never called: its weight is given to the loss, gathered by the student or not."""
    batches = [random_batch((3, 1), seed=0), random_batch((4, 2), seed=1)]

    def losses(student: Any, chosen: list[int], share: float) -> list[float]:
        if frozen:
            student.head.weight.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
        found = []
        for _ in range(3):
            total = 0.0
            for i in chosen:
                batch = batches[i]
                hidden = student(batch.layout.targets.clamp(min=0))
                loss = compact_loss(
                    hidden,
                    student.head.weight,
                    batch.layout,
                    consensus=batch.consensus,
                    config=CONFIG,
                    normalizer=4.0,
                ).loss
                (loss * share).backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            found.append(total)
        return found

    def work(rank: int, reshard: bool) -> Any:
        start()
        student = _Student(tied)
        if frozen:
            student.head.weight.requires_grad_(False)
        fully_shard(student.layer)
        fully_shard(student, reshard_after_forward=reshard)
        found = losses(student, [rank], 2.0)
        named = {n: p.full_tensor().detach() for n, p in student.named_parameters()}
        return {"losses": torch.tensor(found), **named}

    alone = _Student(tied)
    expected = torch.tensor(losses(alone, [0, 1], 1.0))
    for reshard in (False, True):
        folder = tmp_path / f"reshard-{reshard}"
        first, second = in_processes(folder, 2, lambda rank, r=reshard: work(rank, r))
        assert isinstance(first, dict), first
        torch.testing.assert_close(first["losses"] + second["losses"], expected)
        for name, p in alone.named_parameters():
            torch.testing.assert_close(first[name], p.detach(), rtol=1e-10, atol=1e-12)


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    batch = random_batch()

    def work(rank: int) -> Any:
        start()
        mesh = init_device_mesh("cpu", (2,))
        said = []
        partial = DTensor.from_local(batch.weight, mesh, [Partial()])
        spread = distribute_tensor(batch.hidden, mesh, [Shard(0)])
        for hidden, weight in ((batch.hidden, partial), (spread, batch.weight)):
            for call in (
                lambda h, w: compact_loss(h, w, batch.layout, config=CONFIG),
                lambda h, w: token_logp(h, w, batch.layout.targets),
            ):
                with pytest.raises(ValueError) as caught:
                    call(hidden, weight)
                said.append(str(caught.value))
        return said

    for found in in_processes(tmp_path / "two", 2, work):
        assert all("lm_head_weight is a DTensor placed as Partial(sum)" in s for s in found[:2])
        assert all("hidden is a DTensor; give the rows" in s for s in found[2:]), found
