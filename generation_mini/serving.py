"""
What `mini-transformers serve` adds to the server of transformers: the name under which the model was started is the one
that clients use; a text ends before a stop string, and where the context is full; and a setting that the server would
pass over in silence works or is refused with a reason.

`install` puts these classes in the place of those of transformers, before its command makes them.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from files_mini import ADAPTER_CONFIG, BOX, find_checkpoint
from jinja2 import TemplateError
from modeling_mini.loading.checkpoints import load_model
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from starlette.exceptions import HTTPException as AnyHTTPException
from tokenization.chat import text_of
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, transcription, utils

from .text_generation import (
    IncrementalDetokenizer,
    StopStrings,
    TextUntilStop,
    check_characters,
    failures_in_a_sentence,
)

# What OpenAI's protocol has and the server would ignore, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
# The same of `/v1/responses` alone.
NEUTRAL_IN_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "text": ({}, {"format": {"type": "text"}}),
    "truncation": ("disabled",),
}
# What other values would end in an error of the server.
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "a number that is not negative"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, and 1 at most"),
    "frequency_penalty": (lambda value: value > -1, "a number above -1"),
}
MOST_LOGPROBS = 5  # as in OpenAI's protocol
MOST_CHOICES = 128
MOST_TOKENS = 1 << 31
# What the server itself tells `apply_chat_template`; a setting of the template has another name.
TEMPLATE_ARGUMENTS = frozenset(
    ("add_generation_prompt", "conversation", "messages", "return_dict", "return_tensors", "tokenize", "tools")
)
LARGEST_SEED = (1 << 63) - 1 - MOST_CHOICES  # each choice has the next one


def install() -> None:
    """Puts the classes of this module where transformers' command looks for them."""
    model_manager.ModelManager = ServedModels
    completion.CompletionHandler = Completions
    chat_completion.ChatCompletionHandler = ChatCompletions
    response.ResponseHandler = Responses
    transcription.TranscriptionHandler = Transcriptions
    server.build_server = build_server
    server.split_model_id = split_model_id
    utils.GenerateManager = OneByOne
    utils.CBGenerateManager = InBatches


stock_build_server = server.build_server
stock_processor_inputs = chat_completion.ChatCompletionHandler.get_processor_inputs_from_messages
stock_audio_inputs = transcription.TranscriptionHandler._prepare_audio_inputs


def build_server(*parts: Any, **settings: Any) -> FastAPI:
    """The server of transformers, whose refusals have the form in which clients of OpenAI look for a reason."""
    app = stock_build_server(*parts, **settings)

    def refusal(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(content, status_code=status)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> JSONResponse:
        message = error.detail
        if error.status_code == 404 and message == "Not Found":
            message = f"There is no {request.url.path} here; docs/SERVING.md says what there is."
        elif isinstance(message, list):  # of pydantic, for each field that is wrong
            message = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in message)
        return refusal(error.status_code, message)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(400, "The request must be a JSON object.")

    return app


def split_model_id(model: Any) -> tuple[str, str | None]:
    """As the server's own; HTTPException 400 for a name that is no text."""
    if not isinstance(model, str):
        raise HTTPException(400, f"model must be a text, got {model!r:.80}.")
    return utils.split_model_id(model)


@contextlib.contextmanager
def wrong_input_is_refused() -> Iterator[None]:
    """Status 400 and a sentence for wrong input, which would otherwise be an error of the server without a reason."""
    try:
        with failures_in_a_sentence():
            yield
    except TemplateError as error:
        raise HTTPException(400, f"The chat template refuses the messages: {error}") from None
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise HTTPException(404, f"There is no such model: {' '.join(str(error).split())}") from None


