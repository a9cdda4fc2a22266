"""Turns a prompt or a text into the token ids that a model is measured on, and ids into readable labels."""

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# An upper bound: tokens of known tokenizers are shorter than this on average. Longer tokens make windows shorter.
CHARACTERS_PER_TOKEN = 8
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "\\r"}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, prompt: str) -> torch.Tensor:
    """
    A prompt as the model would read it, (1, length) int64.

    Raises:
        ValueError: if it has fewer than two tokens or more than the context.
    """
    ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids.long()
    length, context_length = ids.shape[1], config.max_position_embeddings
    if length > context_length:
        raise ValueError(f"The prompt has {length} tokens; the context of the model has {context_length}.")
    if length < 2:
        raise ValueError("The prompt must have at least two tokens.")
    return ids


def text_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> torch.Tensor:
    """
    Windows whose beginnings are spread evenly over a text, each encoded like a prompt: (windows, length) int64. There
    are at most `count`, and fewer where the text is short. A text of fewer than `length` tokens is one window.

    Raises:
        ValueError: if the text has fewer than two tokens, or `length` or `count` is too small.
    """
    if length < 2 or count < 1:
        raise ValueError(f"Windows must be at least 2 tokens long and at least 1, got {length} and {count}.")
    last_start = max(0, len(text) - length)
    windows = []
    for start in np.unique(np.linspace(0, last_start, count, dtype=np.int64)):
        piece = text[start : start + length * CHARACTERS_PER_TOKEN]
        # Text that looks like a special token stays text.
        windows.append(tokenizer(piece, split_special_tokens=True, verbose=False).input_ids[:length])
    # Where a token has several characters, the last windows may be shorter than the others.
    longest = max(len(window) for window in windows)
    if longest < 2:
        raise ValueError("The text must have at least two tokens.")
    return torch.tensor([window for window in windows if len(window) == longest])


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """
    One short label for each id. Usually it is the text of the token, with white space made visible. Where a token is
    only a part of a character, it is the bytes in hexadecimal; for a special token, the name without its brackets.
    """
    labels, special_ids = [], set(tokenizer.all_special_ids)
    for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text = tokenizer.decode([token_id])
        if token_id in special_ids:
            label = token.strip("<|>")
        elif "\N{REPLACEMENT CHARACTER}" in text and all(character in BYTE_OF_CHARACTER for character in token):
            label = " ".join(f"{BYTE_OF_CHARACTER[character]:02X}" for character in token)
        else:
            label = "".join(VISIBLE.get(c, c) if c.isprintable() or c in VISIBLE else f"{ord(c):02X}" for c in text)
        labels.append(label or token)
    return labels
