"""Training on a real device; skipped where there is none."""

import pytest
import torch
from toy import BLEND, THINKING, make_rows, make_student, make_trainer

from compact_fast.students import LoraSettings, add_lora
from compact_fast.trainer.packing import Packing, choose_packing, mask_wanted
from compact_fast.trainer.segments import attending_by_segments
from compact_fast.trainer.step import Collator, compact_step, direct_body, to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]

WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SEGMENTS, PADDED = Packing("segments", shared=True), Packing()


def gradients(model, rows, packing):
    """(outputs, adapter gradients, concatenated in float64)."""
    inputs = to_device(Collator(tuple(THINKING), 0, packing=packing)(rows), torch.device("cuda"))
    model.zero_grad()
    with attending_by_segments(model):
        out = compact_step(direct_body(model), model, inputs, config=BLEND)
        out.loss.backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.requires_grad]
    return out, torch.cat(grads)


@pytest.mark.parametrize("window", [None, 4])
def test_flash_segments_are_as_near_to_the_truth_as_padded_sequences(window):
    """In bfloat16, against float32 on the same weights."""
    rows = [r for r in make_rows(9) if len(r["teacher_ids"]) > 1]
    changes = {} if window is None else {"use_sliding_window": True, "sliding_window": window,
                                         "max_window_layers": 0}  # fmt: skip
    kind = "llama" if window is None else "qwen2"
    model = add_lora(make_student(kind, **WIDE, **changes), LoraSettings(r=4, dropout=0.0)).cuda()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.to(torch.bfloat16)
    assert mask_wanted(torch.device("cuda"), torch.bfloat16) is None
    assert choose_packing(model).kind == "segments"
    found = {p.kind: gradients(model, rows, p) for p in (SEGMENTS, PADDED)}
    truth, exact = gradients(model.float(), rows, PADDED)
    error = {k: float((g - exact).norm() / exact.norm()) for k, (_, g) in found.items()}
    assert error["segments"] <= 1.5 * error["padded"] + 2.0**-9, error
    off = {k: float((o.nll - truth.nll).abs().max()) for k, (o, _) in found.items()}
    assert off["segments"] <= 2 * off["padded"] + 2.0**-9, off


@pytest.mark.parametrize("lora", [True, False])
def test_training_takes_the_kernels_and_learns(tmp_path, lora):
    trainer = make_trainer(
        tmp_path, model=make_student(lora=lora, **WIDE), max_steps=20, logging_steps=1,
        learning_rate=5e-3, bf16=True, use_cpu=False,
    )  # fmt: skip
    assert trainer._packing.kind == "segments"
    losses = [r["loss"] for r in (trainer.train(), trainer.state.log_history)[1] if "loss" in r]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    assert next(trainer.model.parameters()).is_cuda
