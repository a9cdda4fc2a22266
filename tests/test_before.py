"""
What an earlier program wrote still loads, is saved again, and goes on.

`data/before.tar.xz` was made by the program before its files were moved: a run that stopped at step 6, the corpus that
it had encoded, and what the same program gave when it went on to step 12 (one process, two threads, float32).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import metrics
from modeling_mini import MiniForCausalLM
from modeling_mini.loading.checkpoints import load_model
from modeling_mini.remote_code import remote_code_files
from tokenization import ByteTokenizer
from training_mini.arguments import DataArguments, parse_arguments
from training_mini.data.corpus import load_corpus
from training_mini.trainer import train
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

IDS = ByteTokenizer()("the cat", return_tensors="pt").input_ids
# The corpus is found under a key of the text and the settings, which has to stay what it was.
CORPUS = "cache/corpora/b328b90b884df16a6315"


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """The folder of the archive, unpacked."""
    shutil.unpack_archive(Path(__file__).parent / "data" / "before.tar.xz", tmp_path)
    return tmp_path


@pytest.fixture
def expected(before: Path) -> dict[str, Any]:
    return json.loads((before / "expected.json").read_text())


def first_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits[0, -1, :32]


def load_by_its_own_code(folder: Path) -> PreTrainedModel:
    """As `trust_remote_code=True` does where Mini is not installed: here, the registered classes would go first."""
    return get_class_from_dynamic_module("modeling_mini.MiniForCausalLM", folder).from_pretrained(folder)


def test_a_checkpoint_loads_by_the_code_of_today_and_by_its_own(before: Path, expected: dict[str, Any]) -> None:
    folder = before / "run" / "best"
    assert not (folder / "fast_generation.py").exists(), "this folder would not be from before"
    logits = torch.tensor(expected["logits"])
    model, tokenizer = load_model(str(before / "run"))
    assert type(model) is MiniForCausalLM and torch.equal(tokenizer("the cat", return_tensors="pt").input_ids, IDS)
    theirs = load_by_its_own_code(folder)
    assert not isinstance(theirs, MiniForCausalLM)
    for each in (model, AutoModelForCausalLM.from_pretrained(folder), theirs):
        torch.testing.assert_close(first_logits(each), logits, atol=1e-4, rtol=0)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **settings), theirs.generate(IDS, **settings))


def test_a_checkpoint_is_saved_again_by_the_code_of_today_and_by_its_own(
    before: Path, expected: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, logits = before / "run" / "best", torch.tensor(expected["logits"])
    theirs = tmp_path_factory.mktemp("theirs")
    load_by_its_own_code(folder).save_pretrained(theirs)
    assert (theirs / "modeling_mini.py").read_bytes() == (folder / "modeling_mini.py").read_bytes()
    again = shutil.copytree(folder, tmp_path_factory.mktemp("again") / "best")
    (again / "of_an_older_copy.py").write_text("raise RuntimeError('nothing reads this')\n")
    MiniForCausalLM.from_pretrained(again).save_pretrained(again)
    assert remote_code_files().items() <= {path.name: path.read_text() for path in again.glob("*.py")}.items()
    for place in (theirs, again):
        for model in (MiniForCausalLM.from_pretrained(place), load_by_its_own_code(place)):
            torch.testing.assert_close(first_logits(model), logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_run_goes_on_with_the_losses_that_it_had_and_the_corpus_that_was_encoded(
    before: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(before)  # the corpus is named by a relative path
    encoded = {path: path.stat().st_mtime_ns for path in before.glob("cache/corpora/*/**/*") if path.is_file()}
    arguments = "--resume --output_dir run --max_steps 12 --cache_dir cache"
    train(parse_arguments(arguments.split()))
    lines = metrics(before / "run")
    losses = {str(line["step"]): line["loss"] for line in lines if "loss" in line and line["step"] > 6}
    assert losses == pytest.approx(expected["losses"], abs=1e-4)
    assert lines[-1]["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)
    now = {path: path.stat().st_mtime_ns for path in before.glob("cache/corpora/*/**/*") if path.is_file()}
    assert now == encoded, "the corpus was encoded anew"


def test_an_encoded_corpus_opens_by_its_folder(before: Path) -> None:
    corpus = load_corpus(DataArguments(dataset=str(before / CORPUS)))
    assert (len(corpus.train), len(corpus.validation)) == (4321, 480)
    text = (before / "text.txt").read_bytes()
    assert corpus.text_of(corpus.train[: len(corpus.train)])[:500] == text[:500]
