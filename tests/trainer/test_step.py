"""The trainer's loss and gradients, by every way of reading a batch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import (
    BLEND,
    CAP,
    SCALE,
    STUDENTS,
    THINKING,
    make_rows,
    make_student,
    make_trainer,
    metrics,
    trained,
    untimed,
)

from compact_fast.config import CompactConfig
from compact_fast.loss import compact_loss
from compact_fast.reference import attention_consensus
from compact_fast.students import causal_model
from compact_fast.trainer.step import Collator


@pytest.mark.parametrize(
    "config",
    [
        BLEND,
        CompactConfig(),
        CompactConfig(mode="paper"),
        CompactConfig(mode="reference"),
        CompactConfig(consensus="both", mi="logprob", filter_below=0.0),
        CompactConfig(weighting="uniform", consistency="off"),
    ],
    ids=lambda c: f"{c.mode}-{c.weighting}-{c.consensus}",
)
@pytest.mark.parametrize("kind", STUDENTS)
def test_the_first_loss_and_gradient_are_those_of_the_formulas(
    tmp_path: Path, config: CompactConfig, kind: str
) -> None:
    rows = make_rows(4)
    model = make_student(kind)
    reference = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model, rows, config=config)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, out = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()

    # By hand: padded forward with a mask, all positions; the reference loss in float64.
    reference.double()
    places = [int(i[1:]) for i in batch["ids"]]
    collator = Collator(tuple(THINKING), 0, keep_padding=config.mode == "reference")
    inputs = collator([rows[i] for i in places])
    hidden = reference.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    packed = hidden.reshape(-1, 16)[inputs["gather"]]
    layout = inputs["layout"]
    attention = None
    if config.consensus in ("attention", "both"):
        last = packed.detach()[layout.last_real]
        layer = reference.model.layers[-1].self_attn
        attention = attention_consensus(
            layer.q_proj(last),
            layer.k_proj(last),
            layout.cu_teachers,
            num_heads=4,
            num_kv_heads=2,
            gqa=config.attention_gqa,
        )
    expected = compact_loss(
        packed * (SCALE if kind == "granite" else 1.0),
        reference.lm_head.weight,
        layout,
        consensus=inputs["consensus"],
        attention=attention,
        config=config,
        backend="reference",
        softcap=CAP if kind == "gemma2" else 0.0,
    )
    expected.loss.backward()
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        out.weights.double(), expected.weights.double(), rtol=1e-3, atol=1e-4
    )
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_students_own_head_is_never_called(tmp_path: Path) -> None:
    model = make_student(tie_word_embeddings=False)
    trainer = make_trainer(tmp_path, model, eval_rows=make_rows(2, seed=5), eval_strategy="epoch")

    def refuse(*args: Any) -> None:
        raise AssertionError("the head was called")

    model.lm_head.register_forward_hook(refuse)
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)


def test_pvi_takes_one_more_short_sequence_a_question(tmp_path: Path) -> None:
    rows = make_rows(2)
    config = CompactConfig(mi="pvi", filter_below=0.0)
    model = make_student()
    trainer = make_trainer(tmp_path, model, rows, config=config)
    batch = next(iter(trainer.get_train_dataloader()))
    _, out = trainer.compute_loss(model, batch, return_outputs=True)
    row = rows[int(batch["ids"][0][1:])]
    P, G = len(row["prompt_ids"]), len(row["gold_ids"])

    def logp(ids: list[int], first: int) -> float:
        with torch.no_grad():
            every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(every[t - 1, ids[t]] for t in range(first, first + G)))

    prior = logp(row["prompt_ids"] + row["prior_completion_ids"], P)
    ids, first = row["prompt_ids"] + row["completion_ids"][0], row["answer_spans"][0][0]
    assert float(out.mi[0]) == pytest.approx(logp(ids, first) - prior, abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_accumulation_equals_one_large_batch(tmp_path: Path, lora: bool) -> None:
    """Uneven K and lengths, 12 questions in 8s and a short last step: any wrong weight shows."""
    results = []
    for name, batch, steps in (("8x1", 8, 1), ("1x8", 1, 8), ("2x4", 2, 4)):
        trainer = make_trainer(
            tmp_path / name,
            make_student(lora=lora),
            config=BLEND,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            logging_steps=1,
            optim="sgd",
            learning_rate=0.5,
        )
        results.append((trained(trainer), metrics(tmp_path / name)))
    (one, rows), *others = results
    start = dict(make_student(lora=lora).named_parameters())
    assert any(not torch.equal(one[n], start[n]) for n in one)
    for other, other_rows in others:
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
        for a, b in zip(rows, other_rows, strict=True):
            for key in untimed(a).keys() - {"epoch"}:  # the host's, off for a short last step
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_passes_by_a_budget_of_tokens_weigh_questions_alike(tmp_path: Path) -> None:
    """One step an epoch, in passes of very different numbers of questions, or in a single pass."""
    results, passes = [], []
    for name, reading in (
        ("all", {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}),
        ("some", {"max_tokens_per_step": 45, "gradient_accumulation_steps": 50}),
        ("each", {"max_tokens_per_step": 1, "gradient_accumulation_steps": 50}),
    ):
        trainer = make_trainer(
            tmp_path / name,
            config=BLEND,
            logging_steps=1,
            optim="sgd",
            learning_rate=0.5,
            **reading,
        )
        passes.append([len(batch["ids"]) for batch in trainer.get_train_dataloader()])
        results.append((trained(trainer), metrics(tmp_path / name)))
    assert passes[0] == [12]
    assert len(set(passes[1])) > 1
    assert passes[2] == [1] * 12
    (one, rows), *others = results
    for other, other_rows in others:
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
        for a, b in zip(rows, other_rows, strict=True):
            for key in untimed(a):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_a_question_above_the_budget_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, max_tokens_per_step=20).get_train_dataloader()
    assert "max_tokens_per_step=20: 7 of 12 questions are longer" in caplog.text
    with pytest.raises(ValueError, match="max_tokens_per_step=0: expected at least 1"):
        make_trainer(tmp_path, max_tokens_per_step=0)


def test_workers_read_the_same_batches(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "a").get_train_dataloader()
    read = make_trainer(tmp_path / "b", dataloader_num_workers=2).get_train_dataloader()
    for epoch in (0, 1):
        plain.set_epoch(epoch)
        read.set_epoch(epoch)
        for a, b in zip(plain, read, strict=True):
            assert a["ids"] == b["ids"]
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert torch.equal(a["layout"].targets, b["layout"].targets)


def test_what_sharing_saves_is_reported(tmp_path: Path) -> None:
    rows = make_rows()
    trainer = make_trainer(tmp_path, rows=rows, max_steps=1)
    trainer.train()
    found = json.loads((tmp_path / "run.json").read_text())["reading"]
    tokens = sum(len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"])
    saved = sum(len(r["prompt_ids"]) * (len(r["completion_ids"]) - 1) for r in rows)
    assert found == {
        "packing": "segments",
        "shared_prompts": True,
        "reason": None,
        "tokens": tokens,
        "tokens_saved": saved,
        "text": f"prompts read once for all rationales of a question: {saved} of {tokens} tokens "
        f"of 12 questions saved ({saved / tokens:.1%})",
    }
    apart = make_trainer(tmp_path / "b", share_prompts=False).reading
    assert apart["tokens_saved"] == 0
    assert "behind its own prompt, packed without padding" in apart["text"]


def test_one_rationale_at_a_time_claims_no_shared_prompts(tmp_path: Path) -> None:
    rows = make_rows()
    make_trainer(tmp_path, rows=rows, max_steps=1, fusion="per_teacher").train()
    found = json.loads((tmp_path / "run.json").read_text())["reading"]
    assert (found["packing"], found["shared_prompts"], found["tokens_saved"]) == ("alone", False, 0)
    assert found["tokens"] == sum(
        len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"]
    )
    assert "one rationale at a time" in found["text"]
    assert "per_teacher" in found["reason"]


def test_a_single_teacher_trains_like_plain_fine_tuning(tmp_path: Path) -> None:
    rows = [r for r in make_rows(24) if len(r["teacher_ids"]) == 1][:4]
    model, plain = make_student(), make_student()
    trainer = make_trainer(
        tmp_path,
        model,
        rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
    )
    trainer.train()
    losses = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][0]])
        labels = ids.clone()
        labels[:, : len(row["prompt_ids"])] = -100
        losses.append(plain(input_ids=ids, labels=labels).loss)
    torch.stack(losses).mean().backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other - 0.5 * other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, lora: bool) -> None:
    plain = trained(make_trainer(tmp_path / "a", make_student(lora=lora), max_steps=3))
    trainer = make_trainer(
        tmp_path / "b", make_student(lora=lora), max_steps=3, gradient_checkpointing=True
    )
    calls = []
    layer = causal_model(trainer.model).model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *a: calls.append(1))
    checkpointed = trained(trainer)
    assert len(calls) == 2 * 6  # each of the 6 forward passes is made again in the backward pass
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-5, atol=1e-7)


@pytest.mark.nightly
@pytest.mark.parametrize("lora", [False, True])
def test_a_compiled_body_is_one_graph_and_trains_alike(tmp_path: Path, lora: bool) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    common: dict[str, Any] = {"config": BLEND, "max_steps": 4, "eval_rows": make_rows(3)}
    common["eval_strategy"] = "epoch"
    plain = trained(make_trainer(tmp_path / "a", make_student(lora=lora), **common))
    trainer = make_trainer(tmp_path / "b", make_student(lora=lora), compile_body=True, **common)
    compiled = trained(trainer)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for name in plain:
        torch.testing.assert_close(plain[name], compiled[name], rtol=1e-4, atol=1e-5)
    assert causal_model(trainer.model).base_model._compiled_call_impl is None


def test_a_frozen_base_makes_no_weight_gradients(tmp_path: Path) -> None:
    """LoRA: no product of the backward pass is of a frozen weight's shape."""
    model = make_student(lora=True)
    trainer = make_trainer(tmp_path, model)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.profiler.profile(record_shapes=True) as trace:
        trainer.compute_loss(model, batch).backward()
    assert all((p.grad is not None) is p.requires_grad for p in model.parameters())
    frozen = {tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.dim() == 2}
    N = batch["input_ids"].numel()
    made = [
        (a[0], b[1])
        for event in trace.events()
        if event.name == "aten::mm" and len(event.input_shapes) > 1
        for a, b in [event.input_shapes[:2]]
        if len(a) == len(b) == 2 and a[1] == N
    ]
    assert made  # the adapters' own
    assert not frozen & ({*made} | {(b, a) for a, b in made})


