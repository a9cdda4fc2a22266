"""lm-evaluation-harness gives Mini's own bits per byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from helpers.exports import learned_merges, random_model
from modeling_mini.export import export
from tokenization import BOS_ID, ByteTokenizer, CharTokenizer, load_tokenizer
from training_mini.data.batches import Collator
from training_mini.evaluation import HeldOutText, evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "def area(self):\n    return self.width ** 2  # <|eos|> is text here\r\n" * 30


def by_the_harness(folder: Path, task: Path, name: str) -> float:
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "tokenizer": str(task / "tokenizer"), "trust_remote_code": True},
        tasks=[name],
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
    )
    return results["results"][name]["bits_per_byte,none"]


def by_mini(folder: Path, text: str) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    ids = np.asarray(tokenizer.encode_corpus(text.encode()))
    collator = Collator(context_length=model.config.max_position_embeddings, bos_token_id=BOS_ID)
    held_out = HeldOutText(ids, tokenizer.bytes_per_token(), collator)
    return evaluate(model, held_out, 8, Accelerator(cpu=True)).bits_per_byte


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (ByteTokenizer(), TEXT),
        (ByteTokenizer(), "Ein Bär läuft über die Straße. 日本語\n" * 60),
        (CharTokenizer.from_text(TEXT), TEXT),
        (learned_merges(), TEXT),
    ],
    ids=["bytes", "bytes of several", "characters", "merges"],
)
def test_equal_to_our_own_evaluation(tokenizer: Any, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    random_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_bytes(text.encode())
    task = export("lm_eval", folder, tmp_path / "task", text_file=str(tmp_path / "text.txt"), task_name="my_text")
    assert by_the_harness(folder, task, "my_text") == pytest.approx(by_mini(folder, text), rel=1e-5)


def test_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    text = "aé日👩‍👧<|eos|>\r\n" * 20
    (tmp_path / "text.txt").write_bytes(text.encode())
    task = export("lm_eval", checkpoint, tmp_path / "task", text_file=str(tmp_path / "text.txt"))
    # By split, because some characters of the text end lines too.
    documents = [json.loads(line) for line in (task / "documents.jsonl").read_text().strip().split("\n")]
    assert sum(document["bytes"] for document in documents) == len(text.encode())
    tokenizer = AutoTokenizer.from_pretrained(task / "tokenizer")
    windows = [tokenizer(document["ids"]).input_ids for document in documents]
    assert {len(window) for window in windows[:-1]} == {64}
    assert [token_id for window in windows for token_id in window] == ByteTokenizer().encode_corpus(
        text.encode()
    ).tolist()
    assert tokenizer.bos_token_id == BOS_ID
    fields = yaml.safe_load((task / "mini_bits_per_byte.yaml").read_text().replace("!function ", ""))
    assert fields["output_type"] == "loglikelihood_rolling"
    assert fields["custom_dataset"] == "documents.documents"
    card = (task / "README.md").read_text()
    assert f"{len(text.encode()):,} bytes of `text.txt`" in card
    assert str(tmp_path) not in card


def test_bad_texts(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    with pytest.raises(ValueError, match="Name the text to measure on by --text_file"):
        export("lm_eval", checkpoint, tmp_path / "task")
    with pytest.raises(ValueError, match="There is no text file"):
        export("lm_eval", checkpoint, tmp_path / "task", text_file=str(file))
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"text\.txt is empty"):
        export("lm_eval", checkpoint, tmp_path / "task", text_file=str(file))
    file.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"not valid UTF-8 .* at byte 3"):
        export("lm_eval", checkpoint, tmp_path / "task", text_file=str(file))
    with pytest.raises(ValueError, match="task_name must be letters"):
        export("lm_eval", checkpoint, tmp_path / "task", text_file=str(file), task_name="a b")
