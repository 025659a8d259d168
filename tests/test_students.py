from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from compact_fast.softcap import capped
from compact_fast.students import (
    LORA_TARGETS,
    LoraSettings,
    add_lora,
    attention_projections,
    body_and_head,
    causal_model,
    check_head,
    inference,
    load_student,
    logit_scale,
    merged,
    prepare_checkpointing,
    resolve_dtype,
)
from compact_fast.students.loading import describe

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}
IDS = torch.tensor([[3, 9, 4, 7], [5, 1, 8, 6]])


def make(family: str, **changes: Any) -> Any:
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    return model(config(**{**SIZES, **changes})).eval()


def make_gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4)).eval()


# ---- body and head ---------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_times_head_is_logits(family: str, tied: bool) -> None:
    model = make(family, tie_word_embeddings=tied)
    parts = body_and_head(model)
    logits = model(input_ids=IDS).logits
    assert torch.equal(parts.body(IDS) @ parts.weight.T, logits)
    assert parts.bias is None
    assert parts.trainable
    assert (parts.weight is model.get_input_embeddings().weight) is tied


def test_through_an_adapter_the_adapter_counts_and_the_head_is_frozen() -> None:
    model = add_lora(make("llama"), LoraSettings(r=2))
    parts = body_and_head(model)
    before = parts.body(IDS)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)
    model.eval()
    assert not torch.allclose(parts.body(IDS), before)
    assert torch.allclose(parts.body(IDS) @ parts.weight.T, model(input_ids=IDS).logits)
    assert not parts.trainable


def test_a_head_trained_beside_an_adapter_is_the_copy_that_trains() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make("llama", tie_word_embeddings=False),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    parts = body_and_head(model)
    assert parts.trainable
    with torch.no_grad():
        parts.weight.add_(1.0)
    model.eval()
    assert torch.allclose(parts.body(IDS) @ parts.weight.T, model(input_ids=IDS).logits)


def test_a_head_with_bias() -> None:
    model = make("llama", tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(40))
    parts = body_and_head(model)
    check_head(model)
    torch.testing.assert_close(
        parts.body(IDS) @ parts.weight.T + parts.bias, model(input_ids=IDS).logits
    )


@pytest.mark.parametrize(
    ("make_model", "scale", "softcap"),
    [
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
            1.0,
            3.0,
        ),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=None)), 1.0, 0.0),
        (lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)), 0.25, 0.0),
        (lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)), 1 / 8, 0.0),
        (lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=1.0)), 1.0, 0.0),
    ],
)
def test_scaled_and_capped_logits(make_model: Any, scale: float, softcap: float) -> None:
    model = make_model()
    parts = body_and_head(model)
    assert (logit_scale(model), parts.softcap) == (scale, softcap)
    check_head(model)
    with torch.no_grad():
        parts.weight.mul_(40.0)  # far into the cap
    model.eval()
    logits = model(input_ids=IDS).logits
    assert not softcap or logits.abs().max() > 0.95 * softcap
    torch.testing.assert_close(capped(parts.body(IDS) @ parts.weight.T, softcap), logits)
    plain = model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(parts.body(IDS), plain * scale)


def test_the_attention_maps_of_a_student_with_scaled_logits() -> None:
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()
    hidden = model.model(input_ids=IDS).last_hidden_state[0]
    own = model.model.layers[-1].self_attn
    maps = attention_projections(model)
    torch.testing.assert_close(maps.queries(hidden / 8), own.q_proj(hidden))
    torch.testing.assert_close(maps.keys(hidden / 8), own.k_proj(hidden))


def test_a_body_alone_is_no_student() -> None:
    with pytest.raises(ValueError, match="LlamaModel is not a causal language model"):
        body_and_head(make("llama").model)


