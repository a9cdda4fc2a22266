"""llama.cpp runs what gguf.py writes. llama-cpp-python is built in about twenty minutes, so CI may be without it."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.exports import HALF_TURNED, bpe_tokenizer, learned_merges, random_model, write, write_adapter
from modeling_mini.export import export
from modeling_mini.loading.checkpoints import load_model
from tokenization import SPECIAL_TOKENS, ByteTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install llama-cpp-python)")
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def loaded(file: Path, **options: Any) -> Iterator[Any]:
    """A GGUF file in llama.cpp on one thread, with a cache as exact as Mini's: its default is F16."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    with contextlib.closing(llama_cpp.Llama(str(file), n_threads=1, verbose=False, **{**exact, **options})) as llama:
        yield llama


def logits_of(llama: Any, ids: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": False, "rope_parameters": HALF_TURNED, "norm_eps": 1e-3},
        {"rope_parameters": LINEAR},
        {"norm_type": "rmsnorm"},
        {"norm_type": "rmsnorm", "attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_key_value_heads": 1},
        {"norm_type": "rmsnorm", "rope_parameters": YARN},
        {"norm_type": "rmsnorm", "rope_parameters": LLAMA3, "tie_word_embeddings": False},
        {"norm_type": "rmsnorm", "rope_parameters": LINEAR},
        {"norm_type": "rmsnorm", "rope_parameters": HALF_TURNED | {"rope_type": "proportional"}},
        {"norm_type": "rmsnorm", "qk_norm": True},
        {"norm_type": "rmsnorm", "qk_norm": True, "head_dim": 32, "rope_parameters": LINEAR},
    ],
    ids=str,
)
def test_logits(fields: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(**fields)
    out = export("gguf", write(model, tmp_path / "m"), tmp_path / "out")
    ids = torch.randint(264, (60,)).tolist()
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    # By type: what the rounding of weights and of the states that meet them leaves.
    for type_name, tolerance in {"F32": 2e-5, "F16": 1e-2, "Q8_0": 1e-1}.items():
        with loaded(out / f"m-{type_name}.gguf", n_ctx=64, logits_all=True) as llama:
            difference = np.abs(logits_of(llama, ids) - ours).max() / np.abs(ours).max()
        assert difference < tolerance, type_name


KINDS = pytest.mark.parametrize(
    "fields",
    [{}, {"norm_type": "rmsnorm"}, {"norm_type": "rmsnorm", "qk_norm": True}],
    ids=["stablelm", "llama", "qwen3"],
)
ADAPTERS = {
    "all layers": {"target_modules": "all-linear"},
    "two layers, rsLoRA": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "ranks and scales of its own": {
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"up_proj": 16},
    },
    "beside the embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "beside norms": {"modules_to_save": ["norm", "input_layernorm"]},
}


