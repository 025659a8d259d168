import pytest
import torch

from compact_fast import TokenLayout
from compact_fast.testing import random_batch


def small(**change):
    fields = {
        "targets": torch.tensor([-100, 4, 5, -100, 6, -100]),
        "cu_seqlens": torch.tensor([0, 4, 6]),
        "cu_teachers": torch.tensor([0, 2]),
    }
    return TokenLayout(**{**fields, **change})


def test_derived_vectors():
    layout = small()
    assert layout.token_sequence.tolist() == [0, 0, 0, 0, 1, 1]
    assert layout.token_index.tolist() == [0, 1, 2, 3, 0, 1]
    assert layout.label_counts.tolist() == [2, 1]
    # the token read at t is the assistant's if the position before it had a label
    assert layout.assistant_mask.tolist() == [False, False, True, True, False, True]
    assert layout.teachers.tolist() == [0, 1]
    assert layout.last_real.tolist() == [3, 5]


def test_from_padded_shifts_labels_and_knows_padding():
    ids = torch.tensor([[7, 8, 9, 0], [7, 8, 9, 5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, 8, 9, -100], [-100, -100, 9, 5]])
    layout = TokenLayout.from_padded(ids, mask, labels, [0, 2], thinking_ids=[9])
    assert layout.targets.tolist() == [8, 9, -100, -100, -100, 9, 5, -100]
    assert layout.last_real.tolist() == [2, 7]
    assert layout.thinking.tolist() == [False, False, True, False, False, False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 5])}, r"cu_seqlens: offsets must rise from 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 7, 6])}, r"cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 0, 6])}, r"sequence 0 is empty"),
        ({"cu_teachers": torch.tensor([0, 0, 2])}, r"question 0 is empty"),
        ({"cu_teachers": torch.tensor([0, 3])}, r"cu_teachers"),
        ({"targets": torch.tensor([-1, 4, 5, -100, 6, -100])}, r"targets\[0\] = -1"),
        ({"targets": torch.zeros(6)}, r"targets: expected int64, got torch.float32"),
        ({"answer_spans": torch.tensor([[0, 5], [4, 5]])}, r"answer_spans\[0\] = \[0, 5\]"),
        ({"answer_spans": torch.tensor([[0, 1]])}, r"answer_spans: expected shape \(2, 2\)"),
        ({"gold_ids": torch.tensor([1])}, r"gold_ids and layout.cu_gold"),
        ({"thinking": torch.zeros(6)}, r"thinking: expected bool"),
        ({"real": torch.tensor([0, 0, 0, 0, 1, 1]).bool()}, r"sequence 0 has no real token"),
        ({"correct": torch.tensor([1])}, r"correct: expected shape \(2,\)"),
    ],
)
def test_contradictions_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_select_questions_keeps_every_field_in_step():
    batch = random_batch(seed=3)
    layout = batch.layout
    order = [2, 0, 3]
    cut = layout.select_questions(order)
    again = cut.select_questions([1, 0, 2])  # back to 0, 2, 3
    direct = layout.select_questions([0, 2, 3])
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, direct.tensors()[name]), name
    tokens = layout.question_positions(order)
    assert torch.equal(cut.targets, layout.targets[tokens])
    stated = cut.answer_spans[:, 1] > cut.answer_spans[:, 0]
    for s in stated.nonzero().flatten().tolist():
        a, b = cut.answer_spans[s].tolist()
        assert cut.cu_seqlens[s] <= a < b <= cut.cu_seqlens[s + 1]
        assert (cut.token_sequence[a:b] == s).all()


def test_a_moved_layout_remembers_where_it_came_from():
    """So that a step on a device can read it without waiting."""
    layout = small()
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert moved.on_host is layout
    assert moved.to("cpu") is layout
    assert layout.on_host is layout
