"""What a model writes during training and at the end, and how much of it is valid Python."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import metrics, train_here
from modeling_mini import MiniConfig, MiniForCausalLM
from tokenization import BpeTokenizer, ByteTokenizer
from training_mini import sampling
from training_mini.data.corpus import ids_of_function
from training_mini.sampling import first_function, is_valid_python, share_of_valid_functions, write_samples


def test_a_sample_that_is_mostly_blank_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seeds = ByteTokenizer(), []
    texts = {"a few": ["\n\n        x", "     \n", "x = 1 and more"], "never": [" ", "   x", "    ", " \n", "xxxx"]}
    left: list[str] = []
    monkeypatch.setattr(sampling, "set_seed", seeds.append)
    corpus = SimpleNamespace(tokenizer=tokenizer, is_chat=False, min_new_tokens=lambda capacity: None)

    def generate(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        written = tokenizer(left.pop(0), add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([ids, written], dim=1)

    model = SimpleNamespace(
        device=torch.device("cpu"), training=False, eval=lambda: None, train=lambda mode: None, generate=generate
    )
    prompts = [("def ", tokenizer("def ").input_ids)]
    left[:] = texts["a few"]
    assert write_samples(model, corpus, prompts, 64, 7) == [{"prompt": "def ", "text": "def x = 1 and more"}]
    assert seeds == [7, 8, 9]
    left[:] = texts["never"]
    assert write_samples(model, corpus, prompts, 64, 7)[0]["text"] == "def    x", "the least blank of four"
    assert left == ["xxxx"]
    left[:] = texts["never"]
    write_samples(model, corpus, prompts, 64, 2**32 - 1)
    assert seeds[-4:] == [2**32 - 1, 0, 1, 2], "numpy takes no larger ones"


@pytest.mark.parametrize(
    ("text", "function", "cut_off"),
    [
        ("def f():\n    a = 1\n    return a\n\nx =", "def f():\n    a = 1\n    return a\n", None),
        # A method is indented twice, and the next one ends it.
        ("def f(self):\n        a(\n            1)\n\n    def g", "def f(self):\n        a(\n            1)\n", None),
        ("def f(a,\n          b):\n    pass\n)", "def f(a,\n          b):\n    pass", None),
        # The text is over before the function: its last statement may not be whole.
        ("def f():\n    a = 1\n    b = 2\n", "def f():\n    a = 1\n    b = 2\n", "def f():\n    a = 1"),
        ("def f():\n    if a:\n        b = g(", "def f():\n    if a:\n        b = g(", "def f():"),
        ("def f(", "def f(", ""),
        ("def f():\na = 1", "def f():\na = 1", "def f():"),
    ],
)
def test_the_function_that_a_text_begins_with(text: str, function: str, cut_off: str | None) -> None:
    assert first_function(text, is_whole=True) == function
    assert first_function(text, is_whole=False) == (function if cut_off is None else cut_off)


@pytest.mark.parametrize(
    ("source", "is_valid"),
    [
        ("def f(self):\n        return '\\d'", True), ("def f():", False), ("def f(:\n    pass", False), ("", False),
        ("def f():\n    return '\0'", False), ("def f():\n    return " + "(" * 5000, False),
    ],
)  # fmt: skip
def test_valid_python(source: str, is_valid: bool, recwarn: pytest.WarningsRecorder) -> None:
    assert is_valid_python(source) == is_valid and not recwarn


def test_the_share_is_that_of_what_the_model_wrote() -> None:
    tokenizer, asked = ByteTokenizer(), {}
    bodies = ["f():\n    return 1", "f():\n    return", "f(:\n    return 1", "f():\n    a = 1\n    return 1 +"]

    def generate(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        asked.update(settings)
        # The first three end by themselves; the last is cut off.
        ends = [tokenizer.eos_token] * 3 + [""]
        texts = [body + end for body, end in zip(bodies, ends, strict=True)]
        written = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").input_ids
        return torch.cat([ids, written], dim=1)

    model = SimpleNamespace(
        device=torch.device("cpu"), training=False, eval=lambda: None, train=lambda mode: None, generate=generate,
        config=SimpleNamespace(max_position_embeddings=64),
        generation_config=SimpleNamespace(eos_token_id=[tokenizer.eos_token_id]),
    )  # fmt: skip
    assert share_of_valid_functions(model, tokenizer, count=4) == 0.75
    assert asked["do_sample"] and asked["max_new_tokens"] == 64 - len(tokenizer("def ").input_ids)


def test_functions_of_bpe_begin_a_line_and_have_no_space_alone() -> None:
    tokenizer = BpeTokenizer.train(["def a(x):\n    return a\n\n\n" * 50], 275)
    assert tokenizer.decode(ids_of_function(tokenizer), skip_special_tokens=True) == "\n\n\ndef"
    assert ids_of_function(ByteTokenizer()) == ByteTokenizer()("def ").input_ids
    asked, written = [], tokenizer(" a(x):\n    return a\n\nx", add_special_tokens=False).input_ids

    def generate(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        asked.append(ids[0].tolist())
        return torch.cat([ids, torch.tensor([written] * len(ids))], dim=1)

    model = SimpleNamespace(
        device=torch.device("cpu"), training=False, eval=lambda: None, train=lambda mode: None, generate=generate,
        config=SimpleNamespace(max_position_embeddings=64), generation_config=SimpleNamespace(eos_token_id=None),
    )  # fmt: skip
    assert share_of_valid_functions(model, tokenizer, count=2) == 1.0 and asked == [ids_of_function(tokenizer)]
    corpus = SimpleNamespace(tokenizer=tokenizer, is_chat=False, min_new_tokens=lambda capacity: None)
    (sample,) = write_samples(model, corpus, [("def", ids_of_function(tokenizer))], 64, 7)
    assert sample == {"prompt": "def", "text": "def a(x):\n    return a\n\nx"}


def test_counting_functions_changes_nothing_and_gives_the_same_again() -> None:
    tokenizer = ByteTokenizer()
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1, max_position_embeddings=32)).train()
    state = torch.get_rng_state()
    asked = []
    generate = model.generate
    model.generate = lambda *args, **settings: asked.append(generate(*args, **settings)) or asked[-1]
    assert share_of_valid_functions(model, tokenizer, count=3) == share_of_valid_functions(model, tokenizer, count=3)
    assert torch.equal(asked[0], asked[1]) and len(asked[0]) == 3 and len({*map(tuple, asked[0].tolist())}) == 3
    assert torch.equal(torch.get_rng_state(), state) and model.training
    share_of_valid_functions(model, tokenizer, count=3, max_seconds=0)
    assert asked[-1].shape[1] < asked[0].shape[1], "it does not wait for a slow model"


@pytest.mark.slow
def test_a_run_on_python_says_how_many_functions_are_valid(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"m{number}.py").write_text(f"def f{number}(a):\n    return a + {number}\n" * 10)
    flags = ("--dataset", tmp_path / "text", "--max_steps", 4, "--eval_steps", 2)
    _, result = train_here(tmp_path / "run", *flags)
    shares = [line["eval_valid_functions"] for line in metrics(tmp_path / "run") if "eval_valid_functions" in line]
    assert shares == [result.valid_functions] and 0 <= result.valid_functions <= 1
    assert result.samples[0].startswith("def ")
    _, again = train_here(tmp_path / "run", *flags, "--resume")
    assert again.valid_functions == result.valid_functions
    assert sum("eval_valid_functions" in line for line in metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("length", [1, 4, 5])
def test_a_context_that_is_full_with_the_beginning_has_no_function(length: int) -> None:
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1, max_position_embeddings=length))
    assert share_of_valid_functions(model, ByteTokenizer(), count=2) == 0.0
