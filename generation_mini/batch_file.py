"""
Many prompts from a file into a .jsonl file.

Prompts of similar length make up a batch, so that little of it is padding. Each line of the output names the batch that
its text was drawn in, and the seed of a batch is a function of its first prompt. So a call that was interrupted goes on
with what is missing, and ends with the same file as one that never was. Prompts may be added at the end of the file of
prompts later: they get their texts, and the finished texts stay as they are.
"""

import hashlib
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from files_mini import append_text, json_lines, write_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenization import joins_last_space
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import GenerationArguments
from .text_generation import Stopwatch, context_of, encode_prompt, unknown_characters, write_on

# Flags that say where and how the work is done, and not what comes out of it.
NOT_OF_THE_TEXT = ("batch_file", "output", "stats", "trust_remote_code", "adapter")

START = b'{"index": '  # of each line


class BatchFile:
    """
    The prompts of a call, and which of them have their texts already.

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
        self.finished = read_finished(self.output)
        for index, line in sorted(self.finished.items()):
            if index >= len(self.prompts):
                raise ValueError(
                    f"{self.output} holds a text for prompt {index + 1}, and {arguments.batch_file} has "
                    f"{len(self.prompts)} prompts: name another output."
                )
            if line.prompt != self.prompts[index]:
                raise ValueError(
                    f"{self.output} holds texts for other prompts than those of {arguments.batch_file} (prompt "
                    f"{index + 1} is the first that differs): add prompts at the end only, or name another output."
                )

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, notify: Callable[[str], None]) -> None:
        """Continues every prompt that has no text yet, and puts the file into the order of the prompts."""
        settings = self.fingerprint(model)
        if any(line.settings != settings for line in self.finished.values()):
            raise ValueError(f"{self.output} was written by another model or with other settings: name another output.")
        encoded = [encode_prompt(tokenizer, prompt) for prompt in self.prompts]
        batches = self.missing_batches(encoded)
        finished = {index: line.text for index, line in self.finished.items()}
        if finished:
            notify(f"{len(finished):,} of {len(self.prompts):,} prompts are done already.")
        write_text(self.output, "".join(finished.values()))  # without the half line that a killed process has left
        self.tell_what_is_not_read(model, tokenizer, encoded, notify)
        stopwatch, tokens = Stopwatch(), 0
        columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task("writing", total=len(self.prompts), completed=len(finished))
                for batch in batches:
                    if self.arguments.seed is not None:
                        set_seed(zlib.crc32(f"{self.arguments.seed} {batch[0]}".encode()))
                    lines = self.lines_of(batch, model, tokenizer, encoded, settings, stopwatch)
                    tokens += sum(text["tokens"] for line in lines for text in line["texts"])
                    # Some may have been written before the batch was cut short; they stay as they are.
                    new = {line["index"]: json_lines([line]) for line in lines if line["index"] not in finished}
                    append_text(self.output, "".join(new.values()))
                    finished |= new
                    progress.advance(task, len(new))
        except KeyboardInterrupt:
            notify(
                f"{len(finished):,} of {len(self.prompts):,} prompts are done; the same call again goes on with the "
                f"rest."
            )
            raise
        write_text(self.output, "".join(text for _, text in sorted(finished.items())))
        if self.arguments.stats:
            notify(stopwatch.summary(tokens))

    def missing_batches(self, encoded: list[list[int]]) -> list[list[int]]:
        """
        Batches of the prompts that have no text, shortest first.

        The texts of a batch are drawn together, so one that was cut short is written as a whole again: batches are
        written in this order, so its prompts come first, and make up the same batch.
        """
        written = Counter(line.batch for line in self.finished.values())
        complete = {
            index for index, line in self.finished.items() if line.batch is None or written[line.batch] >= line.batch[1]
        }
        order = sorted(set(range(len(encoded))) - complete, key=lambda index: (len(encoded[index]), index))
        size = self.arguments.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return [batch for batch in batches if not self.finished.keys() >= set(batch)]

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
        if spaces := sum(joins_last_space(tokenizer, prompt) for prompt in self.prompts):
            end = "1 prompt ends" if spaces == 1 else f"{spaces:,} prompts end"
            notify(f"{end} in a space, which the model knows as a part of the next word: leave it out.")

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
        per_prompt = self.arguments.num_return_sequences
        return [
            {
                "index": index,
                "prompt": self.prompts[index],
                "texts": [
                    {"text": result.text, "tokens": len(result.ids), "finish_reason": result.finish_reason}
                    for result in results[number * per_prompt : (number + 1) * per_prompt]
                ],
                "settings": settings,
                "batch": [batch[0], len(batch)],
            }
            for number, index in enumerate(batch)
        ]

    def fingerprint(self, model: PreTrainedModel) -> str:
        """Eight characters that stand for the model and the settings."""
        settings = {k: v for k, v in self.arguments.changed().items() if k not in NOT_OF_THE_TEXT}
        weights = hashlib.sha256()
        for name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            ends = flat[[0, len(flat) // 2, -1]].cpu().double().tolist()
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


@dataclass(frozen=True)
class Line:
    """
    A line of an earlier call.

    Attributes:
        text: the line as it stands in the file.
        batch: the first prompt and the number of prompts of its batch; earlier versions did not say.
    """

    text: str
    prompt: str
    settings: str
    batch: tuple[int, int] | None


def read_finished(path: Path) -> dict[int, Line]:
    """The complete lines of earlier calls, by the index of their prompt."""
    if not path.exists():
        return {}
    *lines, rest = path.read_bytes().split(b"\n")
    finished = {}  # by index: two calls at once may have written a prompt twice
    try:
        if rest[: len(START)] != START[: len(rest)]:  # else a line that a killed process has left half written
            raise ValueError(rest)
        for text in lines:
            line = json.loads(text)
            batch = line.get("batch")
            if type(line["index"]) is not int or line["index"] < 0 or not isinstance(line["texts"], list):
                raise ValueError(line["index"])
            batch = None if batch is None else (int(batch[0]), int(batch[1]))
            finished[line["index"]] = Line(f"{text.decode()}\n", line["prompt"], line["settings"], batch)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} holds something else than texts of generate.py: name another output.") from None
    return finished
