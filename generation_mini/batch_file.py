"""
Many prompts from a file into a .jsonl file.

Prompts of like length make up a batch, so that little of it is padding. A batch is written as a whole, and its seed
comes from its place: a call that was interrupted goes on with the batches that are missing, and ends with the same file
as one that never was.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from files_mini import append_text, write_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import GenerationArguments
from .text_generation import Stopwatch, context_of, encode_prompt, unknown_characters, write_on

# Flags that say where and how the work is done, and not what comes out of it.
NOT_OF_THE_TEXT = ("batch_file", "output", "stats", "trust_remote_code", "adapter")


class BatchFile:
    """
    The prompts of a call, and what of them is written already.

    Raises:
        ValueError: if a file cannot be read as what it should be, or the output belongs to another call.
    """

    def __init__(self, arguments: GenerationArguments) -> None:
        self.arguments = arguments
        self.output = Path(arguments.output)
        if self.output.exists() and not self.output.is_file():
            raise ValueError(f"output must be a file, and {arguments.output!r} is none.")
        if self.output.is_symlink():
            self.output = self.output.resolve()  # the file is replaced, and not the link
        self.prompts = read_prompts(Path(arguments.batch_file))
        if self.output.resolve() == Path(arguments.batch_file).resolve():
            raise ValueError(f"output must be another file than batch_file ({arguments.batch_file!r}).")
        if not self.output.parent.is_dir():
            raise ValueError(f"There is no folder {str(self.output.parent)!r} for output.")
        self.written = read_written(self.output)
        for line in self.written:
            index = line["index"]
            if index >= len(self.prompts) or line["prompt"] != self.prompts[index]:
                raise ValueError(
                    f"{self.output} holds texts for other prompts than those of {arguments.batch_file} (prompt "
                    f"{index + 1} is the first that differs): name another output."
                )

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, notify: Callable[[str], None]) -> None:
        """Continues every prompt that is not written yet, and puts the file into the order of the prompts."""
        settings = self.fingerprint(model)
        if any(line["settings"] != settings for line in self.written):
            raise ValueError(f"{self.output} was written by another model or with other settings: name another output.")
        encoded = [encode_prompt(tokenizer, prompt) for prompt in self.prompts]
        order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index]), index))
        size = self.arguments.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        done = {line["index"] for line in self.written}
        # The last batch may have been cut short: it is written anew as a whole, to have the texts of its seed.
        complete = [batch for batch in batches if done.issuperset(batch)]
        kept = {index for batch in complete for index in batch}
        lines = [line for line in self.written if line["index"] in kept]
        write_text(self.output, as_jsonl(lines))
        if kept:
            notify(f"{len(kept):,} of {len(self.prompts):,} prompts are done already.")
        self.tell_what_is_not_read(model, tokenizer, encoded, notify)
        stopwatch, tokens = Stopwatch(), 0
        columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task("writing", total=len(self.prompts), completed=len(kept))
                for batch in batches:
                    if kept.issuperset(batch):
                        continue
                    if self.arguments.seed is not None:
                        set_seed(zlib.crc32(f"{self.arguments.seed} {batch[0]}".encode()))
                    new_lines = self.lines_of(batch, model, tokenizer, encoded, settings, stopwatch)
                    append_text(self.output, as_jsonl(new_lines))
                    lines += new_lines
                    tokens += sum(text["tokens"] for line in new_lines for text in line["texts"])
                    progress.advance(task, len(batch))
        except KeyboardInterrupt:
            notify(
                f"{len(lines):,} of {len(self.prompts):,} prompts are done; the same call again goes on with the rest."
            )
            raise
        write_text(self.output, as_jsonl(sorted(lines, key=lambda line: line["index"])))
        if self.arguments.stats:
            notify(stopwatch.summary(tokens))

    def tell_what_is_not_read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoded: list[list[int]],
        notify: Callable[[str], None],
    ) -> None:
        """What `generate.py` says of one prompt, for all in a sentence each."""
        context = context_of(model)
        if long := sum(len(ids) >= context for ids in encoded):
            are = "1 prompt is" if long == 1 else f"{long:,} prompts are"
            notify(f"{are} longer than the context of {context} tokens: only the end is used.")
        if unknown := unknown_characters(tokenizer, "".join(self.prompts), itertools.chain.from_iterable(encoded)):
            notify(f"The model does not know {unknown}, and reads <|unk|> instead.")

    def lines_of(
        self,
        batch: list[int],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoded: list[list[int]],
        settings: str,
        stopwatch: Stopwatch,
    ) -> list[dict[str, Any]]:
        """The lines for the prompts of one batch."""
        results = write_on(
            model, tokenizer, [encoded[index] for index in batch], self.arguments, lambda sentence: None,
            stopping_criteria=[stopwatch] if self.arguments.stats else [],
        )  # fmt: skip
        ways = self.arguments.num_return_sequences
        return [
            {
                "index": index,
                "prompt": self.prompts[index],
                "texts": [
                    {"text": result.text, "tokens": len(result.ids), "ended_by": result.ended_by}
                    for result in results[place * ways : (place + 1) * ways]
                ],
                "settings": settings,
            }
            for place, index in enumerate(batch)
        ]

    def fingerprint(self, model: PreTrainedModel) -> str:
        """Eight characters that stand for the model and the settings."""
        settings = {k: v for k, v in self.arguments.changed().items() if k not in NOT_OF_THE_TEXT}
        weights = hashlib.sha256()
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            ends = flat[[0, len(flat) // 2, -1]].double().tolist()
            weights.update(f"{name} {tuple(parameter.shape)} {ends}".encode())
        settings["model"] = weights.hexdigest()
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or the field `prompt` of each line of a .jsonl file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # not as text: a prompt may hold a carriage return
    except FileNotFoundError:
        raise ValueError(f"There is no file {str(path)!r} of prompts.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 at byte {error.start}.") from None
    lines = text.split("\n")
    if lines[-1] == "":
        del lines[-1]
    if path.suffix == ".jsonl":
        prompts = []
        for number, line in enumerate(lines, start=1):
            try:
                prompt = json.loads(line)["prompt"]
                prompt.encode()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # half a pair of \u has no bytes
                raise ValueError(f'{path}, line {number}: it must have the form {{"prompt": "..."}}.') from None
            prompts.append(prompt)
    else:
        prompts = [line.removesuffix("\r") for line in lines]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    return prompts


def read_written(path: Path) -> list[dict[str, Any]]:
    """The complete lines of an earlier call."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # a process that was killed may have left half a line at the end
    try:
        written = {}  # by index: two calls at once may have written a prompt twice
        for line in map(json.loads, lines):
            line["prompt"], line["texts"], line["settings"]
            if type(line["index"]) is not int or line["index"] < 0:
                raise ValueError(line["index"])
            written[line["index"]] = line
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} holds something else than texts of generate.py: name another output.") from None
    if not lines and path.stat().st_size:
        raise ValueError(f"{path} holds something else than texts of generate.py: name another output.")
    return list(written.values())


def as_jsonl(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
