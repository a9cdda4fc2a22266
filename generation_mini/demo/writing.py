"""
Writes a text in a thread, and tells what happens as events, which are ready for JSON:

    {"read": {"ids", "pieces"}}                   what the model read; of a chat without pieces
    {"window": {"dropped", "start"}}              the next tokens see `start` and then the ids from `dropped` on
    {"pieces": [{"text", "tokens"}]}              text that is complete, with its tokens; see `token_facts`
    {"notice": sentence}, {"error": sentence}     for the user
    {"end": {"reason", "tokens", "seconds"}}      the last one, unless there was an error
"""

import asyncio
import functools
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from modeling_mini.analysis.inputs import token_labels
from torch.nn import functional as F
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ..arguments import GenerationArguments
from ..text_generation import IncrementalDetokenizer, context_of, write_on

OTHERS = 5  # how many other tokens are named for each
SECONDS_BETWEEN_VIEWS = 0.05

Event = dict[str, Any]


@dataclass(eq=False)
class Author:
    """A model that writes one text at a time, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lock: threading.Lock = field(default_factory=threading.Lock)

    @functools.cache  # noqa: B019  (one author lives as long as the program)
    def label(self, token_id: int) -> str:
        """A short readable name of a token; a model may have more ids than its tokenizer."""
        return token_labels(self.tokenizer, [token_id])[0] if token_id < len(self.tokenizer) else f"#{token_id}"


def token_facts(author: Author, token_id: int, bits: torch.Tensor | None) -> dict[str, Any]:
    """
    What the model thought of a token before it was there.

    Args:
        bits: log2 of the probability of each token, `(vocab_size,)`; `None` where nothing was predicted.
    """
    facts = {"id": token_id, "text": author.label(token_id)}
    if bits is None:
        return facts
    values, ids = bits.topk(min(OTHERS + 1, len(bits)))
    likeliest = zip(ids.tolist(), values.exp2().tolist(), strict=True)
    others = [(other, probability) for other, probability in likeliest if other != token_id][:OTHERS]
    surprise = -float(bits[token_id])
    return facts | {
        "probability": round(2**-surprise, 6),
        "surprise": round(surprise, 4),
        # 0 * -inf is NaN, and the logits of some models have -inf.
        "entropy": round(-float((bits.exp2() * bits.clamp(min=-1e9)).sum()), 4),
        "others": [
            {"id": other, "text": author.label(other), "probability": round(probability, 6)}
            for other, probability in others
        ],
    }


class PieceMaker:
    """Puts tokens together until the text of them is complete; a special token is a piece without text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._special = set(tokenizer.all_special_ids)
        self._text = IncrementalDetokenizer(tokenizer)
        self._tokens: list[dict[str, Any]] = []

    def add(self, token: dict[str, Any]) -> list[dict[str, Any]]:
        """The pieces, none or one, that the next token completes."""
        self._tokens.append(token)
        text = self._text.add(token["id"])
        is_special = len(self._tokens) == 1 and token["id"] in self._special
        return self._complete(text) if text or is_special else []

    def finish(self) -> list[dict[str, Any]]:
        """What is left at the end."""
        return self._complete(self._text.finish()) if self._tokens else []

    def _complete(self, text: str) -> list[dict[str, Any]]:
        tokens, self._tokens = self._tokens, []
        return [{"text": text, "tokens": tokens}]


