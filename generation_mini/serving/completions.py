"""Texts that are continued: the endpoint `/v1/completions`."""

import time
from typing import Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.completion_choice import Logprobs
from transformers.cli.serving import completion

from ..text_generation import IncrementalDetokenizer, check_characters
from .generating import limit_to_context
from .requests import MOST_CHOICES, MOST_TOKENS, Checked, as_list, number_in, wrong_input_is_refused

MOST_LOGPROBS = 5  # as in OpenAI's protocol


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
        with wrong_input_is_refused(body):
            return await self.complete(body, request_id)

    async def complete(self, body: dict[str, Any], request_id: str) -> Any:
        """
        As `handle_request`, for a request that `_validate_request` let pass.

        Raises:
            HTTPException: 400, for a prompt or a number that does not work here.
            ValueError: for wrong input that only shows on the way.
        """
        prompts = prompts_of(body.get("prompt"))
        choices = number_in(body, "n", 1, 1, MOST_CHOICES)
        echo, logprobs = bool(body.get("echo")), None
        if body.get("logprobs") is not None and body["logprobs"] is not False:
            logprobs = number_in(body, "logprobs", 0, 0, MOST_LOGPROBS)
        if body.get("stream"):
            if len(prompts) > 1 or choices > 1 or echo or logprobs is not None:
                raise HTTPException(400, "n, echo, logprobs and a list of prompts do not work with stream.")
            number_in(body, "max_tokens", 1, 1, MOST_TOKENS)  # a stream of none would be one up to the end
            return await super().handle_request({**body, "prompt": prompts[0]}, request_id)
        answer = Answer(self, body, request_id)
        for prompt in prompts:
            await answer.add_choices(prompt, choices, echo, logprobs)
        return JSONResponse(answer.content(), media_type="application/json")


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

    async def add_choices(self, prompt: str, count: int, echo: bool, logprobs: int | None) -> None:
        """
        Continues a prompt in `count` ways.

        Args:
            echo: whether the text begins with the prompt.
            logprobs: how many likely tokens to name at each position, beside the log-probability of what stands there;
                `None`: no log-probabilities.

        Raises:
            HTTPException: 400, for log-probabilities with batches, and for a prompt that fills the context.
        """
        if logprobs is not None and self.in_batches:
            raise HTTPException(400, "logprobs do not work with --continuous-batching: start the server without it.")
        prompt_ids = self.tokenizer(prompt).input_ids
        self.prompt_tokens += len(prompt_ids)  # once, as in OpenAI's protocol
        for _ in range(count):
            await self.add_choice(prompt, prompt_ids, echo, logprobs)

    async def add_choice(self, prompt: str, prompt_ids: list[int], echo: bool, logprobs: int | None) -> None:
        """One of them."""
        text, ids, finish_reason = await self.continuation(prompt_ids)
        begin = len(prompt_ids)  # of the tokens that `text` shows
        if echo:
            begin = int(prompt_ids[:1] == [self.tokenizer.bos_token_id])  # bos stands before the text
            text = prompt + text
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
        if not self.in_batches:
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
        before = IncrementalDetokenizer(self.tokenizer)
        for position in range(begin, len(ids)):
            offset = len(before.text)  # in whole characters
            before.add(ids[position])
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