class ServedModels(model_manager.ModelManager):
    """The models of a server; one that was named at its start keeps the name that it was given there."""

    def __init__(self, *, force_model: str | None = None, **settings: Any) -> None:
        self.checkpoint = force_model
        if force_model is not None and (force_model in BOX or Path(force_model).is_dir()):
            self.checkpoint = str(Path(find_checkpoint(force_model)).resolve())
        self.started = int(time.time())
        super().__init__(force_model=force_model, **settings)

    def process_model_name(self, model_id: str) -> str:
        """
        The key of a model: its name, for the one that was named at the start, also where its folder is meant.

        Raises:
            HTTPException: 400, for another one than was named at the start.
        """
        if self.force_model is None:
            return super().process_model_name(model_id)
        if model_id in (self.force_model, self.checkpoint):
            return self.force_model
        if model_id != utils.split_model_id(self.force_model)[0]:
            raise HTTPException(400, f"This server has the model {self.force_model!r}, and not {model_id!r}.")
        return super().process_model_name(model_id)

    def with_revision(self, key: str) -> str:
        return super().process_model_name(self.checkpoint) if key == self.force_model else key

    def is_adapter(self, key: str) -> bool:
        return key == self.force_model and (Path(self.checkpoint) / ADAPTER_CONFIG).is_file()

    def _load_processor(self, model_id_and_revision: str, **settings: Any) -> PreTrainedTokenizerBase:
        if self.is_adapter(model_id_and_revision):
            return load_model(self.checkpoint)[1]  # an adapter may have none of its own
        return super()._load_processor(self.with_revision(model_id_and_revision), **settings)

    def _load_model(self, model_id_and_revision: str, **settings: Any) -> PreTrainedModel:
        if self.is_adapter(model_id_and_revision):
            return load_model(self.checkpoint)[0]
        model = super()._load_model(self.with_revision(model_id_and_revision), **settings)
        if hasattr(model, "compile_decoding"):
            model.compile_decoding(only_kept=True)
        return model

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The one model that requests may name, or those of the cache."""
        if self.force_model is None:
            return super().get_gen_models()
        return [{"id": self.force_model, "object": "model", "created": self.started, "owned_by": ""}]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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
    config.max_new_tokens = min(config.max_new_tokens or context, context - length)


def length_of(inputs: dict[str, Any]) -> int:
    """Tokens of a prompt: a tensor (1, length), or a list where requests are batched."""
    ids = inputs["input_ids"]
    return len(ids) if isinstance(ids, list) else ids.shape[-1]


def ends_by_itself(ids: torch.Tensor | list[int], config: GenerationConfig) -> bool:
    """Whether the last token is one that ends a text."""
    return len(ids) > 0 and int(ids[-1]) in as_list(config.eos_token_id)


class OneByOne(utils.GenerateManager):
    """
    Requests one after the other.

    The seed of a request is set on the thread that writes, when its turn has come: set before, it would be that of the
    text which is being written then.

    The stop strings of transformers would also be found where a prompt ends and the text begins, so the text alone is
    searched here. The server calls a text too long if it has `max_new_tokens`. So that one that ends by itself at that
    very position is not taken for it, `max_new_tokens` is cleared then.
    """

    def generate_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **settings: Any
    ) -> tuple[asyncio.Queue, utils.DirectStreamer]:
        limit_to_context(model, length_of(inputs), gen_config)
        inputs, stop = with_stop_strings(inputs, processor, gen_config)
        self.submit_seed(gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, **settings)
        text, passed_on = TextUntilStop(stop), asyncio.Queue()

        async def pass_on() -> None:
            while True:
                item = await queue.get()
                is_end = item is None or isinstance(item, utils._StreamError)
                if type(item) is str:
                    item = text.feed(item)
                elif is_end and (rest := text.rest()):
                    passed_on.put_nowait(rest)
                if text.is_stopped:
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
        self.submit_seed(gen_config)
        whole, length, ids = await super().generate_non_streaming(model, processor, inputs, gen_config, **settings)
        text = TextUntilStop(stop)
        shown = text.feed(whole) + text.rest()
        if text.is_stopped or ends_by_itself(ids, gen_config):
            gen_config.max_new_tokens = None
        return shown, length, ids

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
    criterion = StopStrings([IncrementalDetokenizer(tokenizer, stop)], length_of(inputs))
    return {**inputs, "stopping_criteria": [criterion]}, stop


class InBatches(utils.CBGenerateManager):
    """
    Requests in batches that grow and shrink (`--continuous-batching`).

    transformers samples all of them as the first request asked. One that asks for something else is refused, because it
    would be answered with text of another temperature.
    """

    shared: ClassVar[tuple[str, ...]] = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")

    def init_cb(self, model: PreTrainedModel, gen_config: GenerationConfig) -> None:
        if self._cb is None:
            self.first = gen_config
            if self._cb_config is None and model.device.type == "cpu":
                # By default the cache takes most of the memory, and a CPU needs a minute to fill that with zeros.
                self._cb_config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
        super().init_cb(model, gen_config)

    def generate_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **settings: Any
    ) -> tuple[asyncio.Queue, utils.CBStreamer]:
        self.check(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, **settings)

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: Any, gen_config: GenerationConfig, **settings: Any
    ) -> tuple[str, int, list[int]]:
        self.check(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, **settings)

    def check(self, model: PreTrainedModel, inputs: Any, gen_config: GenerationConfig) -> None:
        limit_to_context(model, length_of(inputs), gen_config)
        if gen_config.stop_strings:
            raise HTTPException(400, "stop does not work with --continuous-batching: start the server without it.")
        if gen_config.seed_of_request is not None and gen_config.do_sample:
            raise HTTPException(400, "seed does not work with --continuous-batching: start the server without it.")
        for name in self.shared:
            ours, asked = getattr(self.first, name), getattr(gen_config, name)
            if asked != ours:
                reason = "With --continuous-batching, all requests are sampled as the first one asked"
                raise HTTPException(400, f"{reason}: {name} is {ours} on this server, and cannot be {asked}.")


class Checked:
    """For handlers: refuses, with a reason, what they would ignore."""

    neutral = NEUTRAL
    supported: frozenset[str] = frozenset()
    fewest_tokens = 1

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        for name in self.neutral.keys() & body.keys() - self.supported:
            if body[name] is not None and body[name] not in self.neutral[name]:
                raise HTTPException(400, f"{name} does not work here, got {body[name]!r}: leave it out.")
        stop = body.get("stop")
        if stop is not None and not all(isinstance(text, str) and text for text in as_list(stop)):
            raise HTTPException(400, f"stop must be a text or a list of texts that are not empty, got {stop!r}.")
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if body.get(name) is not None:
                number_in(body, name, 1, self.fewest_tokens, MOST_TOKENS)
        number_in(body, "seed", 0, 0, LARGEST_SEED)
        if not isinstance(suffix := body.get("suffix") or "", str):
            raise HTTPException(400, f"suffix must be a text, got {suffix!r}.")
        if (settings := body.get("generation_config")) is not None and not is_json_object(settings):
            raise HTTPException(400, f"generation_config must be the text of a JSON object, got {settings!r:.80}.")
        for name, (fits, words) in NUMBERS.items():
            if (value := body.get(name)) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                raise HTTPException(400, f"{name} must be {words}, got {value!r}.")
            if value > sys.float_info.max:
                raise HTTPException(400, f"{name} must be finite, got {value!r:.80}.")

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        # Without the seed, which transformers would set at once, whatever is being written.
        config = super()._build_generation_config({**body, "seed": None}, model_generation_config, use_cb=use_cb)
        config.seed_of_request = body.get("seed")
        return config

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, PreTrainedModel, Any]:
        models = self.model_manager
        if models.force_model is not None and body.get("model") == models.checkpoint:
            body["model"] = models.force_model
        return super()._resolve_model(body)


class InTurns(Checked):
    """For handlers of conversations."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        settings = body.get("chat_template_kwargs")
        if settings is not None and not (isinstance(settings, dict) and TEMPLATE_ARGUMENTS.isdisjoint(settings)):
            raise HTTPException(
                400, f"chat_template_kwargs must be an object with settings of the chat template, got {settings!r:.80}."
            )

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: utils.Modality) -> list[dict]:
        """
        The messages for the chat template. Of a model of text, transformers would leave out a picture in silence.

        Raises:
            ValueError: for a message that is not text, and for one with tool calls.
        """
        if modality == utils.Modality.LLM:
            for message in messages:
                if message.get("tool_calls"):
                    raise ValueError("tool_calls do not work here: leave out such messages.")
                check_characters(text_of(message.get("content")), "A message")
            # transformers leaves out the content of a message that has the key, and clients send it as null.
            messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        return stock_processor_inputs(messages, modality)


