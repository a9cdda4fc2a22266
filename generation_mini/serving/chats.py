"""Conversations: the endpoints `/v1/chat/completions` and `/v1/responses`."""

import inspect
from typing import Any

from fastapi import HTTPException
from tokenization.chat import text_of
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving import chat_completion, response, utils

from ..text_generation import check_characters
from .requests import NEUTRAL, Checked, wrong_input_is_refused

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
# What `apply_chat_template` takes for itself, and the server tells it; a setting of the template has another name.
TEMPLATE_ARGUMENTS = frozenset(
    (*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages", "load_audio_from_video")
) - {"documents"}
stock_processor_inputs = chat_completion.ChatCompletionHandler.get_processor_inputs_from_messages


class InTurns(Checked):
    """For handlers of conversations."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        # `<|end|>` in a message is no end of a turn but text, as in `encode_messages`.
        self.chat_template_kwargs = {"sanitize_control_tokens": True, **self.chat_template_kwargs}

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
        # Of some fields that are null, transformers would want an object.
        body = {name: value for name, value in body.items() if value is not None}
        with wrong_input_is_refused(body):
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
        with wrong_input_is_refused(body):
            # Without the field, the server would answer by a stream, which is not what the protocol says.
            return await super().handle_request({**body, "stream": body.get("stream") or False}, request_id)

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


def is_message(value: Any) -> bool:
    """Whether it can be a message of a chat; the chat template knows its role, or refuses it."""
    has_content = isinstance(value, dict) and (value.get("content") is not None or "tool_calls" in value)
    return has_content and isinstance(value.get("role"), str)


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
