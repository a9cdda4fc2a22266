"""How requests are answered by the model: one after the other, or in batches."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from fastapi import HTTPException
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.cli.serving import utils

from ..text_generation import IncrementalDetokenizer, StopStrings, TextUntilStop, failures_in_a_sentence
from .requests import as_list


def limit_to_context(model: PreTrainedModel, length: int, config: GenerationConfig) -> None:
    """
    Lets a text end where the context is full.

    Raises:
        HTTPException: 400, if nothing fits after the prompt.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return
    if length >= context:
        raise HTTPException(400, f"The prompt has {length} tokens, and the context of this model holds {context}.")
    most = context - length
    config.max_new_tokens = most if config.max_new_tokens is None else min(config.max_new_tokens, most)


def length_of(inputs: dict[str, Any]) -> int:
    """Tokens of a prompt: a tensor (1, length), or a list where requests are batched."""
    ids = inputs["input_ids"]
    return len(ids) if isinstance(ids, list) else ids.shape[-1]


def ends_by_itself(ids: torch.Tensor | list[int], config: GenerationConfig) -> bool:
    """
    Whether the last token is one that ends a text. The server calls a text too long if it has `max_new_tokens`, so both
    managers clear that number for a text that ends by itself at that very position.
    """
    return len(ids) > 0 and int(ids[-1]) in as_list(config.eos_token_id)


class StreamError(utils._StreamError):
    """An error in a stream, as one sentence. The server puts it between the quotation marks of JSON as it stands."""

    def __init__(self, msg: str) -> None:
        super().__init__(" ".join(msg.split()).replace("\\", "/").replace('"', "'"))


class Ended(StoppingCriteria):
    """Ends a text that nobody waits for any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Watched:
    """
    A model whose `generate` leaves what it has written where the loop of the server can wait for it.

    Attributes:
        ids: of the new tokens; none after an error.
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        self.model, self.length = model, length
        self.loop = asyncio.get_running_loop()
        self.ids = self.loop.create_future()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, **settings: Any) -> None:
        ids: torch.Tensor | list[int] = []
        try:
            with failures_in_a_sentence():
                ids = self.model.generate(**settings)[0, self.length :]
        finally:
            self.loop.call_soon_threadsafe(self.ids.set_result, ids)


class OneByOne(utils.GenerateManager):
    """
    Requests one after the other.

    The seed of a request is set on the thread that writes, when its turn has come: set before, it would be that of the
    text which is being written then.

    The stop strings of transformers would also be found where a prompt ends and the text begins, so the text alone is
    searched here.

    A stream has the text that there is without one, also where it ends in the middle of a character.
    """

    def generate_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **settings: Any
    ) -> tuple[asyncio.Queue, utils.DirectStreamer]:
        if (gen_config.num_beams or 1) > 1:  # transformers would stream nothing, and never end
            raise HTTPException(400, f"num_beams must be 1 with stream, got {gen_config.num_beams}.")
        limit_to_context(model, length_of(inputs), gen_config)
        inputs, stop = with_stop_strings(inputs, processor, gen_config)
        self.submit_seed(gen_config)
        watched = Watched(model, length_of(inputs))
        queue, streamer = super().generate_streaming(watched, processor, inputs, gen_config, **settings)
        text, passed_on = TextUntilStop(stop), asyncio.Queue()

        async def pass_on() -> None:
            decoded = 0
            while True:
                item = await queue.get()
                is_end = item is None or isinstance(item, utils._StreamError)
                if type(item) is str:
                    decoded += len(item)
                    item = text.feed(item)
                elif is_end:
                    ids = await watched.ids
                    rest = ""
                    if settings.get("response_parser") is None:  # which would make other items of the tokens
                        rest = text.feed(processor.decode(ids, skip_special_tokens=True)[decoded:])
                    rest += text.rest()
                    if rest:
                        passed_on.put_nowait(rest)
                    if text.is_stopped or ends_by_itself(ids, gen_config):
                        gen_config.max_new_tokens = None
                if item != "":
                    passed_on.put_nowait(item)
                if is_end:
                    return

        streamer.passing_on = asyncio.get_running_loop().create_task(pass_on())  # the loop alone does not keep it
        return passed_on, streamer

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **settings: Any
    ) -> tuple[str, int, torch.Tensor]:
        limit_to_context(model, length_of(inputs), gen_config)
        inputs, stop = with_stop_strings(inputs, processor, gen_config)
        ended = Ended()
        inputs["stopping_criteria"] = [*inputs.get("stopping_criteria", []), ended]
        self.submit_seed(gen_config)
        try:
            whole, length, ids = await super().generate_non_streaming(model, processor, inputs, gen_config, **settings)
        except asyncio.CancelledError:  # the client has gone
            ended.event.set()
            raise
        text = TextUntilStop(stop)
        shown = text.feed(whole) + text.rest()
        if text.is_stopped or ends_by_itself(ids, gen_config):
            gen_config.max_new_tokens = None
        return shown, length, ids

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> asyncio.Future:
        """As the server's own, with a future that the thread can still answer when nobody waits any more."""
        return asyncio.shield(super().async_submit(fn, *args, **kwargs))

    def submit_seed(self, config: GenerationConfig) -> None:
        """Directly before the text is submitted, with no `await` between, so that no other request comes between."""
        if config.seed_of_request is not None:
            self.submit(utils.set_torch_seed, config.seed_of_request)