def test_an_adapter_on_the_head_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        make("llama", tie_word_embeddings=False), LoraConfig(r=2, target_modules=["lm_head"])
    )
    with pytest.raises(ValueError, match=r"adapter on the head \(lm_head\)"):
        body_and_head(model)
    with pytest.raises(ValueError, match="lora_targets: lm_head"):
        add_lora(make("llama"), LoraSettings(targets=("lm_head", "q_proj")))


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_found_out() -> None:
    class Doubling(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.01
            return out

    with pytest.raises(ValueError, match="not hidden states times the head"):
        check_head(Doubling(LlamaConfig(**SIZES)))


def test_a_student_with_non_finite_weights_is_refused() -> None:
    model = make("llama")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        check_head(model)


def test_checking_the_head_leaves_modes_and_random_numbers_alone() -> None:
    model = make("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    check_head(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training


# ---- attention projections -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_those_of_the_last_layer(family: str) -> None:
    model = make(family)
    maps = attention_projections(model)
    assert (maps.num_heads, maps.num_kv_heads, maps.head_dim) == (4, 2, 4)
    x = torch.randn(3, 16)
    attention = model.model.layers[-1].self_attn
    if family == "phi3":
        both = attention.qkv_proj(x)
        queries, keys = both[:, :16], both[:, 16:24]
    else:
        queries, keys = attention.q_proj(x), attention.k_proj(x)
    assert torch.equal(maps.queries(x), queries)
    assert torch.equal(maps.keys(x), keys)


def test_projections_include_the_adapter_but_not_its_dropout() -> None:
    model = add_lora(make("qwen2"), LoraSettings(r=2, dropout=0.5))
    q = causal_model(model).model.layers[-1].self_attn.q_proj
    torch.nn.init.ones_(q.lora_B["default"].weight)
    x = torch.randn(3, 16)
    model.train()
    found = attention_projections(model).queries(x)
    assert q.training
    q.eval()
    assert torch.equal(found, q(x))
    assert not torch.equal(found, q.base_layer(x))


def test_a_student_without_projections_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel: no q_proj"):
        attention_projections(make_gpt2())
    check_head(make_gpt2())


def test_layers_with_heads_of_different_sizes_are_refused_by_name() -> None:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    own = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 40}
    sizes = {**SIZES, "num_hidden_layers": 6, "global_head_dim": 8, **own}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**sizes))
    with pytest.raises(ValueError, match=r"Gemma4ForCausalLM: its layers differ"):
        attention_projections(model)


# ---- adapters --------------------------------------------------------------------------------


def targets_of(model: Any, caplog: Any, **settings: Any) -> tuple[set[str], str]:
    """(modules with an adapter, what the log said)."""
    caplog.clear()
    logging.getLogger("compact_fast").propagate = True  # the command line turns it off
    with caplog.at_level("INFO", logger="compact_fast"), warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = add_lora(model, LoraSettings(r=2, **settings))
    return wrapped.peft_config["default"].target_modules, caplog.text


def test_adapters_sit_on_all_linear_modules_of_a_layer(caplog: Any) -> None:
    """Whatever a family calls them; the default's names are Llama's."""
    llama, said = targets_of(make("llama"), caplog)
    assert llama == set(LORA_TARGETS)
    assert not said
    phi, said = targets_of(make("phi3"), caplog)
    assert phi == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert "Phi3ForCausalLM: the adapter sits on down_proj, gate_up_proj, o_proj, qkv_proj" in said
    gpt2, _ = targets_of(make_gpt2(), caplog)
    assert gpt2 == {"c_attn", "c_fc", "c_proj"}
    line = describe(add_lora(make_gpt2(), LoraSettings(r=2)), "folder")
    assert "M trained on c_attn, c_fc, c_proj, float32" in line
    assert "M trained, float32" in describe(add_lora(make("llama"), LoraSettings(r=2)), "folder")
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    mixture, _ = targets_of(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), caplog)
    assert "gate" not in mixture
    assert {"q_proj", "o_proj"} <= mixture


def test_of_a_list_of_ones_own_those_that_exist_are_taken(caplog: Any) -> None:
    some, said = targets_of(make("phi3"), caplog, targets=("o_proj", "q_proj"))
    assert some == {"o_proj"}
    assert "lora_targets: Phi3ForCausalLM has no q_proj" in said
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has none of them.*c_attn, c_fc, c_proj"):
        add_lora(make_gpt2(), LoraSettings(targets=("q_proj",)))


