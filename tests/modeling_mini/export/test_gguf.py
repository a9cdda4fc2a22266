"""The GGUF files themselves, read with the `gguf` package; test_llama_cpp.py runs them."""

import itertools
import random
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import regex
import torch
from cards_mini import CARD, Facts, render
from helpers.exports import bpe_tokenizer, learned_merges, random_model, write, write_adapter
from modeling_mini.export import export
from modeling_mini.export.card import name_for_files
from modeling_mini.export.gguf_vocabulary import Vocabulary, without_generation_marks
from tokenization import SPECIAL_TOKENS, ByteTokenizer, CharTokenizer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode


def value_of(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def tensors_of(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


# What a type may change of a weight: nothing; eleven bits of its own; a 127th of half the largest of its block.
ROUNDING = {"F32": 0.0, "F16": 2**-11, "Q8_0": 1 / 127}


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ROUNDING)
def test_the_weights_are_in_the_file(type_name: str, checkpoint: Path, tmp_path: Path) -> None:
    out = export("gguf", checkpoint, tmp_path / "out", types=[type_name])
    assert sorted(path.name for path in out.iterdir()) == ["README.md", f"checkpoint-{type_name}.gguf"]
    reader = gguf.GGUFReader(out / f"checkpoint-{type_name}.gguf")
    tensors = tensors_of(reader)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output.weight": model.lm_head.weight,  # llama.cpp's stablelm wants its own, though Mini ties it
        "output_norm.weight": model.model.norm.weight,
        "output_norm.bias": model.model.norm.bias,
    }
    for i, layer in enumerate(model.model.layers):
        for name, module in {
            "attn_norm": layer.input_layernorm,
            "ffn_norm": layer.post_attention_layernorm,
            "attn_q": layer.self_attn.q_proj,
            "attn_k": layer.self_attn.k_proj,
            "attn_v": layer.self_attn.v_proj,
            "attn_output": layer.self_attn.o_proj,
            "ffn_gate": layer.mlp.gate_proj,
            "ffn_up": layer.mlp.up_proj,
            "ffn_down": layer.mlp.down_proj,
        }.items():
            expected |= {f"blk.{i}.{name}.{kind}": parameter for kind, parameter in module.named_parameters()}
    assert tensors.keys() == expected.keys()
    for name, parameter in expected.items():
        values = parameter.detach().numpy()
        tolerance = ROUNDING[type_name] * np.abs(values).max() if values.ndim == 2 else 0.0
        np.testing.assert_allclose(tensors[name], values, atol=tolerance, rtol=0, err_msg=name)
    types = {t.tensor_type.name for t in reader.tensors}
    assert types == {"F32", type_name}
    assert value_of(reader, "general.architecture") == "stablelm"
    config = model.config
    for key, value in {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_epsilon": np.float32(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": 10_000.0,
        "use_parallel_residual": False,
    }.items():
        assert value_of(reader, f"stablelm.{key}") == value, key


def test_the_tokenizer_is_in_the_file(checkpoint: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(export("gguf", checkpoint, tmp_path / "out", types=["F16"]) / "checkpoint-F16.gguf")
    tokenizer = ByteTokenizer()
    tokens = value_of(reader, "tokenizer.ggml.tokens")
    assert tokens == tokenizer.convert_ids_to_tokens(list(range(264)))
    types = value_of(reader, "tokenizer.ggml.token_type")
    control, unknown, normal = gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN, gguf.TokenType.NORMAL
    assert types == [control] * 3 + [unknown] + [control] * 4 + [normal] * 256
    for key, value in {"bos": 1, "eos": 2, "unknown": 3, "padding": 0, "eot": 7}.items():
        assert value_of(reader, f"tokenizer.ggml.{key}_token_id") == value
    assert value_of(reader, "tokenizer.ggml.add_bos_token") is True


def test_rows_are_paired_as_llama_cpp_turns_them(tmp_path: Path) -> None:
    model = random_model(norm_type="rmsnorm", attention_bias=True, tie_word_embeddings=True, head_dim=8)
    out = export("gguf", write(model, tmp_path / "m"), tmp_path / "out", types=["F32"])
    tensors = tensors_of(gguf.GGUFReader(out / "m-F32.gguf"))
    assert "output.weight" not in tensors  # tied there as well
    attention = model.model.layers[1].self_attn
    for name, projection in {"attn_q": attention.q_proj, "attn_k": attention.k_proj}.items():
        for kind, parameter in projection.named_parameters():
            heads = tensors[f"blk.1.{name}.{kind}"].reshape(-1, 8, *parameter.shape[1:])
            expected = parameter.detach().numpy().reshape(-1, 8, *parameter.shape[1:])
            for pair in range(4):
                np.testing.assert_array_equal(heads[:, 2 * pair], expected[:, pair])
                np.testing.assert_array_equal(heads[:, 2 * pair + 1], expected[:, pair + 4])
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], attention.v_proj.weight.detach().numpy())


