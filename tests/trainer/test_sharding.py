"""sharding="fsdp": two processes with a part of the student each train as one with all of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_group import in_processes
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from toy import TEACHERS, make_rows, make_student, make_trainer, metrics, untimed
from transformers import TrainerCallback

from compact_fast.config import CompactConfig
from compact_fast.evaluate.generate import generate
from compact_fast.evaluate.rationales import rationale_nll
from compact_fast.students import LoraSettings, add_lora
from compact_fast.trainer import NonFiniteError, TrainingInterrupted
from compact_fast.trainer.checkpoints import verify_checkpoint
from compact_fast.trainer.launcher import launched_bf16, launched_sharding
from compact_fast.trainer.sharding import gather, in_step

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")

SETTINGS: dict[str, Any] = {
    "config": CompactConfig(filter_below=0.0),
    "optim": "sgd",
    "learning_rate": 0.05,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "eval_rows": make_rows(5, seed=9),
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 1,
    "use_cpu": False,  # as a user would, who has no GPU and says nothing
}
ONE, EACH = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2}


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """Trained weights, whole; on the main process of a sharded run alone."""
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    whole = gather(trainer.model)
    named = dict(trainer.model.named_parameters()) if whole is None else whole.weights
    return {n: p.detach().clone() for n, p in named.items() if n in trained}


def train(folder: Path, model: Any, *, count: int = 15, resume: Any = None, **changes: Any) -> Any:
    trainer = make_trainer(folder, model, make_rows(count), **{**SETTINGS, **changes})
    trainer.train(resume)
    return weights_of(trainer)


def assert_same_run(one: Path, other: Path, rel: float = 1e-5) -> None:
    """All figures of two runs; MI is a sum of differences and entropies lie near 0."""
    alone, together = metrics(one), metrics(other)
    assert [set(row) for row in alone] == [set(row) for row in together]
    for a, b in zip(map(untimed, alone), map(untimed, together), strict=True):
        for key in a.keys() - {"epoch"}:
            loose = 10 if "mi" in key or "entropy" in key else 1
            assert a[key] == pytest.approx(b[key], rel=loose * rel, abs=1e-6), key


def assert_same_weights(one: dict[str, Tensor], other: Any, tolerance: float = 1e-5) -> None:
    assert isinstance(other, dict), other
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name],
            other[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# Student, settings, and what differs between one process and each of two.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # Adam's first steps magnify the rounding of gradients near 0
    "tied, accumulated and clipped": (
        {"dtype": torch.float64},
        {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 0.05},
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ),
    # a vocabulary that does not divide by two; z-scores magnify the rounding of near ties
    "untied, recomputed": (
        {"tie_word_embeddings": False, "vocab_size": 49, "dtype": torch.float64},
        {"gradient_checkpointing": True},
        ONE,
        EACH,
    ),
    "adapter, recomputed, pvi": (
        {"lora": True},
        {"gradient_checkpointing": True, "config": CompactConfig(mi="pvi")},
        ONE,
        EACH,
    ),
    "attention": ({"dtype": torch.float64}, {"config": CompactConfig(mode="paper")}, ONE, EACH),
    # fewer questions than processes in the last step
    "four processes": ({}, {"count": 13}, ONE, {"per_device_train_batch_size": 1}),
    "budget": (
        {},
        {"max_tokens_per_step": 60},
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_processes_train_as_one(tmp_path: Path, case: str) -> None:
    """Uneven K and lengths, an idle process in the last step, evaluation of 3 and 2 questions."""
    student, common, alone, each = CASES[case]

    def model() -> Any:
        return make_student(**{k: v for k, v in student.items() if k != "dtype"}).to(
            student.get("dtype", torch.float32)
        )

    one = train(tmp_path / "one", model(), **common, **alone)

    def work(rank: int) -> Any:
        settings = {**common, **each, "sharding": "fsdp"}
        return train(tmp_path / "two", model(), **settings)

    first, *others = in_processes(tmp_path / "two", 4 if case == "four processes" else 2, work)
    assert not any(others)
    assert_same_weights(one, first)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_each_process_holds_its_part_and_process_zero_decides(tmp_path: Path) -> None:
    one = train(tmp_path / "one", make_student(), **ONE)

    def work(rank: int) -> Any:
        model = make_student(seed=rank)  # as a user who forgot the seed
        trainer = make_trainer(
            tmp_path / "two", model, make_rows(15), **{**SETTINGS, **EACH, "sharding": "fsdp"}
        )
        trainer.train()
        here = sum(p.to_local().numel() for p in model.parameters())
        moments = trainer.optimizer.state_dict()["state"]
        assert all(
            hasattr(v, "placements") for s in moments.values() for v in s.values() if v.dim()
        )
        return weights_of(trainer), here, sum(p.numel() for p in model.parameters())

    (first, a, total), (_, b, _) = in_processes(tmp_path / "two", 2, work)
    assert a + b == total
    assert abs(a - b) < 0.01 * total
    assert_same_weights(one, first)


SAVING: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "no",
}


class _Stop(TrainerCallback):
    """Sends SIGTERM to this process in its fifth step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_are_those_of_any_other_run(tmp_path: Path, lora: bool) -> None:
    """Stopped sharded, a run goes on sharded to the same bits, and in any other manner."""
    sharded = {**SAVING, **EACH, "sharding": "fsdp"}

    def whole(rank: int) -> Any:
        return train(tmp_path / "whole", make_student(lora=lora), **sharded)

    def stopped(rank: int) -> Any:
        trainer = make_trainer(
            tmp_path / "run", make_student(lora=lora), make_rows(15), **{**SETTINGS, **sharded}
        )
        if rank == 1:
            trainer.add_callback(_Stop())
        try:
            trainer.train()
        except TrainingInterrupted as error:
            return str(error)

    def resumed(rank: int) -> Any:
        return train(tmp_path / "run", make_student(lora=lora), resume="auto", **sharded)

    expected = in_processes(tmp_path / "whole", 2, whole)[0]
    assert isinstance(expected, dict), expected
    for said in in_processes(tmp_path / "stopped", 2, stopped):
        assert "SIGTERM after step 5; checkpoint-5 is whole" in said
    saved = tmp_path / "run" / "checkpoint-5"
    verify_checkpoint(saved)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    shapes = {n: v.shape for n, v in load_file(saved / name).items()}
    state = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    assert {tuple(s["exp_avg"].shape) for s in state.values()} <= set(map(tuple, shapes.values()))

    def fresh(kind: str) -> Path:
        folder = tmp_path / kind
        for part in (tmp_path / "run").rglob("*"):
            if part.is_file():
                target = folder / part.relative_to(tmp_path / "run")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(part.read_bytes())
        return folder

    alone, replicas = fresh("alone"), fresh("replicas")
    assert_same_weights(
        expected, train(alone, make_student(lora=lora), resume="auto", **SAVING, **ONE)
    )
    copies = in_processes(
        replicas,
        2,
        lambda rank: train(replicas, make_student(lora=lora), resume="auto", **SAVING, **EACH),
    )
    assert_same_weights(expected, copies[0])
    again = in_processes(tmp_path / "resumed", 2, resumed)[0]
    assert isinstance(again, dict), again
    assert all(torch.equal(expected[n], again[n]) for n in expected)