@KINDS
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_logits_of_an_adapter_beside_its_base(settings: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(**fields)
    folder = write_adapter(write(model, tmp_path / "m"), tmp_path / "adapter", **settings)
    out = export("gguf", folder, tmp_path / "out", types=["F32"], lora=True)
    ids = torch.randint(264, (60,)).tolist()
    merged, _ = load_model(str(folder), device="cpu")
    with torch.no_grad():
        ours = merged(input_ids=torch.tensor([ids])).logits[0].numpy()
        of_base = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    with loaded(
        next(out.glob("*-F32.gguf")), lora_path=str(out / "adapter-lora.gguf"), n_ctx=64, logits_all=True
    ) as llama:
        theirs = logits_of(llama, ids)
    assert np.abs(theirs - ours).max() / np.abs(ours).max() < 2e-5
    assert np.abs(theirs - of_base).max() / np.abs(ours).max() > 1e-2


@KINDS
def test_greedy_writes_the_same_200_tokens(fields: dict[str, Any], tmp_path: Path) -> None:
    model = random_model(**fields, max_position_embeddings=256)
    folder = write(model, tmp_path / "m")
    out = export("gguf", folder, tmp_path / "out", types=["F32"])
    prompt = AutoTokenizer.from_pretrained(folder)("def f(x):", return_tensors="pt")
    ours = model.generate(**prompt, max_new_tokens=200, do_sample=False, eos_token_id=None)[0]
    ours = ours[prompt.input_ids.shape[1] :].tolist()
    assert len(set(ours)) > 5
    with loaded(out / "m-F32.gguf", n_ctx=256) as llama:
        theirs = llama.generate(llama.tokenize(b"def f(x):"), temp=0)
        assert [next(theirs) for _ in range(200)] == ours


def test_trained_weights_write_the_same(quick_run: Path, tmp_path: Path) -> None:
    out = export("gguf", quick_run, tmp_path / "out", types=["F32"])
    model = AutoModelForCausalLM.from_pretrained(quick_run / "best")
    tokenizer = AutoTokenizer.from_pretrained(quick_run / "best")
    prompt = tokenizer("The ", return_tensors="pt")
    ours = model.generate(**prompt, max_new_tokens=50, do_sample=False)[0][prompt.input_ids.shape[1] :]
    with loaded(out / "tiny-sample-F32.gguf", n_ctx=64) as llama:
        completion = llama.create_completion("The ", max_tokens=50, temperature=0)
    assert completion["choices"][0]["text"] == tokenizer.decode(ours, skip_special_tokens=True)


def random_text(draw: random.Random) -> str:
    """Any characters that UTF-8 can hold, words, white space, and what looks like a special token."""
    pieces = []
    for _ in range(draw.randrange(1, 12)):
        kind = draw.randrange(6)
        if kind == 0:
            code_points = (draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]) for _ in range(5))
            pieces.append("".join(map(chr, code_points)))
        elif kind == 1:
            pieces.append(draw.choice(SPECIAL_TOKENS))
        elif kind == 2:
            pieces.append(draw.choice(["<|", "|>", "<|eos|", "<|bos|>|>", "\0", "ĀĀ", "\0\0", "ÿÿ", "▁", " ▁ "]))
        elif kind == 3:
            pieces.append("".join(draw.choice([" ", "\n", "\t", "\r", "\u00a0", "\u3000"]) for _ in range(4)))
        elif kind == 4:
            pieces.append(
                draw.choice(["hello world", "he'll", " 1234567", "don't .", " , ' ? !", "éèê", "日本語", "👩‍👩‍👧"])
            )
        else:
            pieces.append("".join(chr(draw.randrange(256)) for _ in range(6)))
    return "".join(pieces)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), bpe_tokenizer(), learned_merges()], ids=["byte", "gpt2", "bpe"])
def test_any_text_has_the_same_ids_and_comes_back(tokenizer: Any, tmp_path: Path) -> None:
    folder = write(random_model(vocab_size=len(tokenizer), eos_token_id=0), tmp_path / "m", tokenizer)
    out = export("gguf", folder, tmp_path / "out", types=["Q8_0"])
    with loaded(out / "m-Q8_0.gguf", vocab_only=True) as llama:
        for seed in range(3_000):
            text = random_text(random.Random(seed))
            data = text.encode("utf-8")
            assert llama.tokenize(data, special=True) == tokenizer(text).input_ids, repr(text)
            plain = tokenizer(text, split_special_tokens=True, add_special_tokens=False).input_ids
            assert llama.tokenize(data, add_bos=False, special=False) == plain, repr(text)
            assert llama.detokenize(plain) == data, repr(text)


def test_text_comes_back_whole_by_the_call_of_the_server(checkpoint: Path, tmp_path: Path) -> None:
    """`llama_detokenize`, which may drop spaces before punctuation, as `llama_token_to_piece` does not."""
    out = export("gguf", checkpoint, tmp_path / "out", types=["Q8_0"])
    text = b"so , he 's ' here ' . And ?"
    with loaded(out / "checkpoint-Q8_0.gguf", vocab_only=True) as llama:
        ids = llama.tokenize(text, add_bos=False)
        buffer = (llama_cpp.ctypes.c_char * 100)()
        array = (llama_cpp.llama_token * len(ids))(*ids)
        length = llama_cpp.llama_detokenize(llama._model.vocab, array, len(ids), buffer, 100, False, False)
    assert bytes(buffer[:length]) == text


def test_chat(checkpoint: Path, tmp_path: Path) -> None:
    out = export("gguf", checkpoint, tmp_path / "out", types=["F32"])
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ours = model.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=[2, 7])[0]
    ours = ours[prompt.input_ids.shape[1] :]
    with loaded(out / "checkpoint-F32.gguf", n_ctx=64) as llama:
        answer = llama.create_chat_completion(messages, max_tokens=20, temperature=0)
    assert answer["usage"]["prompt_tokens"] == prompt.input_ids.shape[1]
    # It leaves bytes out that are no UTF-8, and writes on until the last character is whole.
    expected = tokenizer.decode(ours, skip_special_tokens=True).replace("\ufffd", "")
    assert len(expected) >= 8
    assert answer["choices"][0]["message"]["content"].startswith(expected)
