"""
A task of lm-evaluation-harness that measures bits per byte on a text file, with the same result as Mini's evaluation.

Two things would make the results differ. First, the harness reads a long document in windows, and each window sees the
last token of the one before. Mini's windows begin with bos, like its training sequences. So each document of the task
is one window. Second, a window may end inside a character, and a text cannot. So a document is written as token ids,
one character for each id, and the task has a tokenizer that reads them back.
"""

import json
from pathlib import Path

import yaml
from files_mini import writing
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .card import ExportCard

# In Unicode these code points, and all after them, are for private use. There are 131,072 of them.
FIRST_CODE_POINT, NUMBER_OF_CODE_POINTS = 0xF0000, 0x110000 - 0xF0000

# The harness takes the path of a data file as relative to the folder in which it was started. A function beside the
# task knows its own place, so the folder can be moved and shared.
READER = '''"""The documents of the task, which lie beside this file, and how many bytes of text each stands for."""

from pathlib import Path

from datasets import DatasetDict, load_dataset


def documents(**kwargs) -> DatasetDict:
    return load_dataset("json", data_files={"test": str(Path(__file__).parent / "documents.jsonl")})


def bits_per_byte(document: dict, results: list) -> dict:
    return {"bits_per_byte": (results[0], document["bytes"])}
'''


def documents_of(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, str | int]]:
    """
    Windows of `length` tokens: `ids` as characters, the number of `bytes` that they stand for, and the `text` for
    people. The bytes of a character that two windows share are counted in the first window.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    documents, begin = [], 0
    for start in range(0, len(ids), length):
        window = ids[start : start + length]
        is_last = start + length >= len(ids)
        end = len(text) if is_last else offsets[start + length - 1][1]
        documents.append(
            {
                "ids": "".join(chr(FIRST_CODE_POINT + token_id) for token_id in window),
                "bytes": len(text[begin:end].encode("utf-8")),
                "text": tokenizer.decode(window),
            }
        )
        begin = end
    return documents


def tokenizer_of_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` ids, each written as one character, with the bos of `tokenizer`."""
    vocab = {chr(FIRST_CODE_POINT + token_id): token_id for token_id in range(size)}
    bos = chr(FIRST_CODE_POINT + tokenizer.bos_token_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=[])), bos_token=bos, eos_token=bos, pad_token=bos
    )


def export_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, text_file: str, task_name: str
) -> ExportCard:
    """
    Writes a task into the folder `out`: its YAML, the documents, and the tokenizer to read them with.

    Args:
        text_file: a UTF-8 text.
        task_name: its name for `--tasks`.

    Raises:
        ValueError: if the text is empty or not UTF-8, or if the tokenizer has no bos or too many ids.
    """
    try:
        text = Path(text_file).read_bytes().decode("utf-8")  # as bytes, so that line ends do not change
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_file} is not valid UTF-8 ({error.reason} at byte {error.start}).") from None
    if not text:
        raise ValueError(f"{text_file} is empty.")
    if tokenizer.bos_token_id is None:
        raise ValueError("The tokenizer has no bos token, with which a window begins.")
    config = model.config
    if config.vocab_size > NUMBER_OF_CODE_POINTS:
        raise ValueError(
            f"lm_eval can write {NUMBER_OF_CODE_POINTS:,} token ids, and this model has {config.vocab_size:,}."
        )
    documents = documents_of(text, tokenizer, config.max_position_embeddings)
    task = {
        "task": task_name,
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{ids}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        "metadata": {"version": 1.0},
    }
    functions = "custom_dataset: !function documents.documents\nprocess_results: !function documents.bits_per_byte\n"
    with writing(out):
        lines = (json.dumps(document, ensure_ascii=False) for document in documents)
        (out / "documents.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (out / "documents.py").write_text(READER, encoding="utf-8")
        (out / f"{task_name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False) + functions, encoding="utf-8")
        tokenizer_of_ids(tokenizer, config.vocab_size).save_pretrained(out / "tokenizer")
    usage = f"""
A task of [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness): bits per byte on
{len(text.encode("utf-8")):,} bytes of `{Path(text_file).name}`. With `pip install "lm_eval[hf]"`, and this folder as
`TASK_FOLDER`:

```bash
lm_eval --model hf --include_path TASK_FOLDER --tasks {task_name} --batch_size 16 \\
    --model_args pretrained=CHECKPOINT,tokenizer=TASK_FOLDER/tokenizer,trust_remote_code=True
```
"""
    return ExportCard(
        title=f"Bits per byte on {Path(text_file).name}",
        usage=usage,
        exactness=f"The text is {len(documents):,} documents of at most {config.max_position_embeddings} tokens, one "
        "context of the model, and each begins with bos: the result is that of Mini's own evaluation. They are written "
        "in ids of the model's tokenizer, so the task is for this model and others with that tokenizer.",
        of_model=False,
        tags=["lm-evaluation-harness"],
    )
