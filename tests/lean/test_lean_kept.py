"""Memory for what is kept: nothing overlaps, nothing is lost, chunks are used again."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fast.chunks import Chunks
from compact_fast.lean import kept as kept_module
from compact_fast.lean import make_lean
from compact_fast.lean.kept import (
    ALIGNED,
    MOST_BYTES,
    Kept,
    give_back,
    keep,
    keep_gradient,
    settle,
)

MEGABYTE = 1 << 20


def test_tensors_do_not_overlap_and_keep_what_was_written():
    chunks, torch_rng = Chunks(), torch.Generator().manual_seed(0)
    kept = Kept(chunks)
    sizes = torch.randint(1, 500_000, (60,), generator=torch_rng).tolist()
    tensors = [kept.empty((n,), torch.float32).fill_(i) for i, n in enumerate(sizes)]
    for i, t in enumerate(tensors):
        assert (t == i).all(), i
        assert t.data_ptr() % ALIGNED == 0
        assert t in chunks
    taken = chunks.size
    assert sum(sizes) * 4 <= taken <= 2 * sum(sizes) * 4  # as much again as there was
    assert max(len(c.memory) for c in chunks.all) <= MOST_BYTES


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (2, 0, 5)])
def test_shapes_are_contiguous(shape):
    t = Kept(Chunks()).empty(shape, torch.float64)
    assert t.shape == shape
    assert t.is_contiguous()


def test_a_chunk_is_used_again_once_its_tensors_are_gone():
    chunks = Chunks()
    kept = Kept(chunks)
    for _ in range(20):
        tensors = [kept.empty((MEGABYTE,), torch.float32) for _ in range(10)]  # 40 MiB
        del tensors
    assert chunks.size <= 2 * 40 * MEGABYTE
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


def test_a_chunk_in_which_nothing_is_left_begins_anew():
    chunks = Chunks()
    kept = Kept(chunks)
    kept.rewind()  # none at hand yet
    first = kept.empty((1000,), torch.float32).fill_(3)
    address = first.data_ptr()
    kept.rewind()
    second = kept.empty((1000,), torch.float32).fill_(4)
    assert (first == 3).all()
    view = second[5:9]
    del first, second
    kept.rewind()  # a view is left
    assert kept.empty((1000,), torch.float32).data_ptr() > view.data_ptr()
    del view
    kept.rewind()
    assert kept.empty((1000,), torch.float32).data_ptr() == address


def test_layers_that_are_made_again_need_the_memory_of_one():
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=256, num_hidden_layers=16,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    make_lean(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.ones(1, 1000, dtype=torch.long)
    give_back()
    before = kept_module._CHUNKS.reach
    model.train()(input_ids=ids).logits.sum().backward()
    layer = 1000 * (7 * 64 + 2 * 256) * 4
    inputs = 17 * 1000 * 64 * 4
    gradients = sum(p.nbytes for p in model.parameters())
    assert kept_module._CHUNKS.reach - before < inputs + gradients + 2 * layer


def test_a_tensor_larger_than_a_chunk_has_one_of_its_own():
    chunks = Chunks()
    kept = Kept(chunks)
    t = kept.empty((MOST_BYTES // 4 + 3,), torch.float32).fill_(1)
    assert kept.empty((3,), torch.float32).data_ptr() != t.data_ptr()
    assert float(t.sum()) == t.numel()


def test_memory_is_given_back_once_nothing_is_left():
    chunks = Chunks()
    kept = Kept(chunks)
    a = kept.empty((MEGABYTE,), torch.float32)
    b = [kept.empty((MEGABYTE,), torch.float32) for _ in range(20)]
    assert chunks.size >= 84 * MEGABYTE
    del b
    kept.close()
    chunks.give_back()
    assert len(chunks.all) == 1
    assert a in chunks
    del a
    chunks.give_back()
    assert chunks.all == []
    assert kept.empty((2,), torch.float32).fill_(1).tolist() == [1, 1]


@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_lengths_that_change_do_not_leave_chunks_behind(order):
    chunks, rng = Chunks(), torch.Generator().manual_seed(0)
    kept = Kept(chunks)
    tokens = torch.randint(500, 4000, (40,), generator=rng).sort(descending=order == "falling")[0]
    if order == "shuffled":
        tokens = tokens[torch.randperm(40, generator=rng)]
    most = held = 0
    for n in tokens.tolist():  # a large model's layers: tensors larger than a chunk, and small ones
        live = [kept.empty((n, w), torch.float32) for _ in range(4) for w in (896, 128, 4864, 4864)]
        most, held = max(most, sum(t.nbytes for t in live)), max(held, chunks.size)
        del live
    assert held < 1.35 * most


def test_threads_do_not_share_chunks():
    chunks, found = Chunks(), []
    kept = Kept(chunks)

    def work(i: int) -> None:
        mine = [kept.empty((1000,), torch.float32).fill_(i) for _ in range(200)]
        found.append(all(bool((t == i).all()) for t in mine))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [True] * 4
    assert chunks.all == []  # this thread's


def test_changes_in_place_count_for_one_tensor_alone():
    chunks = Chunks()
    kept = Kept(chunks)
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
    chunks = Chunks()
    kept = Kept(chunks)
    t = kept.empty((4,), torch.float32).fill_(1)
    child = os.fork()
    if child == 0:
        t.fill_(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert t.tolist() == [1, 1, 1, 1]
