"""Entropies against a computation by hand and against cases with a known answer; the model is left as it was."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configuration_mini import MiniConfig
from matplotlib import image
from modeling_mini import MiniForCausalLM
from modeling_mini.analysis import (
    AttentionSummary,
    attention_weights,
    draw_attention,
    drawing,
    eager_attention,
    prompt_ids,
    summarize_attention,
    text_windows,
    token_labels,
)
from modeling_mini.analysis.figures import figure_file
from tokenization import ByteTokenizer, CharTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}
IDS = torch.tensor([[1, 70, 71, 72, 73, 70], [1, 90, 80, 70, 60, 50]])


@pytest.fixture(params=[MiniForCausalLM, LlamaForCausalLM])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    config = MiniConfig(**SIZES) if request.param is MiniForCausalLM else LlamaConfig(**SIZES)
    return request.param(config).eval()


def test_entropy_is_that_of_a_computation_by_hand(model: PreTrainedModel) -> None:
    summary = summarize_attention(model, IDS)
    model.set_attn_implementation("eager")
    attentions = model(input_ids=IDS, output_attentions=True).attentions
    for layer in range(2):
        for head in range(4):
            expected = [
                -sum(p * math.log(p) for p in attentions[layer][row, head, query].tolist() if p > 0)
                for row in range(2)
                for query in range(1, 6)
            ]
            assert summary.entropy[layer, head].item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
            mean_map = (attentions[layer][0, head] + attentions[layer][1, head]) / 2
            torch.testing.assert_close(summary.maps[layer, head], mean_map)
    maximum = sum(math.log(keys) for keys in range(2, 7)) / 5
    assert summary.maximum_entropy == pytest.approx(maximum)
    assert len(set(summary.entropy.flatten().tolist())) == 8  # heads differ, or the test could not tell them apart


def test_uniform_attention_has_the_whole_maximum(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    summary = summarize_attention(model, IDS)
    torch.testing.assert_close(summary.share, torch.ones(2, 4))
    torch.testing.assert_close(summary.maps[0, 0, 3], torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]))


def test_attention_to_one_key_has_no_entropy(model: PreTrainedModel) -> None:
    # Equal tokens have equal keys but for their turn; a huge query makes the softmax choose one.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 1e5
    summary = summarize_attention(model, IDS)
    assert summary.share.max() < 0.01


def test_entropy_of_a_mean_is_not_the_mean_of_entropies(model: PreTrainedModel) -> None:
    both = summarize_attention(model, IDS)
    first, second = (summarize_attention(model, row[None]) for row in IDS)
    torch.testing.assert_close(both.entropy, (first.entropy + second.entropy) / 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_model_is_as_before(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    model.train()
    model.model.layers[0].eval()
    summarize_attention(model, IDS)
    assert model.config._attn_implementation == model.model.config._attn_implementation == implementation
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


def test_model_is_as_before_after_an_error(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")
    model.train()
    with pytest.raises(RuntimeError), eager_attention(model):
        assert model.config._attn_implementation == "eager" and not model.training
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa" and model.training
    with pytest.raises(IndexError):
        summarize_attention(model, IDS + 10_000)
    assert model.config._attn_implementation == "sdpa" and model.training


def test_dropout_plays_no_part() -> None:
    model = MiniForCausalLM(MiniConfig(**SIZES, attention_dropout=0.5)).train()
    torch.testing.assert_close(summarize_attention(model, IDS).entropy, summarize_attention(model, IDS).entropy)


def test_weights_need_eager_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="need eager attention, and the model has 'sdpa'"):
        attention_weights(model, IDS)
    with eager_attention(model):
        weights = attention_weights(model, IDS)
    assert weights.shape == (2, 2, 4, 6, 6)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 4, 6))


def test_one_token_has_no_choice(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        summarize_attention(model, IDS[:, :1])


@pytest.mark.slow
@pytest.mark.parametrize(("length", "labelled"), [(6, True), (200, False)])
def test_picture_shows_every_head(tmp_path: Path, length: int, labelled: bool) -> None:
    # Head 1 of layer 0 attends to the first token only, all others uniformly.
    maps = torch.ones(2, 3, length, length).tril()
    maps[0, 1] = 0
    maps[0, 1, :, 0] = 1
    maps /= maps.sum(dim=-1, keepdim=True)
    summary = AttentionSummary(maps, torch.ones(2, 3), 2.0)
    path = tmp_path / "new" / "attention.png"
    draw_attention(summary, path, ["$", "bos", "␍", "日", "\\frac", "a"] if labelled else ["x"] * length, "A $title_$")
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 300
    black = (pixels[..., :3] < 0.05).all(axis=-1)
    # The one black column is in the second of three maps of the upper row.
    columns = black[: len(black) // 2].sum(axis=0)
    assert 0.3 < columns.argmax() / len(columns) < 0.6
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_positions_are_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []

    @contextlib.contextmanager
    def kept(path: Path, **settings: Any) -> Iterator[Any]:
        with figure_file(path, **settings) as figure:
            yield figure
            for axes in figure.axes[:-1]:  # without the bar of colours
                ticks.extend([*axes.get_xticks(), *axes.get_yticks()])

    monkeypatch.setattr(drawing, "figure_file", kept)
    summary = AttentionSummary(torch.full((2, 2, 17, 17), 1 / 17), torch.ones(2, 2), 2.0)
    draw_attention(summary, tmp_path / "attention.png")
    assert len(ticks) > 16 and all(tick == round(tick) for tick in ticks)


def test_labels_are_readable() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer("a é\n\t\x01").input_ids
    assert token_labels(tokenizer, ids) == ["bos", "a", "·", "C3", "A9", "↵", "⇥", "01"]
    tokenizer = CharTokenizer.from_text("aé ")
    assert token_labels(tokenizer, tokenizer("é aX").input_ids) == ["bos", "é", "·", "a", "unk"]


def test_prompt_must_fit_the_context() -> None:
    config, tokenizer = MiniConfig(**SIZES), ByteTokenizer()
    assert prompt_ids(tokenizer, config, "ab").tolist() == [[1, 105, 106]]
    with pytest.raises(ValueError, match="The prompt has 33 tokens; the context of the model has 32"):
        prompt_ids(tokenizer, config, "x" * 32)
    with pytest.raises(ValueError, match="at least two tokens"):
        prompt_ids(tokenizer, config, "")


def test_windows_are_spread_over_the_text() -> None:
    tokenizer, text = ByteTokenizer(), "".join(chr(ord("a") + i // 100) for i in range(1000))
    windows = text_windows(tokenizer, text, 50, 4)
    assert windows.shape == (4, 50)
    assert windows[:, 0].tolist() == [1] * 4
    assert tokenizer.decode(windows[:, 1].tolist()) == "adgj"
    assert text_windows(tokenizer, "abc", 50, 4).tolist() == [[1, 105, 106, 107]]
    special = text_windows(tokenizer, "<|eos|>", 50, 1)
    assert special.shape == (1, 8)  # text that looks like a special token is text
    with pytest.raises(ValueError, match="The text must have at least two tokens"):
        text_windows(tokenizer, "", 50, 4)
    with pytest.raises(ValueError, match="got 1 and 4"):
        text_windows(tokenizer, text, 1, 4)


def test_windows_that_run_out_of_text_are_left_out() -> None:
    def words(text: str, **settings: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    text = " ".join(str(number) for number in range(1000, 1020))  # 99 characters, the last windows have 1 or 2 words
    windows = text_windows(words, text, length=4, count=96)
    assert windows.shape[1] == 4 and 1 < len(windows) < 96
    assert windows[0].tolist() == [1000, 1001, 1002, 1003] and windows[-1, -1] == 1019
