import copy
import json
import os
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

import compact_fast.evaluate
from compact_fast.data.records import Question, Rationale
from compact_fast.data.tokenize import TokenizeOptions, tokenize_questions
from compact_fast.evaluate import EvaluationOptions, PromptBuilder, evaluate

DATA = Path(os.environ.get("COMPACT_FAST_DATA", Path(__file__).parents[2] / "../shared/data"))


def questions():
    return [
        Question(
            id=f"q{i}",
            question=f"How much is {i} and {i}?",
            answer=str(2 * i),
            rationales=[
                Rationale("long", f"First {i} then {i}. The answer is {2 * i}."),
                Rationale("short", f"The answer is {2 * i}."),
            ],
        )
        for i in range(3)
    ]


def test_everything_in_one_call_plain_and_peft(llama, tokenizer):
    data = tokenize_questions(questions(), tokenizer, teachers=["long", "short"])
    heard = []
    asked = {
        "questions": questions(),
        "rows": data.rows,
        "teachers": data.teachers,
        "text": "Some old knowledge.",
        "options": EvaluationOptions(max_new_tokens=4, samples=2, window=32, stride=16),
        "progress": lambda name: lambda done, total: heard.append((name, done, total)),
    }
    plain = evaluate(llama, tokenizer, **asked).to_dict()
    assert set(plain) == {"exact_match", "exact_match_sampled", "rationale_nll", "perplexity"}
    assert plain["exact_match_sampled"]["samples_per_question"] == 2
    assert set(plain["rationale_nll"]["teachers"]) == {"long", "short"}
    assert ("rationale NLL", 6, 6) in heard
    assert ("exact match, sampled", 6, 6) in heard
    # A fresh adapter changes nothing.
    wrapped = get_peft_model(copy.deepcopy(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    peft = evaluate(wrapped, tokenizer, **asked).to_dict()
    assert peft["rationale_nll"]["nll"] == plain["rationale_nll"]["nll"]
    assert peft["exact_match"]["generated_tokens"] == plain["exact_match"]["generated_tokens"]


def test_likelihood_is_automatic_where_there_are_choices(llama, tokenizer):
    asked = [Question("1", "Which?", "A", choices=["x", "y"])]
    found = evaluate(llama, tokenizer, questions=asked, options=EvaluationOptions(max_new_tokens=2))
    assert found.options is not None
    off = EvaluationOptions(generate=False, likelihood=False)
    assert evaluate(llama, tokenizer, questions=asked, options=off).to_dict() == {}


def test_nothing_to_evaluate(llama, tokenizer):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(llama, tokenizer)


def test_prompts_are_those_of_training(tokenizer):
    options = TokenizeOptions(system_prompt="Be brief.")
    data = tokenize_questions(questions(), tokenizer, teachers=["long", "short"], options=options)
    prompts = PromptBuilder(tokenizer, options)
    for question, row in zip(questions(), data.rows, strict=True):
        assert prompts.ids(question) == row["prompt_ids"]
    assert "Be brief." in prompts.decode(prompts.ids(questions()[0]))


def test_unknown_names_of_the_package_are_errors():
    with pytest.raises(AttributeError, match="no attribute 'perplexities'"):
        compact_fast.evaluate.perplexities  # noqa: B018
    for name in compact_fast.evaluate.__all__:
        assert getattr(compact_fast.evaluate, name) is not None


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside the project")
@pytest.mark.parametrize("name", ["gsm8k_test", "obqa_test", "strategyqa_test"])
def test_real_evaluation_files(name, llama, tokenizer):
    lines = (DATA / f"eval_{name}.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    rows = [json.loads(line) for line in lines]
    asked = [Question(r["id"], r["question"], r["answer"], choices=r["choices"]) for r in rows]
    asked = [q for q in asked if len(PromptBuilder(tokenizer).ids(q)) < 500]
    found = evaluate(llama, tokenizer, questions=asked, options=EvaluationOptions(max_new_tokens=3))
    assert found.exact_match is not None
    assert found.exact_match.share.total == len(asked)
    if name == "gsm8k_test":
        assert found.options is None
    else:
        assert found.options is not None
        assert set(found.options.shares) == ({"text"} if "strategy" in name else {"letter", "text"})
