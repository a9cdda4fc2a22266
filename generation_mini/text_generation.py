"""Continuing texts, beyond the context if need be, as a whole or character by character."""

import contextlib
import copy
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from configuration_mini import MiniConfig
from entry_points_mini import imported, is_out_of_memory
from memory_mini import GIB, total_memory
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .arguments import SAMPLING, SHAPING, GenerationArguments


class TextUntilStop:
    """
    Text that comes in pieces, up to the stop string that is complete first; what may be the beginning of one is held
    back until it is known.

    Attributes:
        text: what was shown so far.
        is_stopped: whether there was a stop string.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = stop
        self.text = ""
        self.is_stopped = False
        self._held = ""

    def feed(self, piece: str) -> str:
        """What can be shown after one more piece."""
        if self.is_stopped:
            return ""
        self._held += piece
        matches = ((stop, self._held.find(stop)) for stop in self.stop)
        # The one that is complete first, so that it does not depend on how the text falls into pieces.
        found = [(start + len(stop), start) for stop, start in matches if start >= 0]
        if found:
            shown, self.is_stopped = self._held[: min(found)[1]], True
        else:
            longest = max((len(stop) - 1 for stop in self.stop), default=0)
            ends = (self._held[len(self._held) - n :] for n in range(min(longest, len(self._held)), 0, -1))
            held = next((end for end in ends if any(stop.startswith(end) for stop in self.stop)), "")
            shown = self._held[: len(self._held) - len(held)]
        self._held = self._held[len(shown) :]
        self.text += shown
        return shown

    def rest(self) -> str:
        """What was held back, of a text that has ended: the beginning of no stop string."""
        if self.is_stopped:
            return ""
        shown, self._held = self._held, ""
        self.text += shown
        return shown


class IncrementalDetokenizer(TextUntilStop):
    """
    The text of one sequence, as its tokens come: each character as soon as it is complete, never half a UTF-8
    character. All the pieces together equal `tokenizer.decode` of all the ids, up to a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        super().__init__(stop)
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._decoded = 0
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token_id: int) -> str:
        """What can be shown after one more token."""
        if self.is_stopped:
            return ""
        self.ids.append(token_id)
        piece = self._stream.step(self.tokenizer.backend_tokenizer, token_id) or ""
        self._decoded += len(piece)
        return self.feed(piece) if piece else ""

    def finish(self) -> str:
        """What was held back: the beginning of no stop string, and an incomplete character as U+FFFD."""
        if self.is_stopped:
            return ""
        rest = self.tokenizer.decode(self.ids, skip_special_tokens=True)[self._decoded :]
        self._decoded += len(rest)
        return self.feed(rest) + self.rest()


class CharacterStreamer(BaseStreamer):
    """Hands on the text of one sequence as it is generated, as `IncrementalDetokenizer` shows it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], stop: Sequence[str] = ()
    ) -> None:
        self.detokenizer = IncrementalDetokenizer(tokenizer, stop)
        self.write = write
        self._prompt_is_next = True

    @property
    def text(self) -> str:
        """All that was written."""
        return self.detokenizer.text

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, `(1, length)`, and then with new tokens, `(1,)` or more."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token_id in value.flatten().tolist():
            if piece := self.detokenizer.add(token_id):
                self.write(piece)

    def end(self) -> None:
        """Called at the end of each `generate`; another one, with a longer prompt, may follow."""
        self._prompt_is_next = True

    def finish(self) -> None:
        """Writes what was held back."""
        if piece := self.detokenizer.finish():
            self.write(piece)


class StopStrings(StoppingCriteria):
    """Ends a row when its text holds a stop string. Reads the characters, so that any tokenizer ends at the same."""

    def __init__(self, texts: list[IncrementalDetokenizer], length: int) -> None:
        self.texts = texts
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        for text, new_ids in zip(self.texts, input_ids[:, self.length :].tolist(), strict=True):
            for token_id in new_ids:
                text.add(token_id)
        self.length = input_ids.shape[1]
        return torch.tensor([text.is_stopped for text in self.texts], device=input_ids.device)


@dataclass
class Stopwatch(StoppingCriteria):
    """Looks at the clock when the first token is there; ends nothing."""

    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        if self.first_token is None:
            self.first_token = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def summary(self, tokens: int) -> str:
        """One sentence about `tokens` that were written until now."""
        seconds = time.perf_counter() - self.started
        first = (
            "" if self.first_token is None else f", the first after {1000 * (self.first_token - self.started):.0f} ms"
        )
        return f"{tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s{first}."


def context_of(model: PreTrainedModel) -> int:
    """How many tokens a model reads at most: any number where it has no positions, as recurrent ones."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def check_characters(text: str, name: str) -> None:
    """Raises `ValueError` if a text, with a name for the sentence, holds what is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line, or half a pair of JSON's \u
        raise ValueError(f"{name} is not valid UTF-8 at character {error.start}.") from None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """
    The ids of a prompt; where nothing is written before an empty one, a text begins as after the end of another.

    Raises:
        ValueError: if it holds what is no character.
    """
    check_characters(prompt, "The prompt")
    return tokenizer(prompt, verbose=False).input_ids or [tokenizer.eos_token_id]


def unknown_characters(tokenizer: PreTrainedTokenizerBase, text: str, ids: Iterable[int]) -> str:
    """The characters of a text, whose ids these are, that are not in the vocabulary; for a notice."""
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
        return ""
    encoded = ((c, tokenizer(c, add_special_tokens=False).input_ids) for c in sorted(set(text)))
    return " ".join(repr(character) for character, ids in encoded if tokenizer.unk_token_id in ids)


@contextlib.contextmanager
def failures_in_a_sentence() -> Iterator[None]:
    """Turns what torch says of numbers and memory into what a user can do."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" in str(error):
            raise ValueError(
                "No token can be drawn, because the probabilities are not numbers: temperature or repetition_penalty "
                "is too small, or the weights of the model are damaged."
            ) from error
        if is_out_of_memory(error):
            raise ValueError(
                "There is not enough memory: lower batch_size, num_return_sequences or num_beams."
            ) from error
        raise


