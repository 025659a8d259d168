from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import TEACHERS, THINKING, make_rows, make_student, make_trainer
from transformers import TrainerCallback

from compact_fast.config import CompactConfig
from compact_fast.loss import compact_loss
from compact_fast.reference import attention_consensus
from compact_fast.students import body_and_head, causal_model
from compact_fast.trainer import CompactTrainingArguments, NonFiniteError
from compact_fast.trainer.step import Collator

# A method whose weights depend on everything, without a filter that leaves one teacher alone.
BLEND = CompactConfig(filter_below=0.0)


def trained(trainer: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    trainer.train(**kwargs)
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    timed = ("time", "runtime", "per_second")
    return {k: v for k, v in row.items() if not any(word in k for word in timed)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Seen(TrainerCallback):
    """Keeps every logged row, as an experiment tracker would get it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append(dict(logs))


# ---- the loss --------------------------------------------------------------------------------


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
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
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
        packed,
        reference.lm_head.weight,
        layout,
        consensus=inputs["consensus"],
        attention=attention,
        config=config,
        backend="reference",
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


# ---- repeatability ---------------------------------------------------------------------------


def stochastic(lora: bool = False) -> Any:
    return make_student(attention_dropout=0.3, lora=lora)


@pytest.mark.parametrize(
    "config", [BLEND, CompactConfig(weighting="random")], ids=["blend", "random"]
)
def test_the_same_seed_gives_the_same_bits(tmp_path: Path, config: CompactConfig) -> None:
    first = trained(make_trainer(tmp_path / "a", stochastic(), config=config))
    second = trained(make_trainer(tmp_path / "b", stochastic(), config=config))
    assert same(first, second)
    rows = [[untimed(r) for r in metrics(tmp_path / x)] for x in "ab"]
    assert rows[0] == rows[1]
    other = trained(make_trainer(tmp_path / "c", stochastic(), config=config, seed=7))
    assert not same(first, other)


def test_what_runs_before_training_does_not_matter(tmp_path: Path) -> None:
    first = trained(make_trainer(tmp_path / "a", stochastic()))
    trainer = make_trainer(tmp_path / "b", stochastic())
    torch.rand(100)
    assert same(first, trained(trainer))


@pytest.mark.parametrize(
    ("lora", "reading"),
    [
        (False, {}),
        (True, {}),
        (False, {"max_tokens_per_step": 45}),
        (False, {"max_tokens_per_step": 45, "dataloader_num_workers": 2}),
    ],
    ids=["full", "lora", "budget", "workers"],
)
def test_a_resumed_run_ends_in_the_same_bits(
    tmp_path: Path, lora: bool, reading: dict[str, Any]
) -> None:
    """Stopped at step 4, in the second epoch and inside a logging window of 3 steps."""
    settings: dict[str, Any] = {
        **reading,
        "config": BLEND,
        "eval_rows": make_rows(3, seed=9),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_train_epochs": 4,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "lr_scheduler_type": "cosine",
    }

    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = make_trainer(tmp_path / "a", stochastic(lora), **settings)
    expected = trained(whole)
    first = make_trainer(tmp_path / "b", stochastic(lora), **settings)
    first.add_callback(StopAt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert run["status"] == "stopped: KeyboardInterrupt"
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:  # as a kill may leave it
        file.write('{"step": 5, "time": 1.0, "loss": 3.0}\n{"step": 6, "ti')

    second = make_trainer(tmp_path / "b", stochastic(lora), **settings)
    assert same(expected, trained(second, resume_from_checkpoint="auto"))
    rows = [[untimed(r) for r in metrics(tmp_path / x)] for x in "ab"]
    assert rows[0] == rows[1]
    times = [row["time"] for row in metrics(tmp_path / "b")]
    assert times == sorted(times)
    # The closing summary's mean loss is of the steps of one process.
    histories = [t.state.log_history[:-1] for t in (whole, second)]
    assert histories[0] == histories[1]
    run = json.loads((tmp_path / "b" / "run.json").read_text())
    assert run["status"] == "finished"
    assert [r["step"] for r in run["resumed"]] == [4]


# ---- stops -----------------------------------------------------------------------------------


def poison(trainer: Any, question: str, teacher: int | None) -> None:
    """From step 2 on, NaN activations for one rationale of a question (None: for all)."""
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        layout, ids = inputs["layout"], inputs["ids"]
        if question not in ids or trainer.state.global_step < 1:
            return inner(model, inputs, **kwargs)
        bad = layout.sequence_question == ids.index(question)
        if teacher is not None:
            bad &= layout.teachers == teacher
        factor = torch.ones(inputs["input_ids"].shape)
        read = bad[layout.token_sequence] & layout.assistant_mask
        factor.view(-1)[inputs["gather"][read]] = torch.nan
        factor = factor[..., None]
        embedding = causal_model(model).get_input_embeddings()
        hook = embedding.register_forward_hook(lambda m, a, out: out * factor)
        try:
            return inner(model, inputs, **kwargs)
        finally:
            hook.remove()

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize("teacher", [1, None])
def test_a_non_finite_number_stops_the_run_before_the_update(
    tmp_path: Path, teacher: int | None
) -> None:
    rows = make_rows()
    model = make_student()
    trainer = make_trainer(tmp_path, model, rows, config=BLEND, logging_steps=1)
    poison(trainer, "q3", teacher)  # q3 has all three teachers
    snapshots = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            snapshots[state.global_step] = copy.deepcopy(model.state_dict())

    trainer.add_callback(Keep())
    with pytest.raises(NonFiniteError, match="The update was not made") as caught:
        trainer.train()
    error = caught.value
    assert error.question == "q3"
    assert error.teacher == TEACHERS[teacher or 0]
    assert f"step {error.step}: " in str(error)
    assert repr(error.question) in str(error)
    assert error.step == trainer.state.global_step + 1
    assert error.step - 1 in snapshots
    assert all(p.isfinite().all() for p in model.state_dict().values())
    assert same(snapshots[error.step - 1], model.state_dict())
    assert [r["step"] for r in metrics(tmp_path)] == list(range(1, error.step))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"].startswith(f"stopped: step {error.step}")


def test_a_gradient_alone_can_stop_the_run(tmp_path: Path) -> None:
    model = make_student()
    trainer = make_trainer(tmp_path, model, max_steps=3)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda g: torch.full_like(g, torch.inf))
    before = weight.detach().clone()
    with pytest.raises(
        NonFiniteError, match=r"step 1: the gradient norm is .*every score is finite"
    ):
        trainer.train()
    assert torch.equal(weight, before)


def test_waiting_for_the_update_keeps_no_gradients(tmp_path: Path) -> None:
    """What is kept of a step's micro-batches must not hold their graphs, and gradients in them."""
    trainer = make_trainer(tmp_path)
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    [(kept, _, _)] = trainer._guard._pending
    assert kept.loss.grad_fn is None


def test_a_step_of_which_nothing_is_left_stops_the_run(tmp_path: Path) -> None:
    """No loss and no gradient is non-finite when every question is skipped; it is useless."""
    rows = make_rows(4)
    for row in rows:
        row["consensus"] = [float("nan")] * len(row["consensus"])
    trainer = make_trainer(tmp_path, make_student(), rows, config=BLEND)
    with pytest.raises(NonFiniteError, match="every question's scores are not finite"):
        trainer.train()


def test_a_single_lost_score_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[0]["consensus"][0] = float("nan")
    rows[3]["consensus"] = [float("nan")] * 3
    trainer = make_trainer(
        tmp_path, make_student(), rows, config=BLEND, max_steps=1, logging_steps=1
    )
    trainer.train()
    row = metrics(tmp_path)[0]
    assert row["skipped_questions"] == 1
    assert row["teacher/ann/nonfinite"] == 2
    assert row["teacher/bob/nonfinite"] == 1


# ---- logs ------------------------------------------------------------------------------------


def test_a_log_row_is_the_mean_over_all_its_micro_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config=BLEND, logging_steps=3, max_steps=3)
    outputs = []
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        loss, out = inner(model, inputs, **{**kwargs, "return_outputs": True})
        outputs.append((out, inputs["layout"]))
        return loss

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    assert len(outputs) == 6
    row = metrics(tmp_path)[0]
    assert row["step"] == 3

    def every(name: str) -> torch.Tensor:
        return torch.cat([getattr(out, name) for out, _ in outputs]).double()

    teachers = torch.cat([layout.teachers for _, layout in outputs])
    correct = torch.cat([layout.correct for _, layout in outputs])
    for k, name in enumerate(TEACHERS):
        for key, field in (
            *(("weight", "weights"), ("nll", "nll"), ("mi", "mi")),
            *(("consensus", "consensus"), ("filtered", "filtered")),
        ):
            expected = float(every(field)[teachers == k].mean())
            assert row[f"teacher/{name}/{key}"] == pytest.approx(expected, rel=1e-6), (name, key)
    assert row["weight/right"] == pytest.approx(float(every("weights")[correct == 1].mean()))
    assert row["weight/wrong"] == pytest.approx(float(every("weights")[correct == 0].mean()))
    entropy = -torch.special.xlogy(every("weights"), every("weights")).sum() / 12
    assert row["weight_entropy"] == pytest.approx(float(entropy), rel=1e-6)
    assert row["loss"] == pytest.approx(
        sum(float(out.loss.detach()) for out, _ in outputs) / 3, rel=1e-6
    )
    assert row["loss"] == pytest.approx(row["loss_sft"] + row["loss_consistency"], rel=1e-5)
    assert row["loss_consistency"] > 0
    assert row["tokens_per_second"] > 0
    assert {k: v for k, v in row.items() if k not in ("step", "time")} == seen.rows[0]


def test_fixed_names_of_a_row(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2).train()
    row = metrics(tmp_path)[0]
    names = {
        *("step", "epoch", "time", "loss", "loss_sft", "loss_consistency", "weight_entropy"),
        *("learning_rate", "grad_norm", "tokens_per_second", "questions_per_second"),
        *("weight/right", "weight/wrong", "filtered_share", "skipped_questions"),
        *(
            f"teacher/{teacher}/{figure}"
            for teacher in TEACHERS
            for figure in ("weight", "nll", "mi", "consensus", "nonfinite", "filtered")
        ),
    }
    assert set(row) == names


def test_run_json(tmp_path: Path) -> None:
    info = {"config": {"a": 1}, "consensus_backend": "native"}
    make_trainer(tmp_path, max_steps=1, run_info=info).train()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"] == {"a": 1}
    assert run["consensus_backend"] == "native"
    assert run["backend"]["name"] == "torch"
    assert "cpu" in run["backend"]["reason"]
    assert run["teachers"] == TEACHERS
    assert run["status"] == "finished"
    assert run["versions"]["torch"] == torch.__version__
    assert run["started"] <= run["finished"]
    make_trainer(tmp_path, max_steps=1).train()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["mode"] == "compact"
    assert run["config"]["learning_rate"] == 1e-2


def test_a_fresh_run_starts_the_metrics_anew(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=4).train()
    make_trainer(tmp_path, max_steps=2).train()
    assert [row["step"] for row in metrics(tmp_path)] == [2]


def test_the_host_settings_cannot_break_the_log(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=2, logging_first_step=True, include_num_input_tokens_seen=True
    )
    trainer.train()
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


def test_arguments_serialise(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config=CompactConfig(weighting=(1.0, 2.0, 0.0)))
    assert json.loads(trainer.args.to_json_string())["compact"]["weighting"] == [1.0, 2.0, 0.0]


# ---- evaluation ------------------------------------------------------------------------------


def test_held_out_nll_for_every_teacher(tmp_path: Path) -> None:
    rows = make_rows(5, seed=8)
    model = make_student()
    trainer = make_trainer(tmp_path, model, eval_rows=rows)
    found = trainer.evaluate()
    losses: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for row in rows:
        for k, completion in zip(row["teacher_ids"], row["completion_ids"], strict=True):
            ids = torch.tensor([row["prompt_ids"] + completion])
            labels = ids.clone()
            labels[:, : len(row["prompt_ids"])] = -100
            with torch.no_grad():
                losses[k].append(float(model(input_ids=ids, labels=labels).loss))
    every = [x for one in losses.values() for x in one]
    assert found["eval_nll"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    for k, name in enumerate(TEACHERS):
        expected = sum(losses[k]) / len(losses[k])
        assert found[f"eval/teacher/{name}/nll"] == pytest.approx(expected, rel=1e-5)


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_nll(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        eval_rows=make_rows(3, seed=8),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.05,  # learns twelve random questions by heart, and unlearns the rest
        load_best_model_at_end=True,
    )
    trainer.train()
    values = {row["step"]: row["eval_nll"] for row in metrics(tmp_path) if "eval_nll" in row}
    best = min(values, key=values.__getitem__)
    assert best != max(values)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_nll"] == pytest.approx(values[best], rel=1e-6)


# ---- what is refused or left out -------------------------------------------------------------


def test_correct_only_leaves_out_questions_without_a_right_rationale(tmp_path: Path) -> None:
    rows = make_rows(6)
    rows[0]["correct"] = [0] * len(rows[0]["correct"])
    rows[4]["correct"] = [-1] * len(rows[4]["correct"])
    config = CompactConfig(weighting="correct")
    trainer = make_trainer(tmp_path, make_student(), rows, config=config)
    assert [row["id"] for row in trainer.train_dataset] == ["q1", "q2", "q3", "q5"]
    assert trainer.notes == [
        'weighting="correct": 2 of 6 questions left out, none of their rationales is right'
    ]
    trainer.train()
    assert all(row["weight/right"] == 1.0 for row in metrics(tmp_path))
    for row in rows:
        row["correct"] = [0] * len(row["correct"])
    with pytest.raises(ValueError, match="no question has a rationale known to be right"):
        make_trainer(tmp_path, make_student(), rows, config=config)


def test_rows_of_a_dataset_train_as_a_list_does(tmp_path: Path) -> None:
    from datasets import Dataset

    config = CompactConfig(weighting="correct")
    rows = make_rows(8)
    rows[2]["correct"] = [0] * len(rows[2]["correct"])
    a = trained(make_trainer(tmp_path / "a", make_student(), rows, config=config))
    b = trained(
        make_trainer(tmp_path / "b", make_student(), Dataset.from_list(rows), config=config)
    )
    assert same(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: the loss has no label"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"fp16": True}, "fp16=True: fp16 is not supported; use bf16"),
        ({"fsdp": "full_shard"}, "fsdp='full_shard'"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy='group_by_length'",
        ),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
        ({"progress": "dots"}, "progress='dots': expected auto, bar, lines or none"),
        (
            {"report_to": ["no-such-tracker"]},
            "report_to='no-such-tracker': unknown, or its package",
        ),
        ({"backend": "cuda-magic"}, "backend='cuda-magic'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes)


def test_rows_and_configuration_must_go_together(tmp_path: Path) -> None:
    rows = make_rows(2)
    for row in rows:
        del row["consensus"]
    with pytest.raises(ValueError, match="consensus='graph' needs the column `consensus`"):
        make_trainer(tmp_path, make_student(), rows)
    make_trainer(tmp_path, make_student(), rows, config=CompactConfig(weighting="uniform"))
    make_trainer(tmp_path, make_student(), rows, config=CompactConfig(mode="paper"))
    with pytest.raises(ValueError, match="2 fixed weights for 3 teachers"):
        make_trainer(tmp_path, config=CompactConfig(weighting=(1.0, 2.0)))
    with pytest.raises(ValueError, match="train_dataset holds no question"):
        make_trainer(tmp_path, make_student(), [])
    with pytest.raises(ValueError, match=r"teachers=\[\]"):
        CompactTrainingArguments(output_dir=str(tmp_path))


def test_the_authors_set_up_is_the_default(tmp_path: Path) -> None:
    args = CompactTrainingArguments(output_dir=str(tmp_path), teachers=["a"], use_cpu=True)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 4)
    assert (args.learning_rate, args.lr_scheduler_type.value) == (1e-5, "constant")
    assert (args.num_train_epochs, args.max_grad_norm) == (5, 1.0)


def test_a_trained_head_is_seen(tmp_path: Path) -> None:
    assert body_and_head(make_trainer(tmp_path).model).trainable
    assert not body_and_head(make_trainer(tmp_path, make_student(lora=True)).model).trainable
