"""Continuing a text, beyond the context if need be, as a whole or character by character."""

import copy
from collections.abc import Callable

import torch
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .arguments import GenerationArguments


class CharacterStreamer(BaseStreamer):
    """
    Hands on the text of one sequence as it is generated: each character as soon as it is complete, never half a UTF-8
    character. All the pieces together equal `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.write = write
        self.ids: list[int] = []
        self.text = ""
        self._stream = DecodeStream(skip_special_tokens=True)
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, `(1, length)`, and then with each token, `(1,)`."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        for token_id in value.flatten().tolist():
            self.ids.append(token_id)
            if piece := self._stream.step(self.tokenizer.backend_tokenizer, token_id):
                self._emit(piece)

    def end(self) -> None:
        """Called at the end of each `generate`; another one, with a longer prompt, may follow."""
        self._prompt_is_next = True

    def finish(self) -> None:
        """Writes what the stream held back: an incomplete character, as U+FFFD."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if rest := text[len(self.text) :]:
            self._emit(rest)

    def _emit(self, piece: str) -> None:
        self.text += piece
        self.write(piece)


def generation_config(model: PreTrainedModel, arguments: GenerationArguments) -> GenerationConfig:
    """The model's own settings with those of the user over them."""
    config = copy.deepcopy(model.generation_config)
    for name in ("temperature", "top_k", "top_p"):
        if getattr(arguments, name) is not None:
            setattr(config, name, getattr(arguments, name))
            config.do_sample = True
    if config.temperature == 0:
        config.do_sample = False
        # The neutral values: with others, transformers warns that greedy decoding ignores them.
        config.temperature, config.top_p, config.top_k = 1.0, 1.0, 50
    return config


def write_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    arguments: GenerationArguments,
    notify: Callable[[str], None],
    streamer: CharacterStreamer | None = None,
) -> list[list[int]]:
    """
    Continues `prompt_ids` in `num_return_sequences` ways, with a KV cache.

    A model knows as many positions as its context has. When they are full, the last half of them becomes the prompt of
    a new window: text goes on at any length, and each token still sees at least half a context.

    Args:
        notify: receives one sentence when a part of the prompt has to go.

    Returns:
        The new ids of each sequence, without the token that ended it.
    """
    context = model.config.max_position_embeddings
    config = generation_config(model, arguments)
    end_ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    keep = max(1, context // 2)
    if len(prompt_ids) >= context:
        notify(
            f"The prompt has {len(prompt_ids)} tokens and the context {context}: only the last {keep - len(start)} "
            f"tokens of the prompt are used."
        )
    finished: list[list[int]] = [[] for _ in range(arguments.num_return_sequences)]
    writing = {i: list(prompt_ids) for i in range(arguments.num_return_sequences)}
    written = 0
    while writing and written < arguments.max_new_tokens:
        for i, ids in writing.items():
            if len(ids) >= context:
                writing[i] = start + ids[len(ids) - (keep - len(start)) :]
        inputs = torch.tensor(list(writing.values()), device=model.device)
        config.max_new_tokens = min(context - inputs.shape[1], arguments.max_new_tokens - written)
        with torch.inference_mode():
            output = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=streamer
            )
        written += config.max_new_tokens
        for i, new_ids in zip(list(writing), output[:, inputs.shape[1] :].tolist(), strict=True):
            end = next((k for k, token_id in enumerate(new_ids) if token_id in end_ids), None)
            finished[i] += new_ids[:end]
            if end is not None:
                del writing[i]
            else:
                writing[i] += new_ids
    return finished
