"""
A task of lm-evaluation-harness that measures bits per byte on a text file, as Mini's own evaluation does.

The harness reads a long document in windows that each see the last token of the one before, and the last window more.
Mini's windows begin with bos, as its training rows do. So the text is cut here, into documents of one context, and each
of them is one window for both.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from entry_points_mini import option
from files_mini import writing
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .card import Card

# The harness resolves the path of a data file against the folder that it is started in. A function beside the task
# knows where it is, so the folder can be moved and shared.
READER = '''"""Reads the documents of the task, which lie beside this file."""

from pathlib import Path

from datasets import DatasetDict, load_dataset


def documents(**kwargs) -> DatasetDict:
    return load_dataset("json", data_files={"test": str(Path(__file__).parent / "documents.jsonl")})
'''


@dataclass
class Options:
    """What to measure on."""

    text_file: str | None = option(None, "UTF-8 text to measure on")
    task_name: str = option("mini_bits_per_byte", "name of the task")

    def __post_init__(self) -> None:
        if self.text_file is None:
            raise ValueError("Name the text to measure on by --text_file.")
        if not Path(self.text_file).is_file():
            raise ValueError(f"There is no text file {self.text_file!r}.")
        if not self.task_name.isidentifier():
            raise ValueError(f"task_name must be letters, digits and underscores, got {self.task_name!r}.")


def pieces_of(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """
    A text cut into pieces of at most `length` tokens, and no fewer than a character that would not fit whole asks for.

    Raises:
        ValueError: if a character has more tokens than `length`.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    offsets = encoding["offset_mapping"]
    pieces, start = [], 0
    while start < len(offsets):
        end = min(start + length, len(offsets))
        while end < len(offsets) and offsets[end][0] < offsets[end - 1][1]:  # inside a character
            end -= 1
        if end <= start:
            raise ValueError(f"A context of {length} tokens is too short for the character at {offsets[start][0]}.")
        last = offsets[end][0] if end < len(offsets) else len(text)
        pieces.append(text[offsets[start][0] if pieces else 0 : last])
        start = end
    return pieces


def export_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, text_file: str, task_name: str
) -> Card:
    """
    Writes a task into the folder `out`: its YAML, the documents, and the tokenizer to read them with.

    Args:
        text_file: a UTF-8 text.
        task_name: what `--tasks` calls it.

    Raises:
        ValueError: if the text is empty or not UTF-8.
    """
    try:
        text = Path(text_file).read_bytes().decode("utf-8")  # as it is: no newline is another
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_file} is not valid UTF-8 ({error.reason} at byte {error.start}).") from None
    if not text:
        raise ValueError(f"{text_file} is empty.")
    length = model.config.max_position_embeddings
    pieces = pieces_of(text, tokenizer, length)
    task = {
        "task": task_name,
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        "metadata": {"version": 1.0},
    }
    with writing(out):
        lines = (json.dumps({"text": piece}, ensure_ascii=False) for piece in pieces)
        (out / "documents.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        (out / "documents.py").write_text(READER, encoding="utf-8")
        task_yaml = yaml.safe_dump(task, sort_keys=False) + "custom_dataset: !function documents.documents\n"
        (out / f"{task_name}.yaml").write_text(task_yaml, encoding="utf-8")
        tokenizer.save_pretrained(out / "tokenizer")
        # The harness puts bos in front by itself, and what looks like a special token in a text is text.
        plain = AutoTokenizer.from_pretrained(out / "tokenizer", add_bos_token=False, split_special_tokens=True)
        plain.save_pretrained(out / "tokenizer")
    size = len(text.encode("utf-8"))
    usage = f"""
A task of [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness): bits per byte on
{size:,} bytes of `{Path(text_file).name}`. With `pip install "lm_eval[hf]"`, and this folder as `TASK_FOLDER`:

```bash
lm_eval --model hf --include_path TASK_FOLDER --tasks {task_name} --batch_size 16 \\
    --model_args pretrained=CHECKPOINT,tokenizer=TASK_FOLDER/tokenizer,trust_remote_code=True
```
"""
    return Card(
        title=f"Bits per byte on {Path(text_file).name}",
        usage=usage,
        exactness=f"The text is cut into {len(pieces):,} documents of at most {length} tokens, one context of the "
        "model, so the result is that of Mini's own evaluation.",
        of_model=False,
        tags=["lm-evaluation-harness"],
    )