def test_an_adapter_on_modules_of_other_names_trains_and_merges() -> None:
    model = add_lora(make_gpt2(), LoraSettings(r=2, dropout=0.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
    model.eval()
    logits = model(input_ids=IDS).logits
    assert not torch.allclose(logits, make_gpt2().eval()(input_ids=IDS).logits)
    torch.testing.assert_close(merged(model)(input_ids=IDS).logits, logits)


def test_the_adapter_starts_from_its_seed_alone() -> None:
    def start(noise: int, seed: int) -> torch.Tensor:
        model = make("llama")
        torch.manual_seed(noise)
        model = add_lora(model, LoraSettings(r=2), seed=seed)
        found = [p for n, p in model.named_parameters() if "lora_A" in n]
        return torch.cat([p.flatten() for p in found])

    assert torch.equal(start(1, 0), start(2, 0))
    assert not torch.equal(start(1, 0), start(1, 7))


def test_checkpointed_adapters_get_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = add_lora(make("llama"), LoraSettings(r=2, dropout=0.0))
        if checkpointing:
            prepare_checkpointing(model)
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.train()
        body_and_head(model).body(IDS).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, checkpointed = gradients(False), gradients(True)
    assert any(g.abs().sum() > 0 for g in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)


# ---- loading ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / "student"
    make("llama").save_pretrained(path)
    words = {f"w{i}": i for i in range(40)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))
    )
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_and_its_adapter_come_back_the_same(folder: Path, tmp_path: Path) -> None:
    student = load_student(str(folder), dtype="fp32", lora=LoraSettings(r=2))
    assert student.description.startswith(f"{folder}: LlamaForCausalLM")
    for name, p in student.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    adapter = tmp_path / "adapter"
    student.model.save_pretrained(adapter)
    again = load_student(str(adapter), dtype="fp32")
    with inference(student.model), inference(again.model):
        assert torch.equal(student.model(IDS).logits, again.model(IDS).logits)
    assert not body_and_head(again.model).trainable
    assert not any(p.requires_grad for p in again.model.parameters())
    trained_on = load_student(str(adapter), dtype="fp32", lora=LoraSettings())
    names = [n for n, p in trained_on.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in n for n in names)


def test_an_adapter_of_a_local_base_loads_from_another_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    adapter, elsewhere = tmp_path / "adapter", tmp_path / "elsewhere"
    load_student("student", dtype="fp32", lora=LoraSettings(r=2)).model.save_pretrained(adapter)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = load_student(str(adapter), dtype="fp32")
    assert again.model.peft_config["default"].base_model_name_or_path == str(folder)


def test_the_base_of_a_builtin_or_named_student_stays_as_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "arithmetic").mkdir()
    monkeypatch.chdir(tmp_path)
    for spec in ("arithmetic", "package:smollm2", "owner/model"):
        model = add_lora(make("llama"), LoraSettings(r=2), base=spec)
        assert model.peft_config["default"].base_model_name_or_path == spec


def test_a_missing_base_is_said_to_be_an_adapters(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    load_student(str(folder), dtype="fp32", lora=LoraSettings(r=2)).model.save_pretrained(adapter)
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no such folder here") as caught:
        load_student(str(adapter))
    said = str(caught.value)
    assert said.startswith(f"student={str(adapter)!r}: an adapter whose base {str(folder)!r}")
    assert f"base_model_name_or_path in {adapter / 'adapter_config.json'}" in said


@pytest.mark.parametrize("rows", [40, 41, 64])
def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path, rows: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<step>"])  # with id 40
    tokenizer.save_pretrained(folder)
    make("llama", vocab_size=rows).save_pretrained(folder)
    if rows > 40:
        assert len(load_student(str(folder)).tokenizer) == 41
        return
    with pytest.raises(ValueError, match=r"ids up to 40 \('<step>'\), its embedding 40 rows") as e:
        load_student(str(folder))
    assert "resize_token_embeddings(41)" in str(e.value)


def test_dtypes(folder: Path) -> None:
    assert load_student(str(folder), dtype="bf16").model.dtype == torch.bfloat16
    assert load_student(str(folder), dtype="fp32").model.dtype == torch.float32
    if not torch.cuda.is_available():
        assert resolve_dtype("auto") == torch.float32
    with pytest.raises(ValueError, match="student_dtype='fp8'"):
        load_student(str(folder), dtype="fp8")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("package:no_such_package_at_all", r"not installed \(pip install no-such-package-at-all\)"),
        ("package:transformers", r"expected one .gguf file in the package, found none"),
        ("nowhere/model.gguf", "no such file"),
        ("too/many/parts", "no such folder here, and no such model on the hub"),
        (__file__, "a file, but not a .gguf"),
        (str(Path(__file__).parent), "neither config.json nor an adapter"),
    ],
)
def test_what_cannot_be_loaded_is_said(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_student(spec)
    assert repr(spec) in str(caught.value)


def test_a_student_that_is_no_causal_model_is_refused_in_one_sentence(folder: Path) -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(ValueError) as caught:
        load_student(str(folder))
    assert str(caught.value) == (
        f"student={str(folder)!r}: T5 is no causal language model; name one that continues text, "
        "such as a Llama, a Qwen or a SmolLM"
    )


def test_trained_parameters_are_named_only_in_training(folder: Path) -> None:
    assert "all trained" in load_student(str(folder)).description
    assert "trained" not in load_student(str(folder), training=False).description.split(":")[1]


def test_an_unreachable_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    with pytest.raises(ValueError, match=r"student='nobody/nothing'.*the hub cannot be reached"):
        load_student("nobody/nothing")


def test_a_damaged_model_is_said(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match=r"cannot be loaded: .*no-such-type"):
        load_student(str(folder))