@dataclass
class Continuation:
    """
    What was written after a prompt.

    Attributes:
        ids: the tokens; those of a stop string are among them, and the one that ends a text is not.
        finish_reason: "end" where the model ended the text, "stop" before a stop string or by a criterion of the
            caller, and "length" at `max_new_tokens`.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"

    def add(self, new_ids: list[int], text: IncrementalDetokenizer, end_ids: Sequence[int], most: int) -> bool:
        """
        Takes what was written in a window. Returns whether the text has ended.

        Args:
            new_ids: behind the end, there is padding.
            text: that of the sequence, which has read them if there are stop strings.
            most: how many tokens the window could hold.
        """
        end = next((k for k, token_id in enumerate(new_ids) if token_id in end_ids), None)
        if text.is_stopped:
            end = len(text.ids) - len(self.ids)  # its ids are those that were read before it stopped
        self.ids += new_ids[:end]
        if end is not None:
            self.finish_reason = "stop" if text.is_stopped else "end"
        elif len(new_ids) < most:
            self.finish_reason = "stop"  # by a criterion of the caller
        return self.finish_reason != "length"


def generation_config(model: PreTrainedModel, arguments: GenerationArguments) -> GenerationConfig:
    """The model's own settings with those of the user over them."""
    config = copy.deepcopy(model.generation_config)
    asked = [name for name in SAMPLING if getattr(arguments, name) is not None]
    for name in (*asked, *(name for name in SHAPING if getattr(arguments, name) is not None)):
        setattr(config, name, getattr(arguments, name))
    if asked:
        config.do_sample = True
    elif (arguments.num_beams or 1) > 1:
        config.do_sample = False
    if config.temperature == 0:
        config.do_sample = False
    if not config.do_sample:
        # With other values than the neutral ones, transformers warns that greedy decoding ignores them.
        for name, neutral in SAMPLING.items():
            setattr(config, name, neutral)
    return config


def own_processors(arguments: GenerationArguments) -> list[Callable[..., torch.Tensor]]:
    """
    What `logits_processor` names, in order. A class is made anew, without arguments.

    Raises:
        ValueError: if there is no such thing, or it cannot be called with (input_ids, scores). What is called raises it
            if it returns something else than scores.
    """
    return [checked_processor(name, imported(name, "logits_processor")) for name in arguments.logits_processor]


def checked_processor(name: str, found: Any) -> Callable[..., torch.Tensor]:
    """
    The rule `found` under the name that a user gave: `input_ids` (batch, length) and `scores` (batch, vocab_size) to
    scores of the same shape, which is looked at in each call. Raises as `own_processors`.
    """
    if isinstance(found, type) and not takes(found):
        raise ValueError(f"logits_processor {name!r} needs arguments: write a class of your own without.")
    rule = found() if isinstance(found, type) else found
    if not callable(rule) or not takes(rule, "input_ids", "scores"):
        raise ValueError(
            f"logits_processor {name!r} must be a function of (input_ids, scores) or a LogitsProcessor, got {rule!r}."
        )

    def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        result = rule(input_ids, scores)
        if not isinstance(result, torch.Tensor) or result.shape != scores.shape:
            got = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(f"logits_processor {name!r} must return scores {tuple(scores.shape)}, got {got}.")
        return result

    return processor


