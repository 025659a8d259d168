"""Memory for what is kept: nothing overlaps, nothing is lost, chunks are used again."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch

from compact_fast.lean.kept import ALIGNED, MOST_BYTES, Kept, keep, keep_gradient, settle

MEGABYTE = 1 << 20


def test_tensors_do_not_overlap_and_keep_what_was_written():
    kept, torch_rng = Kept(), torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 500_000, (60,), generator=torch_rng).tolist()
    tensors = [kept.empty((n,), torch.float32).fill_(i) for i, n in enumerate(sizes)]
    for i, t in enumerate(tensors):
        assert (t == i).all(), i
        assert t.data_ptr() % ALIGNED == 0
        assert kept.holds(t)
    taken = sum(map(len, kept._all))
    assert sum(sizes) * 4 <= taken <= 2 * sum(sizes) * 4  # as much again as there was
    assert max(map(len, kept._all)) <= MOST_BYTES


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (2, 0, 5)])
def test_shapes_are_contiguous(shape):
    t = Kept().empty(shape, torch.float64)
    assert t.shape == shape
    assert t.is_contiguous()


def test_a_chunk_is_used_again_once_its_tensors_are_gone():
    kept = Kept()
    for _ in range(20):
        tensors = [kept.empty((MEGABYTE,), torch.float32) for _ in range(10)]  # 40 MiB
        del tensors
    assert sum(map(len, kept._all)) <= 2 * 40 * MEGABYTE
    one = kept.empty((MEGABYTE,), torch.float32).fill_(7)
    for _ in range(50):
        kept.empty((MEGABYTE,), torch.float32).fill_(1)
    assert (one == 7).all()  # a view of it would keep the chunk, too
    view = one[5:9]
    del one
    gc.collect()
    for _ in range(50):
        kept.empty((MEGABYTE,), torch.float32).fill_(2)
    assert view.tolist() == [7, 7, 7, 7]


def test_a_tensor_larger_than_a_chunk_has_one_of_its_own():
    kept = Kept()
    t = kept.empty((MOST_BYTES // 4 + 3,), torch.float32).fill_(1)
    assert kept.empty((3,), torch.float32).data_ptr() != t.data_ptr()
    assert float(t.sum()) == t.numel()


def test_memory_is_given_back_once_nothing_is_left():
    kept = Kept()
    a = kept.empty((MEGABYTE,), torch.float32)
    b = [kept.empty((MEGABYTE,), torch.float32) for _ in range(20)]
    assert sum(map(len, kept._all)) >= 84 * MEGABYTE
    del b
    kept.give_back()
    assert len(kept._all) == 1
    assert kept.holds(a)
    del a
    kept.give_back()
    assert kept._all == kept._addresses == []
    assert kept.empty((2,), torch.float32).fill_(1).tolist() == [1, 1]


def test_threads_do_not_share_chunks():
    kept, found = Kept(), []

    def work(i: int) -> None:
        mine = [kept.empty((1000,), torch.float32).fill_(i) for _ in range(200)]
        found.append(all(bool((t == i).all()) for t in mine))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] * 4
    assert kept._all == []  # this thread's


def test_changes_in_place_count_for_one_tensor_alone():
    kept = Kept()
    a, b = kept.empty((3,), torch.float32).zero_(), kept.empty((3,), torch.float32)
    x = torch.ones(3, requires_grad=True)
    loss = (x * a).sum()  # keeps a
    b.fill_(5)
    loss.backward()
    assert torch.equal(x.grad, a)


def test_what_lies_there_is_not_copied_again():
    x = torch.randn(4, 5)
    kept = keep(x)
    again = keep(kept.view(2, 10))
    assert kept.data_ptr() != x.data_ptr()
    assert again.data_ptr() == kept.data_ptr()
    assert torch.equal(again, x.view(2, 10))


def test_settling_is_the_identity_with_its_gradient():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for recomputed in (True, False):
        assert torch.equal(settle(x, recomputed=recomputed), x)
        assert torch.autograd.gradcheck(lambda t, r=recomputed: settle(t, recomputed=r), (x,))


def test_a_transposed_gradient_becomes_contiguous():
    g = torch.randn(3, 4).T
    assert keep_gradient(g).is_contiguous()
    assert torch.equal(keep_gradient(g), g)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_its_own():
    kept = Kept()
    t = kept.empty((4,), torch.float32).fill_(1)
    child = os.fork()
    if child == 0:
        t.fill_(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert t.tolist() == [1, 1, 1, 1]
