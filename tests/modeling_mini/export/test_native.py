"""A Mini as Llama, Qwen3 or StableLM, and back."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from configuration_mini import PRESETS, ROPE_TYPES, MiniConfig
from helpers import fork_server
from helpers.exports import HALF_TURNED, learned_merges, random_model, same_parameters, without_dtype, write
from modeling_mini.export import export
from modeling_mini.export.mini import mini_config, to_mini
from modeling_mini.export.native import (
    FIELDS_OF_MINI_ALONE,
    SHARED_FIELDS,
    TRANSLATED_FIELDS,
    native_config,
    to_native,
)
from modeling_mini.loading.checkpoints import load_model
from safetensors.torch import load_file
from tokenization import load_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)


def rope_of(draw: random.Random, rope_type: str, rotary_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": draw.choice([500.0, 10_000.0])}
    pairs = rotary_dim // 2
    further = {
        "linear": {"factor": 2.5},
        "dynamic": {"factor": 2.0},
        "proportional": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "longrope": {
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1 + i / 4 for i in range(pairs)],
            "long_factor": [2.0 + i for i in range(pairs)],
        },
    }
    return rope | further.get(rope_type, {})


def random_fields(draw: random.Random, kind: str, rope_type: str) -> dict[str, Any]:
    """Fields of a Mini that `kind` equals."""
    heads = draw.choice([2, 4, 6])
    head_dim = draw.choice([4, 8, 16])
    fields: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "hidden_size": heads * head_dim,
        "intermediate_size": draw.choice([16, 40]),
        "num_hidden_layers": draw.choice([1, 2]),
        "vocab_size": draw.choice([50, 264]),
        "norm_eps": draw.choice([1e-6, 1e-3]),
        "hidden_act": draw.choice(["silu", "gelu", "relu"]),
        "tie_word_embeddings": draw.random() < 0.5,
        "residual_dropout": draw.choice([0.0, 0.1]),
        "embedding_dropout": draw.choice([0.0, 0.1]),
        "attention_dropout": draw.choice([0.0, 0.1]),
    }
    rotary_dim = head_dim
    if kind == "stablelm":
        share = 1.0 if rope_type == "proportional" else draw.choice([1.0, 0.5])
        rotary_dim = int(head_dim * share)
        fields["norm_type"] = "layernorm"
    else:
        share = draw.choice([1.0, 0.5]) if rope_type == "proportional" else 1.0
        fields["norm_type"] = "rmsnorm"
        fields["qk_norm"] = kind == "qwen3"
        fields["attention_bias"] = draw.random() < 0.5
        fields["mlp_bias"] = kind == "llama" and draw.random() < 0.5
        if draw.random() < 0.5:
            fields["head_dim"] = rotary_dim = head_dim * 2
        if kind == "qwen3":
            fields["hidden_size"] += 1  # a width that the heads do not divide
            fields["head_dim"] = rotary_dim
    fields["rope_parameters"] = rope_of(draw, rope_type, rotary_dim)
    if share != 1:
        fields["rope_parameters"]["partial_rotary_factor"] = share
    return fields


CLASSES = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "stablelm": StableLmForCausalLM}


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("kind", CLASSES)
def test_equal_logits_and_the_way_back(kind: str, rope_type: str) -> None:
    for number in range(4):
        draw = random.Random(f"{kind} {rope_type} {number}")
        fields = random_fields(draw, kind, rope_type)
        model = random_model(**fields)
        native = to_native(model)
        assert type(native) is CLASSES[kind], fields
        # Beyond the context too, where dynamic and longrope take other frequencies.
        for length in (20, 64, 90):
            ids = torch.randint(model.config.vocab_size, (2, length))
            ours = logits_of(model, ids)
            assert ours.std() > 0.1
            torch.testing.assert_close(logits_of(native, ids), ours, atol=2e-5, rtol=1e-4)
        back = to_mini(native)
        assert same_parameters(model, back)
        assert without_dtype(back.config) == without_dtype(model.config)
        # A copy: training one leaves the other.
        assert back.model.embed_tokens.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_native_class(name: str) -> None:
    assert type(native_config(MiniConfig.preset(name))) is StableLmConfig
    assert type(native_config(MiniConfig.preset(name, norm_type="rmsnorm"))) is LlamaConfig
    assert type(native_config(MiniConfig.preset(name, norm_type="rmsnorm", qk_norm=True))) is Qwen3Config


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("qk_norm", {"qk_norm": True}),
        ("attention_bias", {"attention_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("head_dim", {"head_dim": 32}),
        ("mlp_bias", {"norm_type": "rmsnorm", "qk_norm": True, "mlp_bias": True}),
        ("hidden_size", {"norm_type": "rmsnorm", "hidden_size": 65, "head_dim": 16}),
        ("partial_rotary_factor", {"norm_type": "rmsnorm", "rope_parameters": HALF_TURNED}),
        ("partial_rotary_factor", {"rope_parameters": HALF_TURNED | {"rope_type": "proportional"}}),
        ("partial_rotary_factor", {"rope_parameters": HALF_TURNED | {"partial_rotary_factor": 0.2}}),
    ],
)  # fmt: skip
def test_what_no_class_equals_is_refused_by_its_field(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"No native class computes this model: {field} is"):
        to_native(random_model(**fields))


@pytest.mark.slow
def test_the_folder_needs_no_code_of_ours(checkpoint: Path, tmp_path: Path) -> None:
    out = export("native", checkpoint, tmp_path / "native")
    assert not list(out.glob("*.py"))
    # What transformers 4, vLLM and MLX read.
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config
    assert (config["rope_theta"], config["partial_rotary_factor"], config["rope_scaling"]) == (10_000, 1, None)
    assert "lm_head.weight" in load_file(out / "model.safetensors")  # MLX does not tie that of StableLM
    ours, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("def f(", return_tensors="pt")
    expected = ours.generate(**prompt, max_new_tokens=40, do_sample=False)
    program = f"""
