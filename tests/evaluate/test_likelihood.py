import pytest
import torch
from peft import LoraConfig, get_peft_model

from compact_fast.data.records import Question
from compact_fast.evaluate.likelihood import batches_by_length, evaluation_mode, logp_at
from compact_fast.evaluate.options import gold_option, option_likelihood
from compact_fast.evaluate.prompts import PromptBuilder
from compact_fast.evaluate.rationales import rationale_nll


@pytest.fixture
def ragged():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 260, (n,), generator=generator).tolist() for n in (5, 17, 3, 30, 17, 2)
    ]


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_logp_at_equals_full_logits(model, judge, ragged, batch_tokens):
    positions = [list(range(0, len(s) - 1, 2)) for s in ragged]
    targets = [[s[p + 1] for p in ps] for s, ps in zip(ragged, positions, strict=True)]
    with evaluation_mode(model):
        got = logp_at(model, ragged, positions, targets, batch_tokens=batch_tokens)
    for s, ps, values in zip(ragged, positions, got, strict=True):
        want = [judge(model, s[: p + 1], [s[p + 1]]) for p in ps]
        assert values.tolist() == pytest.approx(want, abs=2e-5)


def test_one_position_may_have_several_targets(llama, judge):
    with evaluation_mode(llama):
        (got,) = logp_at(llama, [[7, 8, 9]], [[2, 2, 0]], [[1, 2, 8]])
    want = [judge(llama, [7, 8, 9], [1]), judge(llama, [7, 8, 9], [2]), judge(llama, [7], [8])]
    assert got.tolist() == pytest.approx(want, abs=2e-5)


def test_positions_outside_the_sequence_are_named(llama):
    with pytest.raises(ValueError, match="sequence 1: positions 0 to 2 of 2 tokens"):
        logp_at(llama, [[1, 2], [1, 2]], [[0], [0, 2]], [[1], [1, 1]])
    with pytest.raises(ValueError, match="sequence 0: 2 positions but 1 targets"):
        logp_at(llama, [[1, 2]], [[0, 1]], [[1]])


def test_batches_hold_every_sequence_once_within_the_budget():
    lengths = [3, 9, 1, 9, 4, 40, 2]
    batches = batches_by_length(lengths, 20)
    assert sorted(i for b in batches for i in b) == list(range(7))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= 20 or len(batch) == 1
    assert lengths[batches[0][0]] == 40
    with pytest.raises(ValueError, match="batch_tokens=0"):
        batches_by_length(lengths, 0)


def test_evaluation_mode_restores_each_module(llama):
    llama.train()
    llama.model.layers[0].eval()
    with evaluation_mode(llama):
        assert not any(m.training for m in llama.modules())
        assert not torch.is_grad_enabled()
    assert llama.training
    assert not llama.model.layers[0].training
    assert llama.model.layers[1].training
    llama.eval()


# ---- rationales ----------------------------------------------------------------------------------


ROWS = [
    {
        "id": "a",
        "prompt_ids": [5, 6, 7],
        "completion_ids": [[1, 2, 3, 4], [9]],
        "teacher_ids": [0, 1],
    },
    {"id": "b", "prompt_ids": [8], "completion_ids": [[3, 3]], "teacher_ids": [0]},
]


def test_rationale_nll_equals_full_logits(model, judge):
    found = rationale_nll(model, ROWS, ["x", "y", "never"])
    first = -judge(model, [5, 6, 7], [1, 2, 3, 4]) / 4
    second = -judge(model, [5, 6, 7], [9])
    third = -judge(model, [8], [3, 3]) / 2
    assert found.teachers["x"].nll == pytest.approx((first + third) / 2, abs=2e-5)
    assert found.teachers["x"].standard_error == pytest.approx(abs(first - third) / 2, abs=2e-5)
    assert found.teachers["y"].nll == pytest.approx(second, abs=2e-5)
    assert found.overall.nll == pytest.approx((first + second + third) / 3, abs=2e-5)
    assert (found.overall.rationales, found.overall.tokens) == (3, 7)
    assert "never" not in found.teachers


def test_rationale_nll_ignores_dropout_and_takes_adapters(llama, judge):
    import copy

    peft = get_peft_model(
        copy.deepcopy(llama),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5),
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.train()
    found = rationale_nll(peft, ROWS, ["x", "y"])
    assert peft.training
    merged = copy.deepcopy(peft).merge_and_unload().eval()
    assert found.teachers["y"].nll == pytest.approx(-judge(merged, [5, 6, 7], [9]), abs=5e-5)
    assert found.teachers["y"].nll != pytest.approx(-judge(llama, [5, 6, 7], [9]), abs=1e-3)