def test_rows_that_are_no_block_are_f16(tmp_path: Path) -> None:
    model = random_model(hidden_size=40, intermediate_size=64)
    out = export("gguf", write(model, tmp_path / "m"), tmp_path / "out", types=["Q8_0"])
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "m-Q8_0.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "F16" and types["blk.0.ffn_down.weight"] == "Q8_0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sentence", "fields"),
    [
        ("hidden_act is gelu", {"hidden_act": "gelu"}),
        ("qk_norm is True", {"qk_norm": True}),
        ("no bias in o_proj", {"norm_type": "rmsnorm", "qk_norm": True, "attention_bias": True}),
        ("rope_type is dynamic", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        (
            "rope_type is proportional, and stablelm there",
            {"rope_parameters": {"rope_type": "proportional"}},
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(sentence: str, fields: dict[str, Any], tmp_path: Path) -> None:
    folder = write(random_model(**fields), tmp_path / "m")
    with pytest.raises(ValueError, match=sentence):
        export("gguf", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_llama_cpp_has_not_are_refused(tmp_path: Path) -> None:
    characters = CharTokenizer.from_text("abc")
    with pytest.raises(
        ValueError, match=r"its tokens are single characters, and .* Export the model as native or onnx"
    ):
        Vocabulary.of(characters, len(characters))
    words = TokenizersBackend(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ValueError, match="cannot read text as this tokenizer does: its tokens are no bytes, and there"):
        Vocabulary.of(words, 2)
    with pytest.raises(ValueError, match="add_prefix_space"):
        Vocabulary.of(ByteTokenizer(add_prefix_space=True), 264)
    with pytest.raises(ValueError, match="264 tokens and the model 200"):
        Vocabulary.of(ByteTokenizer(), 200)
    padded = Vocabulary.of(ByteTokenizer(), 266)
    assert padded.tokens[264:] == ["[UNUSED264]", "[UNUSED265]"]
    assert padded.types[264:] == [gguf.TokenType.UNUSED] * 2


def test_merges_go_along() -> None:
    vocabulary = Vocabulary.of(bpe_tokenizer(), 264)
    assert vocabulary.split == "trillion"  # the split of GPT-2, and text that comes back as it is
    assert vocabulary.merges[:3] == ["h e", "l l", "he ll"]
    assert not vocabulary.add_bos


@pytest.mark.slow
def test_learned_merges_are_in_the_file(tmp_path: Path) -> None:
    """What llama.cpp does with the file, written down again: the split of `trillion`, and the first merge first."""
    tokenizer = learned_merges()
    model = random_model(vocab_size=len(tokenizer))
    reader = gguf.GGUFReader(
        export("gguf", write(model, tmp_path / "m", tokenizer), tmp_path / "out", types=["F16"]) / "m-F16.gguf"
    )
    tokens = value_of(reader, "tokenizer.ggml.tokens")
    assert tokens == tokenizer.convert_ids_to_tokens(list(range(320)))
    assert value_of(reader, "tokenizer.ggml.pre") == "trillion"
    assert value_of(reader, "tokenizer.ggml.add_bos_token") is True
    assert set(value_of(reader, "tokenizer.ggml.token_type")[8:]) == {gguf.TokenType.NORMAL}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(value_of(reader, "tokenizer.ggml.merges"))}
    ids = {token: i for i, token in enumerate(tokens)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s")

    def encode(text: str) -> list[int]:
        result = []
        for word in words.findall(text):
            symbols = [bytes_to_unicode()[byte] for byte in word.encode()]
            while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
                place = list(itertools.pairwise(symbols)).index(min(pairs, key=ranks.__getitem__))
                symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
            result += [ids[symbol] for symbol in symbols]
        return result

    source = Path(__file__).read_text(encoding="utf-8")
    draw = random.Random(0)
    texts = [source[i : i + 200] for i in range(0, 4000, 200)]
    texts += ["".join(draw.choices(" \n\thelo日本ü.'s12_(\u3000", k=20)) for _ in range(200)]
    for text in texts:
        assert encode(text) == tokenizer(text, add_special_tokens=False).input_ids, text


def test_the_chat_template_is_what_others_can_parse() -> None:
    template = ByteTokenizer().chat_template
    assert "generation -" in template
    plain = without_generation_marks(template)
    messages = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": " ho\n"}]
    rendered = jinja2.Environment().from_string(plain).render(messages=messages, bos_token=SPECIAL_TOKENS[1])
    assert rendered == ByteTokenizer().apply_chat_template(messages, tokenize=False)


def test_a_weight_beyond_f16_is_refused(tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    folder = write(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has weights that are too large for F16"):
        export("gguf", folder, tmp_path / "out", types=["F16"])


@pytest.mark.slow
def test_the_matrices_of_an_adapter_are_in_a_file_beside_the_base(tmp_path: Path) -> None:
    """What llama.cpp makes of the two files, written down again: W + alpha / r B A is the weight when merged."""
    base = write(random_model(norm_type="rmsnorm"), tmp_path / "m")
    targets = ["q_proj", "k_proj", "o_proj", "up_proj"]
    adapter = write_adapter(
        base, tmp_path / "adapter", target_modules=targets, use_rslora=True, rank_pattern={"k_proj": 2},
        modules_to_save=["embed_tokens"], ensure_weight_tying=True,
    )  # fmt: skip
    facts = Facts(kind="adapter", dataset="talks", base="m", is_chat=True, prompts=["Who?"])
    (adapter / CARD).write_text(render(facts, {}, {}), encoding="utf-8")
    out = export("gguf", adapter, tmp_path / "out", types=["F32"], lora=True)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter-base-F32.gguf", "adapter-lora.gguf"]
    reader = gguf.GGUFReader(out / "adapter-lora.gguf")
    for key, value in {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 6.0
    }.items():  # fmt: skip
        assert value_of(reader, key) == value, key
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}
    matrices, base_tensors = tensors_of(reader), tensors_of(gguf.GGUFReader(out / "adapter-base-F32.gguf"))
    merged = export("gguf", adapter, tmp_path / "merged", types=["F32"])
    merged = tensors_of(gguf.GGUFReader(merged / "adapter-F32.gguf"))
    assert len(matrices) == 2 * len(targets) * 2
    for name, weight in base_tensors.items():
        if f"{name}.lora_a" in matrices:
            a, b = matrices.pop(f"{name}.lora_a"), matrices.pop(f"{name}.lora_b")
            weight = weight + 6.0 / len(a) * b @ a
        np.testing.assert_allclose(weight, merged[name], atol=2e-6, err_msg=name)
    assert not matrices
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "-m adapter-base-F32.gguf --lora adapter-lora.gguf -cnv\n" in card
    assert '"content": "Who?"' in card and "fine-tuned on `talks`.\n" in card
    assert "--lora adapter-lora.gguf" in card and "together with `embed_tokens`" in card and "rsLoRA, alpha 6" in card


@pytest.mark.slow
def test_files_of_two_adapters_of_a_base_can_lie_in_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    names: list[str] = []
    for name, lora in (("one", True), ("two", True), ("one", False), ("two", False)):
        adapter = write_adapter(checkpoint, tmp_path / name)
        out = export("gguf", adapter, tmp_path / "out", overwrite=True, types=["F32"], lora=lora)
        assert value_of(gguf.GGUFReader(next(out.glob(f"{name}-*.gguf"))), "general.name") == name
        names += sorted(path.name for path in out.glob("*.gguf"))
    beside = ["checkpoint-F32.gguf", "one-lora.gguf", "checkpoint-F32.gguf", "two-lora.gguf"]  # the same base
    assert names == [*beside, "one-F32.gguf", "two-F32.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sentence", "settings"),
    [
        ("trained with use_dora", {"use_dora": True}),
        ("trains biases", {"bias": "all"}),
        ("trains biases", {"lora_bias": True}),
        ("both are one matrix", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("trains single tokens", {"trainable_token_indices": [8, 9]}),
    ],
)
def test_adapters_that_llama_cpp_cannot_have_are_refused(
    sentence: str, settings: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(checkpoint, tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=rf"cannot have this adapter beside its base: it .*{sentence}.* --lora to"):
        export("gguf", adapter, tmp_path / "out", lora=True)
    assert not (tmp_path / "out").exists()


def test_files_have_names_that_a_command_line_and_the_hub_take(tmp_path: Path) -> None:
    for name, expected in {"my run (2)": "my-run-2-", "größe_1.5": "größe_1.5", "(2) run": "2-run"}.items():
        (tmp_path / name / "best").mkdir(parents=True)
        assert name_for_files(str(tmp_path / name / "best")) == expected
    assert name_for_files("user/name") == "name"


def test_an_untied_embedding_has_no_place_for_an_adapter(tmp_path: Path) -> None:
    base = write(random_model(tie_word_embeddings=False), tmp_path / "m")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"base: model\.embed_tokens has an adapter of the kind Embedding, and llama"):
        export("gguf", adapter, tmp_path / "out", lora=True)


def test_a_model_is_no_adapter(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora is for the folder of an adapter, and '.*' is a model"):
        export("gguf", checkpoint, tmp_path / "out", lora=True)
