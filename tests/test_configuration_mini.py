"""MiniConfig: what it refuses and in which words, its presets, and that nothing is lost on the way to disk and back."""

import dataclasses
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from configuration_mini import ROPE_TYPES, MiniConfig
from helpers.shapes import EVERY_FIELD
from modeling_mini import MiniForCausalLM
from shape_mini import NORM_TYPES, PRESETS, Interval, MiniShape, nearest_name
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

NOT_A_NUMBER = float("nan")


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


def assert_one_sentence(error: ValueError, words: list[str]) -> None:
    """The message is one line that says what is wrong and what would be right, and the traceback shows it alone."""
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    printed = "".join(traceback.format_exception(error))
    assert "direct cause" not in printed
    assert "During handling" not in printed


REFUSED = {
    "vocab_size": ({"vocab_size": 0}, ["vocab_size must be at least 1", "got 0"]),
    "hidden_size": ({"hidden_size": 0}, ["hidden_size must be at least 1", "got 0"]),
    "intermediate_size": ({"intermediate_size": -1}, ["intermediate_size must be at least 1", "got -1"]),
    "num_hidden_layers": ({"num_hidden_layers": 0}, ["num_hidden_layers must be at least 1", "got 0"]),
    "num_attention_heads": ({"num_attention_heads": 0}, ["num_attention_heads must be at least 1", "got 0"]),
    "num_key_value_heads": ({"num_key_value_heads": 0}, ["num_key_value_heads must be at least 1", "got 0"]),
    "max_position_embeddings": ({"max_position_embeddings": 0}, ["max_position_embeddings must be at least 1"]),
    "negative heads": ({"num_attention_heads": -8}, ["num_attention_heads must be at least 1", "got -8"]),
    "indivisible width": (
        {"hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1},
        ["hidden_size (100)", "divisible by num_attention_heads (3)", "head_dim"],
    ),
    "odd head_dim": ({"head_dim": 7}, ["head_dim must be even", "got 7"]),
    "zero head_dim": ({"head_dim": 0}, ["head_dim must be even and at least 2", "got 0"]),
    "odd head_dim by division": (
        {"hidden_size": 24, "num_attention_heads": 8, "num_key_value_heads": 8},
        ["head_dim must be even", "got 3"],
    ),
    "indivisible groups": (
        {"num_key_value_heads": 3},
        ["num_attention_heads (8)", "divisible by num_key_value_heads (3)"],
    ),
    "more key/value heads than heads": (
        {"num_key_value_heads": 16},
        ["num_attention_heads (8)", "divisible by num_key_value_heads (16)"],
    ),
    "embedding_dropout": ({"embedding_dropout": 1.0}, ["embedding_dropout must be in [0, 1)", "got 1.0"]),
    "attention_dropout": ({"attention_dropout": -0.1}, ["attention_dropout must be in [0, 1)", "got -0.1"]),
    "residual_dropout": ({"residual_dropout": 2}, ["residual_dropout must be in [0, 1)", "got 2"]),
    "dropout not a number": ({"residual_dropout": NOT_A_NUMBER}, ["residual_dropout must be in [0, 1)", "nan"]),
    "norm_eps": ({"norm_eps": 0.0}, ["norm_eps must be in (0, 1]", "got 0.0"]),
    "norm_eps not a number": ({"norm_eps": NOT_A_NUMBER}, ["norm_eps must be in (0, 1]", "nan"]),
    "initializer_range": ({"initializer_range": 1.5}, ["initializer_range must be in (0, 1]", "got 1.5"]),
    "norm_type": ({"norm_type": "rms"}, ["norm_type must be one of layernorm, rmsnorm", "got 'rms'"]),
    "hidden_act, nearly": ({"hidden_act": "sillu"}, ["hidden_act 'sillu'", "did you mean 'silu'?"]),
    "hidden_act": ({"hidden_act": "zzzzzzzz"}, ["hidden_act 'zzzzzzzz' is not an activation of transformers."]),
    "rope_type": (rope("yran"), ["rope_type must be one of default, dynamic", "yarn", "got 'yran'"]),
    "rope key missing": (rope("linear"), ["Missing required keys", "linear", "factor"]),
    "pad_token_id": ({"pad_token_id": 264}, ["pad_token_id must be within the vocabulary (0 to 263)", "got 264"]),
    "bos_token_id": ({"bos_token_id": -1}, ["bos_token_id must be within the vocabulary (0 to 263)", "got -1"]),
    "eos_token_id": ({"eos_token_id": 999}, ["eos_token_id must be within the vocabulary (0 to 263)", "got 999"]),
    "eos_token_id list": ({"eos_token_id": [2, 300]}, ["eos_token_id must be within the vocabulary", "got 300"]),
    "string for int": ({"hidden_size": "256"}, ["hidden_size", "expected int", "got str", "'256'"]),
    "float for int": ({"hidden_size": 256.0}, ["hidden_size", "expected int", "got float"]),
    "None for int": ({"num_attention_heads": None}, ["num_attention_heads", "expected int", "got NoneType"]),
    "int for bool": ({"qk_norm": 1}, ["qk_norm", "expected bool", "got int"]),
    "string for bool": ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "expected bool", "got str"]),
    "string for id": ({"eos_token_id": "a"}, ["eos_token_id", "list[int]", "got str"]),
    "rope not a number": (rope("linear", factor=NOT_A_NUMBER), ["rope_parameters: factor must be finite", "got nan"]),
    "infinite eps": ({"norm_eps": float("inf")}, ["norm_eps must be in (0, 1]", "got inf"]),
    "string for rope": ({"rope_parameters": "linear"}, ["rope_parameters", "got str", "'linear'"]),
}


@pytest.mark.parametrize(("fields", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_ends_in_one_sentence(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        MiniConfig(**fields)
    assert type(caught.value) is ValueError
    assert_one_sentence(caught.value, ["MiniConfig: ", *words])


# transformers warns of some of these, and all of them end in a traceback or in numbers that mean nothing later on.
ROPE_THAT_CANNOT_WORK = {
    "no rotary features": rope("default", partial_rotary_factor=0.0),
    "more rotary features than features": rope("default", partial_rotary_factor=2.0),
    "negative theta": {"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}},
    "infinite theta": {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
    "theta that is a list": {"rope_parameters": {"rope_type": "default", "rope_theta": [1, 2]}},
    "theta that is nothing": {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    "factor of 0": rope("linear", factor=0),
    "factor that is nothing": rope("linear", factor=None),
    "negative factor": rope("dynamic", factor=-1.0),
    "factor that is text": rope("yarn", factor="abc", original_max_position_embeddings=128),
    "dynamic with one pair": {"head_dim": 2, **rope("dynamic", factor=2.0)},
    "no original context": rope("yarn", factor=2.0, original_max_position_embeddings=0),
    "beta that is text": rope("yarn", factor=2.0, original_max_position_embeddings=128, beta_fast="a"),
    "frequency that is text": rope(
        "llama3", factor=2.0, low_freq_factor="a", high_freq_factor=4.0, original_max_position_embeddings=128
    ),
    "longrope with text": rope(
        "longrope", factor=2.0, short_factor=["a"] * 16, long_factor=[1.0] * 16, original_max_position_embeddings=128
    ),
    "longrope with a number": rope(
        "longrope", factor=2.0, short_factor=2.0, long_factor=[1.0] * 16, original_max_position_embeddings=128
    ),
    "longrope of another width": rope(
        "longrope", factor=2.0, short_factor=[1.0] * 3, long_factor=[1.0] * 3, original_max_position_embeddings=128
    ),
    "longrope with more factors than pairs": rope(
        "longrope", factor=2.0, short_factor=[1.0] * 16, long_factor=[1.0] * 17, original_max_position_embeddings=128
    ),
}


@pytest.mark.parametrize("fields", ROPE_THAT_CANNOT_WORK.values(), ids=ROPE_THAT_CANNOT_WORK)
def test_rope_parameters_that_cannot_work_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match=r"partial_rotary_factor must be|rope_theta must be|(short|long)_factor must"
        r"|: [a-z_]+ of rope_parameters must be (a number|above 0), got",
    ) as caught:
        MiniConfig(**fields)
    assert "\n" not in str(caught.value)


ROPE_WITHOUT_FREQUENCIES = {
    "yarn with a theta of 1": rope("yarn", rope_theta=1.0, factor=2.0, original_max_position_embeddings=128),
    "yarn with a negative beta": rope("yarn", factor=2.0, original_max_position_embeddings=128, beta_fast=-1.0),
    "yarn with a huge factor of attention": rope(
        "yarn", factor=2.0, original_max_position_embeddings=128, attention_factor=1e300
    ),
    "llama3 without a low frequency": rope(
        "llama3", factor=2.0, low_freq_factor=0, high_freq_factor=4.0, original_max_position_embeddings=128
    ),
    "longrope of one token": rope(
        "longrope", factor=2.0, short_factor=[1.0] * 16, long_factor=[1.0] * 16, original_max_position_embeddings=1
    ),
    "longrope that divides by 0 beyond its context": rope(
        "longrope", factor=2.0, short_factor=[1.0] * 16, long_factor=[0.0] * 16, original_max_position_embeddings=128
    ),
    "dynamic with a huge factor": rope("dynamic", rope_theta=1.0, factor=1e300),
    "theta below float32": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e-300}},
}


@pytest.mark.parametrize("fields", ROPE_WITHOUT_FREQUENCIES.values(), ids=ROPE_WITHOUT_FREQUENCIES)
def test_numbers_without_frequencies_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^MiniConfig: (rope_theta must|No frequencies can).*, got [^\n]*\.$"):
        MiniConfig(**{"head_dim": 32, **fields})


def test_a_config_can_be_made_where_a_model_takes_no_memory() -> None:
    with torch.device("meta"):
        assert MiniConfig(**rope("yarn", factor=2.0, original_max_position_embeddings=128)).head_dim == 32


def test_wrong_file_ends_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mini", "num_key_value_heads": 3}')
    with pytest.raises(ValueError) as caught:
        AutoConfig.from_pretrained(tmp_path)
    assert_one_sentence(caught.value, ["num_attention_heads (8)", "divisible by num_key_value_heads (3)"])


def test_wrong_assignment_is_refused_at_once_or_on_saving(tmp_path: Path) -> None:
    config = MiniConfig()
    with pytest.raises(ValueError) as caught:
        config.hidden_size = "wide"
    assert_one_sentence(caught.value, ["hidden_size", "expected int"])
    # The right type with a wrong value waits for its partners (heads and width change one after the other).
    config.norm_type = "batchnorm"
    with pytest.raises(ValueError) as caught:
        config.save_pretrained(tmp_path)
    assert_one_sentence(caught.value, ["norm_type must be one of layernorm, rmsnorm", "'batchnorm'"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0.0, 0, 0.5, 0.999])
def test_dropout_probabilities_that_work(value: float) -> None:
    assert MiniConfig(residual_dropout=value).residual_dropout == value


def test_refusals_name_every_constraint_of_validate_architecture() -> None:
    """Each field that the checks look at stands in REFUSED, so that a new check comes with a new case here."""
    named = set(MiniConfig.validate_architecture.__code__.co_consts) | set(
        MiniConfig.validate_token_ids.__code__.co_consts
    )
    flat = {name for item in named for name in (item if isinstance(item, tuple) else (item,))}
    checked = {name for name in flat if name in MiniConfig.__dataclass_fields__}
    fields = dataclasses.fields(MiniConfig)
    checked |= {field.name for field in fields if field.metadata.get("interval", Interval()) != Interval()}
    assert checked <= {field for fields, _ in REFUSED.values() for field in fields}


# Parameters by count; the widths decide whether 4-bit kernels can take the layers.
@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 0.5), ("small", 2.6), ("medium", 20), ("large", 85), ("gpt2", 124)]
)
def test_presets_have_the_promised_size(name: str, millions: float) -> None:
    config = MiniConfig.preset(name)
    with torch.device("meta"):
        model = MiniForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.04)
    for layer in model.model.modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.in_features % 64 == 0, layer
            assert layer.out_features % 64 == 0, layer


def test_presets_are_all_tested_and_small_is_the_default() -> None:
    assert list(PRESETS) == ["tiny", "small", "medium", "large", "gpt2"]
    assert MiniConfig().to_dict() == MiniConfig.preset("small").to_dict()
    small = MiniConfig()
    assert (small.num_hidden_layers, small.hidden_size, small.num_attention_heads) == (6, 256, 8)
    assert (small.max_position_embeddings, small.vocab_size) == (256, 264)


def test_preset_overrides_replace_and_leave_the_preset_alone() -> None:
    config = MiniConfig.preset("tiny", qk_norm=True, vocab_size=100, hidden_size=192)
    assert (config.qk_norm, config.vocab_size, config.hidden_size) == (True, 100, 192)
    assert config.num_hidden_layers == PRESETS["tiny"]["num_hidden_layers"]
    assert config.head_dim == 192 // 4
    assert MiniConfig.preset("tiny").hidden_size == 128


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MiniConfig.preset("smal"), ["no preset 'smal'", "tiny, small, medium", "did you mean 'small'?"]),
        (lambda: MiniConfig.preset("qqqqq"), ["no preset 'qqqqq'", "tiny, small, medium, large, gpt2."]),
        (lambda: MiniConfig.preset(3), ["no preset 3", "tiny, small"]),
        (lambda: MiniConfig.preset("tiny", hiden_size=3), ["no field 'hiden_size'", "did you mean 'hidden_size'?"]),
        (lambda: MiniConfig.preset("tiny", zzzzzz=3), ["MiniConfig has no field 'zzzzzz'."]),
        (lambda: MiniConfig.preset("tiny", num_key_value_heads=3), ["divisible by num_key_value_heads (3)"]),
    ],
)
def test_preset_refuses_unknown_names_with_the_nearest(call: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert_one_sentence(caught.value, words)


def test_nearest_name() -> None:
    assert nearest_name("gpt-2", list(PRESETS)) == ", did you mean 'gpt2'?"
    assert nearest_name("entirely different", list(PRESETS)) == ""


def test_json_round_trip_loses_no_field(tmp_path: Path) -> None:
    own = {field.name for field in dataclasses.fields(MiniShape)} | set(MiniConfig.__annotations__)
    assert set(EVERY_FIELD) == own, "a new field needs a value here"
    default = MiniConfig()
    config = MiniConfig(**EVERY_FIELD)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MiniConfig
    for name, value in EVERY_FIELD.items():
        assert value != getattr(default, name), f"{name} is at its default, so losing it would go unseen"
        assert getattr(loaded, name) == value, name
    assert loaded.to_json_string() == config.to_json_string()
    # A second trip changes nothing, so the first one added nothing either.
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_defaults_round_trip(tmp_path: Path) -> None:
    MiniConfig().save_pretrained(tmp_path)
    assert MiniConfig.from_pretrained(tmp_path).to_json_string() == MiniConfig().to_json_string()


def test_inherited_fields_round_trip(tmp_path: Path) -> None:
    MiniConfig(id2label={0: "no", 1: "yes", 2: "maybe"}, problem_type="regression", dtype="bfloat16").save_pretrained(
        tmp_path
    )
    loaded = MiniConfig.from_pretrained(tmp_path)
    assert loaded.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert loaded.num_labels == 3
    assert loaded.problem_type == "regression"
    assert loaded.dtype == torch.bfloat16


def test_derived_fields() -> None:
    assert MiniConfig(num_key_value_heads=None).num_key_value_heads == 8
    assert MiniConfig().head_dim == 32
    assert MiniConfig(hidden_size=100, num_attention_heads=3, num_key_value_heads=1, head_dim=32).head_dim == 32
    # A copy never shares its dictionaries with the original.
    first, second = MiniConfig(), MiniConfig()
    first.rope_parameters["rope_theta"] = 1.0
    assert second.rope_parameters["rope_theta"] == 10_000.0


def test_one_key_value_head_is_shared_out_to_nobody() -> None:
    shared = MiniConfig(num_key_value_heads=2).base_model_tp_plan
    assert {name.split(".")[-1] for name in shared if ".self_attn." in name} == {
        "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj"
    }  # fmt: skip
    alone = MiniConfig(num_key_value_heads=1).base_model_tp_plan
    assert alone == {name: style for name, style in shared.items() if ".mlp." in name} and len(alone) == 3


ROPE_CASES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def test_every_rope_type_of_transformers_is_known() -> None:
    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS} == set(ROPE_CASES)


def tiny_model(**fields: Any) -> MiniForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MiniForCausalLM(MiniConfig(**{**sizes, "max_position_embeddings": 32, **fields})).eval()


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_rope_types_construct_run_and_save(rope_type: str, tmp_path: Path) -> None:
    model = tiny_model(**rope(rope_type, **ROPE_CASES[rope_type]))
    # Beyond the original length, where `dynamic` and `longrope` switch to other frequencies.
    ids = torch.randint(8, 264, (2, 40))
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.isfinite(logits).all()
    model.save_pretrained(tmp_path)
    loaded = MiniForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.rope_parameters == model.config.rope_parameters
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, logits, rtol=0, atol=0)


def test_rope_types_differ_from_each_other() -> None:
    """So that no type silently falls back to another."""
    ids = torch.randint(8, 264, (1, 40))
    logits = {}
    for rope_type in ROPE_TYPES:
        torch.manual_seed(1)
        with torch.no_grad():
            logits[rope_type] = tiny_model(**rope(rope_type, **ROPE_CASES[rope_type]))(ids).logits
    names = list(logits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not torch.allclose(logits[first], logits[second], atol=1e-6), (first, second)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_cosine_and_sine_are_scaled_alike(rope_type: str) -> None:
    rotary_emb = tiny_model(**rope(rope_type, **ROPE_CASES[rope_type])).model.rotary_emb
    cos, sin = rotary_emb(torch.zeros(1), position_ids=torch.arange(40)[None])
    scale = rotary_emb.attention_scaling
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, scale**2), rtol=1e-5, atol=0)
    assert (scale != 1) is (rope_type in ("yarn", "longrope"))


def test_default_rope_frequencies_follow_the_formula() -> None:
    inv_freq = tiny_model(**rope("default", partial_rotary_factor=0.5)).model.rotary_emb.inv_freq
    expected = [10_000.0 ** (-2 * i / 8) for i in range(4)]
    torch.testing.assert_close(inv_freq, torch.tensor(expected))


def test_it_is_a_configuration_that_transformers_knows() -> None:
    assert issubclass(MiniConfig, PreTrainedConfig)
    assert dataclasses.is_dataclass(MiniConfig)
    assert isinstance(AutoConfig.for_model("mini"), MiniConfig)
    assert NORM_TYPES == ("layernorm", "rmsnorm")
    assert MiniConfig().keys_to_ignore_at_inference == ["past_key_values"]