def test_what_does_not_go_with_compilation_is_refused(tmp_path: Path) -> None:
    for changes in ({"gradient_checkpointing": True}, {"config": CompactConfig(mi="pvi")}):
        with pytest.raises(ValueError, match="compile_body=True: not together with"):
            make_trainer(tmp_path, compile_body=True, **changes)
    with pytest.raises(ValueError, match=r"compile_body=True: needs prompts shared .*is off"):
        make_trainer(tmp_path, compile_body=True, share_prompts=False)


def test_with_an_adapter_only_the_adapter_moves(tmp_path: Path) -> None:
    model = make_student(lora=True)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    end = trained(make_trainer(tmp_path, model))
    moved = {n for n in start if not torch.equal(start[n], end[n])}
    assert moved == {n for n in start if "lora_" in n}


def test_bf16_autocast_trains_close_to_fp32(tmp_path: Path) -> None:
    full = make_trainer(tmp_path / "a", max_steps=4, logging_steps=1)
    half = make_trainer(tmp_path / "b", max_steps=4, logging_steps=1, bf16=True)
    trained(full)
    weights = trained(half)
    assert all(p.dtype == torch.float32 for p in weights.values())
    losses = [[row["loss"] for row in metrics(tmp_path / x)] for x in "ab"]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_bf16_weights_train(tmp_path: Path) -> None:
    model = make_student().to(torch.bfloat16)
    end = trained(make_trainer(tmp_path, model, max_steps=2))
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in end.values())