import sys
sys.path = [path for path in sys.path if path not in ("", {str(Path.cwd())!r})]
from transformers import pipeline
generator = pipeline("text-generation", model={str(out)!r})
assert not {{"modeling_mini", "configuration_mini", "tokenization"}} & set(sys.modules)
ids = generator.model.generate(**generator.tokenizer("def f(", return_tensors="pt"), max_new_tokens=40, do_sample=False)
print(type(generator.model).__name__, ids[0].tolist())
"""
    result = subprocess.run(
        [fork_server.python(), "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"StableLmForCausalLM {expected[0].tolist()}"
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template

    back = export("mini", out, tmp_path / "mini")
    again = AutoModelForCausalLM.from_pretrained(back)
    assert type(again).__name__ == "MiniForCausalLM"
    assert same_parameters(ours, again)
    assert without_dtype(again.config) == without_dtype(ours.config)
    assert (back / "modeling_mini.py").is_file()


def test_trained_weights(quick_run: Path, tmp_path: Path) -> None:
    out = export("native", quick_run, tmp_path / "native")
    ours = AutoModelForCausalLM.from_pretrained(quick_run / "best")
    native = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.randint(8, 264, (4, 64))
    torch.testing.assert_close(logits_of(native, ids), logits_of(ours, ids), atol=1e-5, rtol=1e-5)
    assert native.generation_config.to_dict() == ours.generation_config.to_dict()


@pytest.mark.slow
def test_the_model_that_comes_with_mini(tmp_path: Path) -> None:
    out = export("native", "box", tmp_path / "native")
    native = AutoModelForCausalLM.from_pretrained(out)
    ours, tokenizer = load_model("box", device="cpu")
    ids = tokenizer("def read_lines(path):", return_tensors="pt").input_ids
    written = [model.generate(ids, max_new_tokens=100, do_sample=False) for model in (ours, native)]
    assert written[0].tolist() == written[1].tolist()
    of_ours, of_native = logits_of(ours, written[0]), logits_of(native, written[0])
    assert (of_native - of_ours).abs().max() < 1e-5 * of_ours.abs().max()


def test_learned_merges_go_along(tmp_path: Path) -> None:
    tokenizer = learned_merges()
    model = random_model(vocab_size=len(tokenizer))
    out = export("native", write(model, tmp_path / "m", tokenizer), tmp_path / "out")
    native, theirs = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = "def learned_merges(): héllo 日本\n\n    return <|eos|>"
    assert theirs(text).input_ids == tokenizer(text).input_ids and len(theirs) == native.config.vocab_size == 320
    assert type(load_tokenizer(out)) is type(tokenizer)
    prompt = theirs(text, return_tensors="pt")
    torch.testing.assert_close(native(**prompt).logits, model(**prompt).logits, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    native = to_native(random_model().to(torch.bfloat16))
    assert native.dtype == torch.bfloat16
    assert to_mini(native).dtype == torch.bfloat16


def test_a_model_that_was_never_mini_comes_in(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 60,
    }
    llama = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0)).eval()
    ids = torch.randint(60, (2, 30))
    torch.testing.assert_close(logits_of(to_mini(llama), ids), logits_of(llama, ids), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="sliding_window is 8"):
        mini_config(Qwen3Config(**shape, use_sliding_window=True, sliding_window=8))
    for field in ("use_parallel_residual", "qk_layernorm", "use_qkv_bias"):
        with pytest.raises(ValueError, match=f"{field} is true"):
            mini_config(StableLmConfig(**shape, **{field: True}))
    with pytest.raises(ValueError, match="type llama, qwen3 or stablelm, and this one is 'mini'"):
        to_mini(random_model())
    with pytest.raises(ValueError, match="type llama, qwen3 or stablelm, and this one is 'gpt2'"):
        mini_config(GPT2Config())
    with pytest.raises(ValueError, match="native takes a Mini, and this is a model of type 'llama'"):
        to_native(llama)


def test_a_model_that_is_not_what_its_config_says_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_mini.modeling_mini import MiniMLP

    original = MiniMLP.forward
    monkeypatch.setattr(MiniMLP, "forward", lambda self, states: 2 * original(self, states))
    from modeling_mini.export.native import export_native
    from tokenization import ByteTokenizer

    with pytest.raises(ValueError, match="StableLmForCausalLM gives other logits"):
        export_native(random_model(), ByteTokenizer(), tmp_path)


def test_every_field_of_a_mini_has_been_thought_of() -> None:
    """One that is added later is shared by all three classes, or it is translated, or Mini's alone."""
    for config_class in (LlamaConfig, Qwen3Config, StableLmConfig):
        assert set(SHARED_FIELDS) <= set(config_class.__dataclass_fields__)
    others = {*FIELDS_OF_MINI_ALONE, *TRANSLATED_FIELDS}
    assert {*SHARED_FIELDS, *others} == set(MiniConfig.own_fields()) and not others & set(SHARED_FIELDS)
