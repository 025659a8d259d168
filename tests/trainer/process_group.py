"""Work done by several processes of one group on this machine, forked from the test's own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Work = Callable[[int], Any]  # rank -> tensors, numbers or text


def _child(rank: int, world: int, port: int, outcome: Path, work: Work) -> None:
    from accelerate.state import AcceleratorState

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # else accelerate would share out the cores, and wait for threads that were not forked
        OMP_NUM_THREADS="1",
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        found: Any = work(rank)
    except Exception as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    torch.save(found, outcome)
    os._exit(0)  # forked: nothing of the parent's is ours to clean up


def in_processes(folder: Path, world: int, work: Work, *, seconds: float = 60) -> list[Any]:
    """What `work(rank)` returned in each process, its error as text, or None where it was killed.

    `folder` names the run; what the processes return lies beside it.
    """
    torch.set_num_threads(1)  # a fork has no use for threads it does not inherit
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    paths = [folder.with_name(f"{folder.name}-rank{rank}.pt") for rank in range(world)]
    children = [
        fork.Process(target=_child, args=(rank, world, port, paths[rank], work))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(seconds)
        if child.is_alive():
            for each in children:
                each.kill()
            pytest.fail("a process hangs")
    return [torch.load(path) if path.exists() else None for path in paths]