def test_a_run_of_one_process_goes_on_sharded(tmp_path: Path) -> None:
    saving = {**SAVING, "lr_scheduler_type": "constant"}
    expected = train(tmp_path / "whole", make_student(), **saving, **ONE)
    train(tmp_path / "run", make_student(), **{**saving, **ONE, "max_steps": 4})

    def work(rank: int) -> Any:
        settings = {**saving, **EACH, "sharding": "fsdp", "max_steps": 8}
        return train(tmp_path / "run", make_student(seed=5), resume="auto", **settings)

    assert_same_weights(expected, in_processes(tmp_path / "run", 2, work)[0])


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    def work(rank: int, tied: bool) -> Any:
        student = make_student(tie_word_embeddings=tied)
        settings = {**SAVING, **EACH, "sharding": "fsdp", "max_steps": 2}
        return train(tmp_path / "run", student, resume="auto", **settings)

    assert isinstance(in_processes(tmp_path / "a", 2, lambda rank: work(rank, True))[0], dict)
    for said in in_processes(tmp_path / "b", 2, lambda rank: work(rank, False)):
        assert "the checkpoint is of another student: 1 weights" in said


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_fails_on_one_process_ends_both(tmp_path: Path, failing: int) -> None:
    """The main process writes weights and optimizer, the other its random state."""

    def work(rank: int) -> Any:
        write = torch.save

        def save(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if rank == failing and "checkpoint-4" in str(path):
                raise OSError(5, "Input/output error")
            write(obj, path, *args, **kwargs)

        torch.save = save
        try:
            train(tmp_path / "run", make_student(), **SAVING, **EACH, sharding="fsdp")
        finally:
            torch.save = write

    for said in in_processes(tmp_path / "two", 2, work):
        assert said == "OSError: [Errno 5] Input/output error"
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-2"]
    verify_checkpoint(tmp_path / "run" / "checkpoint-2")


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    settings = {
        **SAVING,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 0.01,
        "metric_for_best_model": "eval_nll",
        "greater_is_better": True,  # so that the last is not the best
    }

    def work(rank: int) -> Any:
        return train(tmp_path / "run", make_student(), **settings, **EACH, sharding="fsdp")

    first = in_processes(tmp_path / "run", 2, work)[0]
    assert isinstance(first, dict), first
    state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_global_step"] < 8
    folder = tmp_path / "run" / f"checkpoint-{state['best_global_step']}"
    best = load_file(folder / "model.safetensors")
    assert all(torch.equal(best[n], first[n]) for n in best)


class _Death(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _in_two(folder: Path, prepare: Callable[[int, Any], None]) -> list[Any]:
    def work(rank: int) -> Any:
        model = make_student()
        trainer = make_trainer(
            folder, model, make_rows(15), **{**SETTINGS, **EACH, "sharding": "fsdp"}
        )
        prepare(rank, trainer)
        trainer.train()

    return in_processes(folder, 2, work)


def test_all_stop_when_one_meets_a_non_finite_number(tmp_path: Path) -> None:
    def poison(rank: int, trainer: Any) -> None:
        if rank == 1:
            weight = trainer.model.model.layers[0].mlp.up_proj
            weight.register_forward_hook(lambda m, a, out: out * torch.nan if m.training else out)

    for outcome in _in_two(tmp_path / "two", poison):
        assert outcome.startswith(f"{NonFiniteError.__name__}: step 1: "), outcome


def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    def doom(rank: int, trainer: Any) -> None:
        if rank == 1:
            trainer.add_callback(_Death())

    first, second = _in_two(tmp_path / "two", doom)
    assert second is None
    assert first.startswith("RuntimeError: process 0 of 2: another process has ended"), first


@pytest.mark.parametrize("lora", [False, True])
def test_one_process_evaluates_while_the_other_keeps_pace(tmp_path: Path, lora: bool) -> None:
    prompts = [[3, 4, 5], [7, 8], [9, 10, 11, 12], [13]]
    rows = make_rows(5, seed=9)

    def measure(model: Any) -> Any:
        answers = generate(
            model, prompts, stop_ids=[1], pad_id=0, max_new_tokens=9, batch_size=3, seed=1
        )
        sampled = generate(
            model, prompts, stop_ids=[1], pad_id=0, max_new_tokens=9, temperature=1.0, seed=1
        )
        return answers, sampled, rationale_nll(model, rows, TEACHERS).overall.nll

    def work(rank: int) -> Any:
        model = make_student(lora=lora)
        trainer = make_trainer(tmp_path / "two", model, **{**SETTINGS, **EACH, "sharding": "fsdp"})
        with in_step(model):
            before = measure(model) if rank == 0 else None
        trainer.train()  # what was gathered for reading must not be what is trained
        with in_step(model):
            if rank == 1:
                measure(model)
        return before, weights_of(trainer)

    (before, trained), (_, _) = in_processes(tmp_path / "two", 2, work)
    expected = measure(make_student(lora=lora))
    assert before[:2] == expected[:2]
    assert before[2] == pytest.approx(expected[2], rel=1e-6)
    one = make_trainer(tmp_path / "one", make_student(lora=lora), **{**SETTINGS, **ONE})
    one.train()
    assert_same_weights(weights_of(one), trained)


def test_an_adapter_is_saved_for_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    def work(rank: int) -> Any:
        model = make_student(lora=True)
        trainer = make_trainer(
            tmp_path / "two",
            model,
            **{**SETTINGS, **EACH, "sharding": "fsdp", "learning_rate": 1.0},
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        return weights_of(trainer)

    trained = in_processes(tmp_path / "two", 2, work)[0]
    loaded = PeftModel.from_pretrained(make_student(), tmp_path / "adapter", is_trainable=True)
    assert_same_weights(
        {n: p.detach() for n, p in loaded.named_parameters() if p.requires_grad}, trained, 0.0
    )


def test_what_cannot_be_is_refused_with_the_remedy(tmp_path: Path) -> None:
    def refused(match: str, model: Any = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            make_trainer(tmp_path, model, sharding="fsdp", **changes)

    refused("one process has nobody to share with; start several .torchrun")
    refused("fusion='per_teacher', .* use fusion='packed'", fusion="per_teacher")
    refused("not together with compile_body=True", compile_body=True)
    refused(
        "needs gradient_checkpointing_kwargs={'use_reentrant': False}",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(ValueError, match="sharding='zero3': expected none or fsdp"):
        make_trainer(tmp_path, sharding="zero3")
    with pytest.raises(ValueError, match="fsdp='full_shard': use sharding='fsdp'"):
        make_trainer(tmp_path, fsdp="full_shard")


def test_a_student_sharded_by_other_means_is_refused(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        dist.init_process_group("gloo")
        model = make_student()
        fully_shard(model)
        with pytest.raises(ValueError) as caught:
            make_trainer(tmp_path / "two", model, **{**SETTINGS, **EACH})
        return str(caught.value)

    for said in in_processes(tmp_path / "two", 2, work):
        assert "is a DTensor: the student has been sharded before; give it whole" in said


def test_a_second_trainer_takes_a_sharded_student(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        model = make_student()
        for name in ("a", "b"):
            settings = {**SETTINGS, **EACH, "sharding": "fsdp", "num_train_epochs": 1}
            trainer = make_trainer(tmp_path / name, model, make_rows(15), **settings)
            trainer.train()
        return weights_of(trainer)

    model = make_student()
    for name in ("c", "d"):
        settings = {**SETTINGS, **ONE, "num_train_epochs": 1}
        one = make_trainer(tmp_path / name, model, make_rows(15), **settings)
        one.train()
    assert_same_weights(weights_of(one), in_processes(tmp_path / "two", 2, work)[0])


def test_accelerates_launcher_may_ask_for_it() -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert launched_sharding(asked)
    assert not launched_sharding(asked)  # accelerate itself is told nothing
    assert not launched_sharding({})
    with pytest.raises(ValueError, match=r"FSDP_VERSION=1 .*: expected 2"):
        launched_sharding({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})
    with pytest.raises(ValueError, match="FSDP_OFFLOAD_PARAMS=true"):
        launched_sharding({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"})


def test_accelerates_launcher_may_name_the_precision() -> None:
    assert launched_bf16(None, {}) is None
    assert launched_bf16(False, {"ACCELERATE_MIXED_PRECISION": "no"}) is False
    assert launched_bf16(None, {"ACCELERATE_MIXED_PRECISION": "bf16"}) is True
    with pytest.raises(ValueError, match=r"but bf16=False: give one"):
        launched_bf16(False, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(ValueError, match=r"mixed_precision=fp16 .*: not supported"):
        launched_bf16(None, {"ACCELERATE_MIXED_PRECISION": "fp16"})


def test_adapters_in_float32_on_a_base_of_another_dtype(tmp_path: Path) -> None:
    """Under bf16 autocast; processes round alike, but for sums over other questions."""

    def model() -> Any:
        return add_lora(make_student().to(torch.bfloat16), LoraSettings(r=4, dropout=0.0))

    settings = {"bf16": True, "use_cpu": True, "num_train_epochs": 1}
    train(tmp_path / "one", model(), **settings, **ONE)

    def work(rank: int) -> Any:
        kinds = {p.dtype for p in model().parameters()}
        return train(tmp_path / "two", model(), **settings, **EACH, sharding="fsdp"), len(kinds)

    (first, kinds), _ = in_processes(tmp_path / "two", 2, work)
    assert isinstance(first, dict), first
    assert kinds == 2
    rows = [metrics(tmp_path / name) for name in ("one", "two")]
    losses = [[row["loss"] for row in found if "loss" in row] for found in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
