"""Tiny students and a byte-level tokenizer, made here."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(**special):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        eos_token="<|end|>",
        **special,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_model(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(**SIZES, tie_word_embeddings=False, initializer_range=0.3)
        return LlamaForCausalLM(config).eval()
    if kind == "gemma2":  # capped logits
        capped = {"head_dim": 8, "final_logit_softcapping": 2.0, "initializer_range": 0.3}
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, **capped)).eval()
    if kind == "granite":  # scaled ones
        scaled = {"logits_scaling": 2.0, "initializer_range": 0.3}
        return GraniteForCausalLM(GraniteConfig(**SIZES, **scaled)).eval()
    config = Qwen2Config(**SIZES, tie_word_embeddings=True, initializer_range=0.3)
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session", params=["llama", "qwen2", "gemma2", "granite"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def llama():
    return make_model("llama")


def full_logp(model, ids):
    """log p of every next token, [L - 1, V], float64, from the model's own logits."""
    wide = type(model)(model.config).double().eval()
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    with torch.no_grad():
        return wide(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def sum_logp(model, head, target):
    """log p(target | head) in float64."""
    logp = full_logp(model, [*head, *target])
    return sum(float(logp[len(head) - 1 + i, t]) for i, t in enumerate(target))


@pytest.fixture(scope="session")
def judge():
    return sum_logp


@pytest.fixture(scope="session")
def plain_tokenizer():
    """Without chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer
