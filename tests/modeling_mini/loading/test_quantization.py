"""INT8 and INT4 through the real bitsandbytes: loaded, saved, loaded again, and refused where it would be wrong."""

import json
import shutil
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from modeling_mini.export.quantized import run as quantize
from modeling_mini.loading.checkpoints import load_checkpoint, load_model
from tokenization import ByteTokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

LAYERS = {"8bit": bitsandbytes.nn.Linear8bitLt, "4bit": bitsandbytes.nn.Linear4bit}
CONFIGS = {
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
}
IDS = torch.randint(8, 264, (2, 20), generator=torch.Generator().manual_seed(1))


def save(folder: Path, size: str = "tiny", **fields: object) -> Path:
    """A checkpoint folder with random weights, larger than they begin, so that every layer tells in the logits."""
    torch.manual_seed(3)
    fields = {"num_hidden_layers": 1, **fields}
    MiniForCausalLM(MiniConfig.preset(size, initializer_range=0.06, **fields)).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    return save(tmp_path_factory.mktemp("checkpoint"), num_key_value_heads=1, **shape)


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def quantized(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """The kind, and a folder that the command wrote."""
    folder = tmp_path_factory.mktemp("quantized") / "folder"
    quantize([str(checkpoint), str(folder), f"--load_in_{request.param}"])
    return request.param, folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "medium", "large", "gpt2"])
def test_every_preset_quantizes_rightly(size: str, tmp_path: Path) -> None:
    folder = save(tmp_path, size, vocab_size=264, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    exact = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(exact)
    for kind in CONFIGS:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[kind])
        layer = model.model.layers[0]
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            assert type(module) is LAYERS[kind]
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.float32
        if kind == "8bit":
            assert 1e-4 < distance(logits(model), before) < 0.05
        else:
            for name, module in exact.model.layers.named_modules():
                if isinstance(module, torch.nn.Linear):
                    weight = rounded(module.weight.data)
                    assert 0.05 < distance(weight, module.weight.data) < 0.1, name
                    module.weight.data = weight
            # Equal to the weights as rounded, but for bfloat16 within.
            assert distance(logits(model), logits(exact)) < 0.02


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What nf4 with double quantization leaves of a weight, by the functions that layers do not go through."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return bitsandbytes.functional.dequantize_4bit(packed, state)


def test_shapes_that_would_be_wrong_are_refused_with_mini_and_from_the_code_of_the_folder(tmp_path: Path) -> None:
    folder = save(tmp_path, intermediate_size=80)
    exact = logits(AutoModelForCausalLM.from_pretrained(folder))
    remote = get_class_from_dynamic_module("modeling_mini.MiniForCausalLM", folder)
    assert remote is not MiniForCausalLM
    for load in (AutoModelForCausalLM.from_pretrained, remote.from_pretrained):
        with pytest.raises(ValueError, match=r"mlp\.gate_proj \(80 x 128\).*mlp\.down_proj \(128 x 80\)") as caught:
            load(folder, quantization_config=CONFIGS["4bit"])
        assert "q_proj" not in str(caught.value)
        skipped = ["down_proj", "gate_proj", "lm_head", "up_proj"]
        assert f"llm_int8_skip_modules={skipped}" in str(caught.value)
        advised = load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped))
        assert type(advised.model.layers[0].self_attn.o_proj) is LAYERS["4bit"]
        assert type(advised.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert 1e-3 < distance(logits(advised), exact) < 0.3
        assert distance(logits(load(folder, quantization_config=CONFIGS["8bit"])), exact) < 0.03
    # For a model whose class does not check itself, loading does.
    with pytest.raises(ValueError, match=r"mlp\.gate_proj \(80 x 128\)"):
        load_checkpoint(str(folder), quantization="4bit")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_list_of_skipped_layers_has_to_name_the_tied_head(checkpoint: Path, kind: str) -> None:
    config = BitsAndBytesConfig(**{f"load_in_{kind}": True}, llm_int8_skip_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"lm_head is the embedding too.*has to name 'lm_head'"):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)


