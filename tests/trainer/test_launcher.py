"""Processes leave their group before they end."""

import torch.distributed as dist

from compact_fast.trainer.launcher import leave


def test_a_process_leaves_its_group_and_may_do_so_without_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    leave()
    assert not dist.is_initialized()
    leave()
