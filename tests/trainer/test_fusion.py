"""fusion="per_teacher": the packed step's loss, weights and gradients, one rationale at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import processes
from toy import TEACHERS, THINKING, make_rows, make_student, make_trainer
from transformers import TrainerCallback

from compact_fast.config import CompactConfig
from compact_fast.students import LoraSettings, add_lora, causal_model
from compact_fast.trainer.fusion import check_fusion, per_teacher_step
from compact_fast.trainer.step import Collator, compact_step, direct_body

BLEND = CompactConfig(filter_below=0.0, consistency_weight=0.7)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def both(model: Any, rows: list[dict[str, Any]], config: CompactConfig, **settings: Any) -> Any:
    """(packed output, its gradients, per-teacher output, its gradients)."""
    inputs = Collator.of(model, None, config, THINKING)(rows)
    found: list[Any] = []
    for step in (compact_step, per_teacher_step):
        model.zero_grad()
        out = step(direct_body(model), model, inputs, config=config, **settings)
        (3.0 * out.loss).backward()
        found += [out, gradients(model)]
    return tuple(found)


def assert_same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within 1e-5 of the largest value; NaN where NaN."""
    a, b = a.double(), b.double()
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(), b.nan_to_num()
    assert float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), 1e-3)


CONFIGS = [
    BLEND,
    CompactConfig(),
    CompactConfig(mode="paper"),
    CompactConfig(consensus="both", mi="logprob", filter_below=0.0),
    CompactConfig(mi="pvi", filter_below=0.0),
    CompactConfig(weighting="random", consistency="off"),
    CompactConfig(weighting="correct"),
]


def student(kind: str = "llama", *, lora: bool, **changes: Any) -> Any:
    """Both halves of an adapter at work: a fresh one's B is zero, and half of its gradients too."""
    model = make_student(kind, lora=lora, **changes)
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.mode}-{c.weighting}-{c.mi}")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_equal_to_the_packed_step(config: CompactConfig, lora: bool) -> None:
    """Ragged K, ragged lengths; every gradient, and every figure that is logged. In float64, where
    z-scores of near-ties do not blow rounding up."""
    model = student(lora=lora, tie_word_embeddings=lora).double()
    pulled = 0.0
    for seed in range(3):
        rows = make_rows(5, seed=seed)
        packed, expected, fused, found = both(model, rows, config, normalizer=7.0)
        assert expected.keys() == found.keys()
        for name in expected:
            assert_same(expected[name], found[name], 1e-6)
        for name, value in vars(packed).items():
            if isinstance(value, torch.Tensor):
                assert_same(value.detach(), getattr(fused, name).detach(), 1e-6)
        pulled += float(packed.loss_consistency)
    assert pulled > 0 or config.consistency == "off" or config.weighting == "correct"


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_capped_and_scaled_logits(kind: str) -> None:
    config = CompactConfig(consensus="both", filter_below=0.0, consistency_weight=0.7)
    model = student(kind, lora=False).double()
    packed, expected, fused, found = both(model, make_rows(5), config)
    assert float(packed.loss_consistency) > 0
    assert_same(packed.weights, fused.weights, 1e-6)
    for name in expected:
        assert_same(expected[name], found[name], 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_equal_in_single_precision(seed: int) -> None:
    model = student(lora=True)
    packed, expected, fused, found = both(model, make_rows(4, seed=seed), BLEND)
    assert_same(packed.loss.detach(), fused.loss.detach())
    for name in expected:
        assert_same(expected[name], found[name])


def test_a_tied_trained_head_gets_both_shares() -> None:
    model = make_student("qwen2", tie_word_embeddings=True)
    _, expected, _, found = both(model, make_rows(4), BLEND)
    for name in expected:
        assert_same(expected[name], found[name])


def test_a_rationale_read_twice_meets_the_same_dropout() -> None:
    """The consistency term's second reading must be of the network that was scored."""
    torch.manual_seed(0)
    model = add_lora(make_student(), LoraSettings(r=4, dropout=0.5))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    model.train()
    seen: list[torch.Tensor] = []
    causal_model(model).model.register_forward_hook(
        lambda module, args, output: seen.append(output.last_hidden_state.detach())
    )
    rows = [r for r in make_rows(12) if len(r["completion_ids"]) == 2][:1]
    inputs = Collator.of(model, None, BLEND, THINKING)(rows)
    seen.clear()
    per_teacher_step(direct_body(model), model, inputs, config=BLEND)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0][:, :3], seen[1][:, :3])  # else dropout was off