@pytest.mark.slow
def test_a_quantized_folder_loads_saves_and_loads_again(quantized: tuple[str, Path], checkpoint: Path, tmp_path: Path):
    kind, folder = quantized
    expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=CONFIGS[kind]))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded.model.layers[1].mlp.up_proj) is LAYERS[kind]
    assert torch.equal(logits(loaded), expected)
    remote = get_class_from_dynamic_module("modeling_mini.MiniForCausalLM", folder)
    assert torch.equal(logits(remote.from_pretrained(folder)), expected)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "unused")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "unused")), expected)
    # For use on some CPUs bitsandbytes repacks INT4, which rounds the scales of the blocks once more.
    loaded.save_pretrained(tmp_path / "used")
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "used")), expected) < 0.02
    assert {path.name for path in checkpoint.iterdir()} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_a_quantized_folder_needs_no_flag_and_takes_none(quantized: tuple[str, Path], checkpoint: Path) -> None:
    kind, folder = quantized
    model, tokenizer = load_model(str(folder))
    assert torch.equal(logits(model), logits(load_model(str(checkpoint), quantization=kind)[0]))
    assert tokenizer("é").input_ids == ByteTokenizer()("é").input_ids
    for flag in ("8bit", "4bit"):
        with pytest.raises(ValueError, match="quantized already: load it without load_in_8bit and load_in_4bit"):
            load_model(str(folder), quantization=flag)


def test_a_quantized_folder_is_not_loaded_as_another_kind(quantized: tuple[str, Path]) -> None:
    """transformers warns once in a process and keeps the kind of the folder."""
    kind, folder = quantized
    other = {"8bit": "4bit", "4bit": "8bit"}[kind]
    words = f"is in INT{kind[0]} already and was asked for in INT{other[0]}"
    with pytest.warns(UserWarning, match="will be used"), pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[other])
    with pytest.warns(UserWarning, match="will be used"):
        model = MiniForCausalLM.from_pretrained(folder, quantization_config=CONFIGS[kind])
    assert type(model.model.layers[0].mlp.up_proj) is LAYERS[kind]


def test_what_the_command_writes(quantized: tuple[str, Path], checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    kind, folder = quantized
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config[f"load_in_{kind}"] and config["quant_method"] == "bitsandbytes"
    if kind == "4bit":
        assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"]
    assert f"quantized to INT{kind[0]}" in (folder / "README.md").read_text()
    sizes = [(place / "model.safetensors").stat().st_size for place in (folder, checkpoint)]
    assert sizes[0] < 0.6 * sizes[1]
    quantize([str(checkpoint), str(folder), f"--load_in_{kind}", "--overwrite"])
    assert capsys.readouterr().out == f"{folder}: {sizes[0] / 1e6:.1f} MB of weights\n"
    assert not list(folder.parent.glob(".*"))


def test_bad_input_of_the_command(quantized: tuple[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    kind, folder = quantized
    out = str(tmp_path / "out")
    for arguments, message in (
        ([str(checkpoint), out], "Give load_in_8bit or load_in_4bit."),
        ([str(checkpoint), out, "--load_in_8bit", "--load_in_4bit"], "not both"),
        ([str(checkpoint), "--load_in_8bit"], "The checkpoint and the folder to write come first"),
        ([str(checkpoint), str(folder), "--load_in_8bit"], "already: name another folder, or --overwrite it"),
        ([str(checkpoint), str(checkpoint), "--load_in_8bit", "--overwrite"], "would be lost: name another folder"),
        ([str(folder), out, f"--load_in_{kind}"], "is quantized already"),
        ([str(folder), out], "is quantized already. An adapter merged into it is rounded"),
        ([str(tmp_path / "none"), out, "--load_in_8bit"], "There is no run or checkpoint folder"),
    ):
        with pytest.raises(ValueError) as caught:
            quantize(arguments)
        assert message in str(caught.value)
        assert not Path(out).exists()


def test_a_device_without_support_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda", "xpu"})
    for kind in ("8bit", "4bit"):
        with pytest.raises(ValueError, match="no quantized weights on the device 'cpu'; it has them on cuda, xpu"):
            load_model(str(checkpoint), quantization=kind, device="cpu")


def test_a_missing_bitsandbytes_is_named(quantized: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        load_model(str(quantized[1]))


def test_damaged_weights_are_named(quantized: tuple[str, Path], tmp_path: Path) -> None:
    shutil.copytree(quantized[1], tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="are damaged or cut short"):
        load_model(str(tmp_path / "damaged"))