def pieces_of(author: Author, tokens: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All tokens of a text as pieces."""
    maker = PieceMaker(author.tokenizer)
    return [piece for token in tokens for piece in maker.add(token)] + maker.finish()


@torch.inference_mode()
def read(author: Author, ids: list[int]) -> list[dict[str, Any]]:
    """The facts of each token of a text; without figures for those that nothing in the context comes before."""
    known = max(0, len(ids) - context_of(author.model))
    window = torch.tensor([ids[known:]], device=author.model.device)
    bits = F.log_softmax(author.model(window, use_cache=False).logits[0, :-1].float(), dim=-1) / math.log(2)
    rows = [None] * (known + 1) + list(bits)
    return [token_facts(author, token_id, row) for token_id, row in zip(ids, rows, strict=True)]


class Watcher(LogitsProcessor, BaseStreamer):
    """
    Sees the logits before each token and then the token, and tells of both. It changes nothing.

    Args:
        ids: what the model reads first.
    """

    def __init__(self, author: Author, ids: list[int]) -> None:
        self.author = author
        self.length = len(ids)
        self.written = 0
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._pieces = PieceMaker(author.tokenizer)
        self._bits = torch.empty(0)

    def tell(self, **event: Any) -> None:
        self._events.put(event)

    def take(self) -> list[Event]:
        """The events since the last call; pieces that follow each other are one event."""
        events: list[Event] = []
        while not self._events.empty():
            event = self._events.get()
            if events and event.keys() == events[-1].keys() == {"pieces"}:
                events[-1]["pieces"] += event["pieces"]
            else:
                events.append(event)
        return events

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._bits = F.log_softmax(scores[0].float(), dim=-1) / math.log(2)
        return scores

    def put(self, value: torch.Tensor) -> None:
        """Called with each window of the text, `(1, length)`, and then with each of its new tokens, `(1,)`."""
        if value.dim() == 1:
            self.written += 1
            self.add(token_facts(self.author, int(value), self._bits))
        elif value.shape[1] < self.length:
            start = [bos] if (bos := self.author.tokenizer.bos_token_id) is not None else []
            self.tell(window={"dropped": self.length - (value.shape[1] - len(start)), "start": start})

    def add(self, token: dict[str, Any]) -> None:
        self.length += 1
        if pieces := self._pieces.add(token):
            self.tell(pieces=pieces)

    def end(self) -> None:
        """Another window of the text may follow."""

    def finish(self) -> None:
        if pieces := self._pieces.finish():
            self.tell(pieces=pieces)


class Leaving(StoppingCriteria):
    """Ends the text when Stop was pressed, or the page was left."""

    def __init__(self) -> None:
        self.is_left = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_left, dtype=torch.bool, device=input_ids.device)


async def follow(
    author: Author,
    ids: list[int],
    arguments: GenerationArguments,
    first: int | None = None,
    is_prompt_shown: bool = False,
    notices: Iterable[str] = (),
) -> AsyncIterator[list[Event]]:
    """
    Writes, and yields what is new every so often. Closing it ends the text.

    Args:
        ids: what to continue.
        first: a token that comes next whatever the model thinks of it.
        is_prompt_shown: whether "read" has the pieces of `ids`.
        notices: sentences to begin with.
    """
    watcher, leaving = Watcher(author, ids), Leaving()

    def write() -> None:
        if arguments.seed is not None:
            torch.manual_seed(arguments.seed)
        started = time.perf_counter()
        whole = ids if first is None else [*ids, first]
        if first is not None:
            watcher.add(read(author, whole)[-1])
        else:
            pieces = pieces_of(author, read(author, ids)) if is_prompt_shown else None
            watcher.tell(read={"ids": ids, "pieces": pieces})
        (result,) = write_on(
            author.model, author.tokenizer, [whole], arguments, lambda notice: watcher.tell(notice=notice),
            streamer=watcher, logits_processor=[watcher], stopping_criteria=[leaving],
        )  # fmt: skip
        watcher.finish()
        seconds = time.perf_counter() - started
        watcher.tell(end={"reason": result.finish_reason, "tokens": watcher.written, "seconds": seconds})

    def work() -> None:
        for notice in notices:
            watcher.tell(notice=notice)
        if author.lock.locked():
            watcher.tell(notice="Another text is being written; yours comes next.")
        with author.lock:
            try:
                if not leaving.is_left:
                    write()
            except Exception as error:  # it belongs to whoever waits for the text
                watcher.tell(error=" ".join(str(error).split()) or type(error).__name__)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            await asyncio.sleep(SECONDS_BETWEEN_VIEWS)
            if events := watcher.take():
                yield events
        if events := watcher.take():  # what came between the last look and the end
            yield events
    finally:
        leaving.is_left = True