class ChatCompletions(InTurns, chat_completion.ChatCompletionHandler):
    """The endpoint `/v1/chat/completions`."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """
        The answer, as JSON or as a stream.

        Raises:
            HTTPException: 400, with a reason, for what does not work.
        """
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
            raise HTTPException(400, "messages must be a list of objects with role and content, and not empty.")
        with wrong_input_is_refused():
            return await super().handle_request(body, request_id)


class Responses(InTurns, response.ResponseHandler):
    """The endpoint `/v1/responses`: a conversation in text, of which the server keeps nothing."""

    neutral = NEUTRAL | NEUTRAL_IN_RESPONSES

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """
        The answer, as JSON or as a stream.

        Raises:
            HTTPException: 400, with a reason, for what does not work.
        """
        with wrong_input_is_refused():
            # Without the field, the server would answer by a stream, which is not what the protocol says.
            return await super().handle_request({**body, "stream": bool(body.get("stream"))}, request_id)

    @staticmethod
    def _normalize_input(body: dict[str, Any]) -> list[dict[str, Any]]:
        """
        The messages of `instructions` and `input`, which is a text, a list of messages, or the parts of one.

        Raises:
            HTTPException: 400, if it is something else.
        """
        messages, instructions = body.get("input"), body.get("instructions") or ""
        if isinstance(messages, str) or (isinstance(messages, list) and not any("role" in as_map(m) for m in messages)):
            messages = [{"role": "user", "content": messages or None}]
        if not isinstance(messages, list) or not all(map(is_message, messages)):
            raise HTTPException(400, "input must be a text or a list of objects with role and content, and not empty.")
        if not isinstance(instructions, str):
            raise HTTPException(400, f"instructions must be a text, got {instructions!r:.80}.")
        plain = [{"role": message["role"], "content": as_parts_of_chats(message["content"])} for message in messages]
        return [{"role": "system", "content": instructions}, *plain] if instructions else plain


class Transcriptions(transcription.TranscriptionHandler):
    """The endpoint `/v1/audio/transcriptions`, for a server that has models of speech beside those of Mini."""

    async def handle_request(self, request: Request) -> Any:
        """
        The text of a recording.

        Raises:
            HTTPException: 400, with a reason, for what does not work.
        """
        models = self.model_manager
        if models.force_model is not None:
            check_hears(models.load_model_and_processor(models.process_model_name(models.force_model))[1])
        with wrong_input_is_refused():
            return await super().handle_request(request)

    def _validate_request(self, form_keys: set[str]) -> None:
        super()._validate_request(form_keys)
        if missing := {"file", "model"} - form_keys:
            raise HTTPException(400, f"The form must have the fields file and model: {min(missing)} is missing.")

    @staticmethod
    def _prepare_audio_inputs(file_bytes: bytes, audio_processor: Any, audio_model: PreTrainedModel) -> dict:
        check_hears(audio_processor)
        return stock_audio_inputs(file_bytes, audio_processor, audio_model)


def check_hears(processor: Any) -> None:
    if not hasattr(processor, "feature_extractor"):
        raise HTTPException(400, "This is a model of text: it cannot transcribe speech.")


def as_map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_parts_of_chats(content: Any) -> Any:
    """A content of `/v1/responses` as one of chats, where parts that are text have another type."""
    if not isinstance(content, list):
        return content
    kinds = {"input_text": "text", "output_text": "text"}
    return [
        {**part, "type": kinds.get(part.get("type"), part.get("type"))} if isinstance(part, dict) else part
        for part in content
    ]


class Completions(Checked, completion.CompletionHandler):
    """The endpoint `/v1/completions`, with lists of prompts, `n`, `echo` and `logprobs`."""

    supported = frozenset({"n", "logprobs"})
    _unused_fields = completion.CompletionHandler._unused_fields - {"n", "logprobs", "echo"}  # else it warns of them
    fewest_tokens = 0

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """
        The answer, as JSON or as a stream.

        Raises:
            HTTPException: 400, with a reason, for what does not work.
        """
        self._validate_request(body)
        with wrong_input_is_refused():
            return await self.answer(body, request_id)

    async def answer(self, body: dict[str, Any], request_id: str) -> Any:
        """The answer to a request whose settings are checked."""
        prompts = prompts_of(body.get("prompt"))
        choices = number_in(body, "n", 1, 1, MOST_CHOICES)
        echo, logprobs = bool(body.get("echo")), None
        if body.get("logprobs") is not None and body["logprobs"] is not False:
            logprobs = number_in(body, "logprobs", 0, 0, MOST_LOGPROBS)
        if body.get("stream"):
            if len(prompts) > 1 or choices > 1 or echo or logprobs is not None:
                raise HTTPException(400, "n, echo, logprobs and a list of prompts do not work with stream.")
            return await super().handle_request({**body, "prompt": prompts[0]}, request_id)
        answer = Answer(self, body, request_id)
        for prompt in prompts:
            for _ in range(choices):
                await answer.add_choice(prompt, echo, logprobs)
        return JSONResponse(answer.content(), media_type="application/json")


def is_message(value: Any) -> bool:
    """Whether it can be a message of a chat; the chat template knows its role, or refuses it."""
    has_content = isinstance(value, dict) and (value.get("content") is not None or "tool_calls" in value)
    return has_content and isinstance(value.get("role"), str)


def prompts_of(given: Any) -> list[str]:
    """
    The prompts of a request.

    Raises:
        HTTPException: 400, if they are not text.
        ValueError: if they hold what is no character.
    """
    prompts = as_list("" if given is None else given)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise HTTPException(400, "prompt must be a text or a list of texts; token ids are not taken.")
    for prompt in prompts:
        check_characters(prompt, "The prompt")
    return prompts


def is_json_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False


def number_in(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    """
    A whole number of a request.

    Raises:
        HTTPException: 400, if it is none or lies outside.
    """
    value = body.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise HTTPException(400, f"{name} must be a whole number from {least} to {most}, got {value!r}.")
    return value


class Answer:
    """What a request for completions is answered with, choice after choice."""

    def __init__(self, handler: Completions, body: dict[str, Any], request_id: str) -> None:
        self.handler, self.body, self.request_id = handler, body, request_id
        self.model_id, self.model, self.tokenizer = handler._resolve_model(body)
        state = handler.generation_state
        modality = handler.model_manager.get_model_modality(self.model, processor=self.tokenizer)
        self.in_batches = state.use_continuous_batching(self.model, modality)
        self.manager = state.get_manager(self.model_id, use_cb=self.in_batches)
        self.choices: list[CompletionChoice] = []
        self.prompt_tokens = self.completion_tokens = 0

    async def add_choice(self, prompt: str, echo: bool, logprobs: int | None) -> None:
        """
        Continues a prompt.

        Args:
            echo: whether the text begins with the prompt.
            logprobs: how many likely tokens to name at each position, beside the log-probability of what stands there;
                `None`: no log-probabilities.
        """
        if logprobs is not None and self.in_batches:
            raise HTTPException(400, "logprobs do not work with --continuous-batching: start the server without it.")
        prompt_ids = self.tokenizer(prompt).input_ids
        text, ids, finish_reason = await self.continuation(prompt_ids)
        begin = len(prompt_ids)
        if echo:  # bos, before the text, is not part of it
            begin, text = sum(token == self.tokenizer.bos_token_id for token in prompt_ids[:1]), prompt + text
        table = None
        if logprobs is not None:
            table = await self.manager.async_submit(self.log_probabilities, prompt_ids + ids, begin, text, logprobs)
        choice = CompletionChoice(
            text=text + (self.body.get("suffix") or ""),
            index=len(self.choices),
            logprobs=table,
            finish_reason=finish_reason,
        )
        self.choices.append(choice)
        self.prompt_tokens += len(prompt_ids)
        self.completion_tokens += len(ids)

    async def continuation(self, prompt_ids: list[int]) -> tuple[str, list[int], str]:
        """Text, tokens and finish_reason of what the model writes after these tokens."""
        body = self.body
        if body.get("seed") is not None:  # it is set for each choice, and they differ
            body = {**body, "seed": body["seed"] + len(self.choices)}
        config = self.handler._build_generation_config(body, self.model.generation_config, use_cb=self.in_batches)
        if body.get("max_tokens") == 0:  # to learn the log-probabilities of the prompt
            limit_to_context(self.model, len(prompt_ids) - 1, config)
            return "", [], "length"
        inputs: dict[str, Any] = {"input_ids": prompt_ids}
        if self.in_batches:
            self.manager.init_cb(self.model, config)
        else:
            input_ids = torch.tensor([prompt_ids], device=self.model.device)
            inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        name = f"{self.request_id}-{len(self.choices)}"  # no two requests of a batch have the same
        text, _, ids = await self.manager.generate_non_streaming(
            self.model, self.tokenizer, inputs, config, request_id=name
        )
        is_cut = config.max_new_tokens is not None and len(ids) >= config.max_new_tokens
        return text, [int(token) for token in ids], "length" if is_cut else "stop"

    def log_probabilities(self, ids: list[int], begin: int, text: str, count: int) -> Logprobs:
        """
        Of the tokens from `begin` on that make up `text`: what the model gives them, before temperature and top-p. The
        first token of all has none.
        """
        with torch.no_grad():
            logits = self.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits[0]
        scores = logits.float().log_softmax(-1).cpu()  # (length, vocabulary), of the token that follows
        table = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[] if count else None, text_offset=[])
        for position in range(begin, len(ids)):
            # Of a character, the first bytes are not a character yet.
            offset = len(self.tokenizer.decode(ids[begin:position], skip_special_tokens=True).rstrip("\ufffd"))
            if offset >= len(text):
                break
            table.tokens.append(self.tokenizer.decode([ids[position]]))
            table.text_offset.append(offset)
            table.token_logprobs.append(scores[position - 1, ids[position]].item() if position else None)
            if count:
                best = scores[position - 1].topk(count) if position else None
                named = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
                table.top_logprobs.append({self.tokenizer.decode([token]): value for token, value in named})
        return table

    def content(self) -> dict[str, Any]:
        """The answer in OpenAI's protocol."""
        usage = CompletionUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
        )
        return Completion(
            id=self.request_id,
            created=int(time.time()),
            model=self.model_id,
            choices=self.choices,
            object="text_completion",
            usage=usage,
        ).model_dump(exclude_none=False)