def test_rationale_nll_in_bf16_is_close(llama):
    import copy

    low = rationale_nll(copy.deepcopy(llama).bfloat16(), ROWS, ["x", "y"])
    assert low.overall.nll == pytest.approx(
        rationale_nll(llama, ROWS, ["x", "y"]).overall.nll, rel=0.05
    )


def test_rationale_nll_counts_what_is_not_finite(llama):
    import copy

    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = float("nan")
    rows = [*ROWS, {"id": "c", "prompt_ids": [9], "completion_ids": [[1]], "teacher_ids": [0]}]
    found = rationale_nll(broken, rows, ["x", "y"])
    assert found.nonfinite == 1
    assert found.overall.rationales == 3


def test_rationale_nll_needs_rationales(llama):
    with pytest.raises(ValueError, match="no rationales to evaluate"):
        rationale_nll(llama, [], ["x"])


# ---- options -------------------------------------------------------------------------------------


CHOICES = ["a long option of many words", "short", "tiny"]


def test_option_likelihood_equals_full_logits(model, tokenizer, judge):
    questions = [
        Question(id=f"q{i}", question=f"Which {i}?", answer=letter, choices=CHOICES)
        for i, letter in enumerate("ABCA")
    ]
    prompts = PromptBuilder(tokenizer)
    found = option_likelihood(model, questions, prompts, batch_tokens=600)
    for form, texts in (("letter", ["A", "B", "C"]), ("text", CHOICES)):
        right = {"sum": 0, "per_byte": 0}
        for question in questions:
            head = prompts.ids(question) + prompts.encode("The answer is")
            sums = [judge(model, head, prompts.encode(f" {t}")) for t in texts]
            means = [s / len(t.encode()) for s, t in zip(sums, texts, strict=True)]
            gold = "ABC".index(question.answer)
            right["sum"] += max(range(3), key=sums.__getitem__) == gold
            right["per_byte"] += max(range(3), key=means.__getitem__) == gold
        for norm, count in right.items():
            share = found.shares[form][norm]
            assert (share.right, share.total) == (count, 4), (form, norm)


def test_option_likelihood_per_byte_differs_from_the_sum(llama, tokenizer):
    # Long options lose by the sum whatever they say.
    questions = [Question(id="q", question="Which?", answer="A", choices=["x " * 40, "y"])]
    found = option_likelihood(llama, questions, PromptBuilder(tokenizer))
    assert found.shares["text"]["sum"].right == 0


def test_letters_of_one_question_share_one_forward_pass(llama, tokenizer):
    question = Question(id="q", question="Which?", answer="C", choices=list("pqrs"))
    prompts = PromptBuilder(tokenizer)
    found = option_likelihood(llama, [question], prompts)
    # " A" is two byte tokens here: one is read, the last one is only predicted; texts likewise.
    head = len(prompts.ids(question)) + len(prompts.encode("The answer is"))
    assert found.tokens == head + 1


def test_truth_questions_are_scored_by_text_only(llama, tokenizer):
    questions = [
        Question(id="q", question="Is it?", answer="False", choices=["True", "False"]),
        Question(id="n", question="How many?", answer="3"),
    ]
    found = option_likelihood(llama, questions, PromptBuilder(tokenizer))
    assert set(found.shares) == {"text"}
    assert found.without_choices == 1
    assert found.shares["text"]["sum"].total == 1


def test_gold_option_by_letter_text_and_error():
    assert gold_option(Question("q", "?", "(B)", choices=["x", "y"])) == 1
    assert gold_option(Question("q", "?", "yes", choices=["Yes", "No"])) == 0
    assert gold_option(Question("q", "?", "Y", choices=["x", "y"])) == 1
    with pytest.raises(ValueError, match=r"f:3: gold answer 'E' names none of the 2 choices"):
        gold_option(Question("q", "?", "E", choices=["x", "y"], source="f:3"))


def test_option_likelihood_needs_choices(llama, tokenizer):
    with pytest.raises(ValueError, match="no question has choices"):
        option_likelihood(llama, [Question("q", "?", "3")], PromptBuilder(tokenizer))