def test_norms_and_cosines_are_those_of_the_rationales_own_gradients() -> None:
    model = make_student(lora=True)
    rows = [r for r in make_rows(12) if len(r["completion_ids"]) == 3][:2]
    _, _, compared, _ = both(model, rows, BLEND)
    alone = []
    for row in rows:
        for k in range(3):
            one = {**row, **{n: [row[n][k]] for n in ("completion_ids", "teacher_ids")}}
            one |= {n: [row[n][k]] for n in ("answer_spans", "correct", "consensus")}
            model.zero_grad()
            inputs = Collator.of(model, None, BLEND, THINKING)([one])
            compact_step(direct_body(model), model, inputs, config=BLEND).loss.backward()
            alone.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert_same(torch.stack([g.norm() for g in alone]), compared.grad_norms)
    assert compared.pairs.tolist() == [[0, 1], [0, 2], [1, 2]] * 2
    expected = [
        torch.cosine_similarity(alone[3 * q + i], alone[3 * q + j], dim=0)
        for q in range(2)
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert_same(torch.stack(expected), compared.cosines)


def test_a_rationale_of_non_finite_scores_gets_no_weight_and_spoils_nothing() -> None:
    model = make_student(lora=True)
    rows = [r for r in make_rows(12) if len(r["completion_ids"]) == 3][:1]
    bad = copy.deepcopy(rows)
    bad[0]["consensus"][1] = float("nan")
    packed, expected, fused, found = both(model, bad, BLEND)
    assert fused.nonfinite.tolist() == [False, True, False]
    assert_same(packed.weights, fused.weights)
    for name in expected:
        assert_same(expected[name], found[name])


def test_the_loss_is_differentiated_once() -> None:
    model = make_student(lora=True)
    inputs = Collator.of(model, None, BLEND, THINKING)(make_rows(2))
    out = per_teacher_step(direct_body(model), model, inputs, config=BLEND)
    out.loss.backward()
    with pytest.raises(RuntimeError):
        out.loss.backward()


@pytest.mark.parametrize(
    ("config", "checkpointing", "named"),
    [
        (CompactConfig(mode="reference"), None, "mode='reference'"),
        (CompactConfig(consistency="all"), None, "consistency='all'"),
        (CompactConfig(), {"use_reentrant": True}, "use_reentrant"),
    ],
)
def test_what_cannot_be_done_one_at_a_time_is_refused(
    config: CompactConfig, checkpointing: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        check_fusion(make_student(), config, 3, checkpointing)


# ---- in the trainer --------------------------------------------------------------------------


def run(folder: Path, **settings: Any) -> Any:
    """A run of 6 steps that logs every 3 and saves after 4."""
    return make_trainer(
        folder,
        make_student(lora=True),
        config=BLEND,
        logging_steps=3,
        save_strategy="steps",
        save_steps=4,
        **settings,
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def logged(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "tokens_per_second", "questions_per_second", "data_wait_share")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def test_a_run_learns_and_logs_what_the_packed_run_does(tmp_path: Path) -> None:
    packed, apart = run(tmp_path / "packed"), run(tmp_path / "apart", fusion="per_teacher")
    packed.train()
    apart.train()
    expected, found = weights(packed), weights(apart)
    start = dict(make_student(lora=True).named_parameters())
    assert any(not torch.equal(found[n], start[n]) for n in found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    for a, b in zip(logged(tmp_path / "packed"), logged(tmp_path / "apart"), strict=True):
        assert {k: b[k] for k in a} == pytest.approx(a, rel=1e-3, abs=1e-4)
        for name in TEACHERS:
            assert b[f"teacher/{name}/grad_norm"] > 0
            assert -1 <= b[f"teacher/{name}/grad_cosine"] <= 1
        assert -1 <= b["cosine/ann/bob"] <= 1
        assert set(b) - set(a) == {
            *(f"teacher/{name}/grad_{what}" for name in TEACHERS for what in ("norm", "cosine")),
            *("cosine/ann/bob", "cosine/ann/cyd", "cosine/bob/cyd"),
        }


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Stopped inside a logging window: its sums of norms and cosines go on too."""

    class StopAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole = run(tmp_path / "a", fusion="per_teacher")
    whole.train()
    first = run(tmp_path / "b", fusion="per_teacher")
    first.add_callback(StopAt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = run(tmp_path / "b", fusion="per_teacher")
    second.train(resume_from_checkpoint="auto")
    expected, found = weights(whole), weights(second)
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about CPUs")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # float64: z-scores of nearly equal scores would magnify float32's rounding, which is another
    # for sums in another order and on another processor
    settings = {"lora": True, "per_device_train_batch_size": 2, "dtype": torch.float64}
    first, second = processes(tmp_path / "two", 2, fusion="per_teacher", **settings)
    assert isinstance(first, dict), first
    alone, _ = processes(tmp_path / "packed", 2, **settings)
    for name in alone:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-5, atol=1e-6)


def test_recomputation_changes_nothing(tmp_path: Path) -> None:
    plain = run(tmp_path / "a", fusion="per_teacher")
    less = run(tmp_path / "b", fusion="per_teacher", gradient_checkpointing=True)
    plain.train()
    less.train()
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(less)[name], expected, rtol=1e-5, atol=1e-6)


def test_many_large_gradients_are_worth_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from compact_fast.trainer import fusion

    assert check_fusion(make_student(), BLEND, 3) == []
    monkeypatch.setattr(fusion, "LARGE", 1000)
    (note,) = check_fusion(make_student(), BLEND, 3)
    assert "keeps 4 gradients" in note


def test_small_gradients_are_left_out_of_each_rationale() -> None:
    """The head's gradient is off by no more than the bound, and the share is that of all rows."""
    model = student(lora=False, tie_word_embeddings=False).double()
    # one question, so that the packed step takes the same figures; logits some units apart
    model.lm_head.weight.data *= 20
    rows = make_rows(3, seed=4)
    dense, skipping = (CompactConfig(skip_below=eps, consistency="off") for eps in (0.0, 0.02))
    _, _, plain, whole = both(model, rows, dense)
    packed, _, fused, found = both(model, rows, skipping)
    assert plain.kept_share is None
    assert 0 < fused.kept_share < 1
    assert fused.kept_share <= packed.kept_share  # its blocks span one rationale, not all
    for name in ("loss", "nll", "mi", "weights"):
        assert_same(getattr(plain, name), getattr(fused, name), 1e-9)
    missing = float((found["lm_head.weight"] - whole["lm_head.weight"]).norm()) / 3.0
    assert 0 < missing <= float(fused.gradient_error[1])
    assert 0 < fused.gradient_error[0] < 1
    everything = both(model, rows, CompactConfig(skip_below=1e-300))
    assert everything[0].kept_share == everything[2].kept_share == 1
    for name, gradient in everything[1].items():
        assert_same(gradient, everything[3][name], 1e-6)