def with_stop_strings(
    inputs: Any, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> tuple[dict[str, Any], list[str]]:
    """The arguments of `generate` with what ends the text, and the stop strings, which the configuration loses."""
    stop = as_list(config.stop_strings or [])
    config.stop_strings = None
    if not stop:
        return {**inputs}, stop
    if (config.num_beams or 1) > 1:
        raise HTTPException(400, f"num_beams must be 1 with stop, got {config.num_beams}.")
    criterion = StopStrings([IncrementalDetokenizer(tokenizer, stop)], length_of(inputs))
    return {**inputs, "stopping_criteria": [criterion]}, stop


class InBatches(utils.CBGenerateManager):
    """
    Requests in batches that grow and shrink (`--continuous-batching`).

    transformers samples all of them as the first request asked. One that asks for something else is refused, because it
    would be answered with text of another temperature.

    Attributes:
        shared: the settings that are those of the first request.
        first: the settings of that request.
    """

    shared: ClassVar[tuple[str, ...]] = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        """Nothing, before `check` has let a request pass: one that is refused does not decide for the others."""

    def begin(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        """With the first request."""
        self.first = gen_config
        if self._cb_config is None and model.device.type == "cpu":
            # By default the cache takes most of the memory, and a CPU needs a minute to fill that with zeros.
            self._cb_config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
        super().init_cb(model, gen_config)

    def generate_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **settings: Any
    ) -> tuple[asyncio.Queue, utils.CBStreamer]:
        self.check(model, inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, **settings)
        put = streamer.put

        def put_and_look(output: Any) -> None:
            put(output)
            if ends_by_itself(output.generated_tokens, gen_config):
                gen_config.max_new_tokens = None

        streamer.put = put_and_look
        return queue, streamer

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **settings: Any
    ) -> tuple[str, int, list[int]]:
        self.check(model, inputs, gen_config)
        try:
            answer = await super().generate_non_streaming(model, processor, inputs, gen_config, **settings)
        except asyncio.CancelledError:  # the client has gone
            self._cb.cancel_request(settings["request_id"])
            raise
        if ends_by_itself(answer[2], gen_config):
            gen_config.max_new_tokens = None
        return answer

    def check(self, model: PreTrainedModel, inputs: Any, gen_config: GenerationConfig) -> None:
        """Raises HTTPException 400 for what one request of a batch cannot have."""
        limit_to_context(model, length_of(inputs), gen_config)
        if gen_config.stop_strings:
            raise HTTPException(400, "stop does not work with --continuous-batching: start the server without it.")
        if gen_config.seed_of_request is not None and gen_config.do_sample:
            raise HTTPException(400, "seed does not work with --continuous-batching: start the server without it.")
        if self._cb is None:
            self.begin(model, gen_config)
        for name in self.shared:
            shared, asked = getattr(self.first, name), getattr(gen_config, name)
            if asked != shared:
                reason = "With --continuous-batching, all requests are sampled as the first one asked"
                raise HTTPException(400, f"{reason}: {name} is {shared} on this server, and cannot be {asked}.")