def takes(function: Callable, *arguments: object) -> bool:
    """Whether a function or class can be called so; `True` where Python does not know, as of some written in C."""
    with contextlib.suppress(ValueError):
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:
            return False
    return True


def check_sequences_fit(model: PreTrainedModel, sequences: int, length: int, copies_of_scores: int) -> None:
    """
    Refuses what would be killed for its memory, or work for very long before it is. Only what is in memory for certain
    counts: the cache of so many sequences of `length` tokens, and the float32 scores of their next tokens, of which
    sampling and beams hold `copies_of_scores`.

    Raises:
        ValueError: if that is more than the device has, other programs or not.
    """
    config = model.config.get_text_config()
    needed = 4 * sequences * copies_of_scores * config.vocab_size
    if config.model_type == MiniConfig.model_type:  # the caches of some others are smaller
        size = model.get_input_embeddings().weight.element_size()
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        needed += sequences * length * numbers * size
    there = total_memory(model.device.type)
    if needed > there:
        raise ValueError(
            f"{sequences:,} sequences at once need at least {needed / GIB:,.0f} GiB of memory, and there are "
            f"{there / GIB:,.1f} GiB: lower batch_size, num_return_sequences or num_beams."
        )


def padded(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of several sequences, padded on the left, and their attention mask, both (sequences, longest)."""
    length = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def write_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    arguments: GenerationArguments,
    notify: Callable[[str], None],
    **generate: Any,
) -> list[Continuation]:
    """
    Continues each prompt, a list of ids, in `num_return_sequences` ways, all of them as one batch with a KV cache.

    A model knows as many positions as its context has. When they are full, the last half of them becomes the prompt of
    a new window: text goes on at any length, and each token still sees at least half a context.

    Args:
        notify: receives one sentence when a part of a prompt has to go.
        generate: what else `model.generate` shall get, such as a streamer.

    Returns:
        `num_return_sequences` continuations of the first prompt, then those of the next, and so on.

    Raises:
        ValueError: if a token cannot be drawn, or memory does not suffice.
    """
    context = context_of(model)
    longest = max(map(len, prompts))
    config = generation_config(model, arguments)
    ways, beams = arguments.num_return_sequences, config.num_beams or 1
    is_greedy = not config.do_sample and beams == 1
    check_sequences_fit(model, len(prompts) * max(ways, beams), min(context, longest), 1 if is_greedy else 2)
    end_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    kept = max(1, context // 2) - len(start)
    if longest >= context:
        notify(
            f"The prompt has {longest} tokens and the context {context}: only the last {kept} tokens of the prompt are "
            f"used."
        )
    results = [Continuation() for _ in range(ways * len(prompts))]
    texts = [IncrementalDetokenizer(tokenizer, arguments.stop) for _ in results]
    writing = {i: list(prompts[i // ways]) for i in range(len(results))}
    # Beams of one prompt compete, so their number is part of the first window; after it, each text goes on alone.
    config.num_return_sequences = ways if beams > 1 else 1
    own_criteria = generate.pop("stopping_criteria", [])
    processors = [*own_processors(arguments), *generate.pop("logits_processor", [])]
    written = 0
    while writing and written < arguments.max_new_tokens:
        for i, ids in writing.items():
            if len(ids) >= context:
                writing[i] = start + ids[len(ids) - kept :]
        inputs, mask = padded(list(writing.values())[:: config.num_return_sequences], tokenizer.pad_token_id or 0)
        length = inputs.shape[1]
        config.max_new_tokens = min(context - length, arguments.max_new_tokens - written)
        config.min_new_tokens = min(config.max_new_tokens, max(0, arguments.min_new_tokens - written)) or None
        criteria = [*own_criteria]
        if arguments.stop:
            criteria.append(StopStrings([texts[i] for i in writing], length))
        with torch.inference_mode(), failures_in_a_sentence():
            output = model.generate(
                inputs=inputs.to(model.device), attention_mask=mask.to(model.device), generation_config=config,
                logits_processor=processors, stopping_criteria=criteria, **generate,
            )  # fmt: skip
        written += config.max_new_tokens
        config.num_return_sequences = 1
        for i, new_ids in zip(list(writing), output[:, length:].tolist(), strict=True):
            if results[i].add(new_ids, texts[i], end_ids, config.max_new_tokens):
                del writing[i]
            else:
                writing[i] += new_ids
    for result, text in zip(results, texts, strict=True):
        if not arguments.stop:
            text.ids = result.ids
        text.finish()
        result.text = text.text
        if text.is_stopped:
            result.finish_reason = "stop"
    return results
