"""Tokenizers over bytes, characters and learned merges, with frozen special tokens, that load with no custom code."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .base import BOS_ID, CHAT_TEMPLATE, EOS_ID, PAD_ID, SPECIAL_TOKENS, UNK_ID, MiniTokenizer
from .bpe import BpeTokenizer
from .byte import ByteTokenizer
from .char import CharTokenizer
from .chat import encode_messages, marks_the_assistant, text_of


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint folder or Hub repository: one of Mini's own classes where it is such a one, so that it
    has the raw path for corpora, and otherwise what `AutoTokenizer` gives.
    """
    # Or it would ask on the terminal whether code beside the tokenizer may run, such as that of a model in the folder.
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    if not tokenizer.is_fast:
        return tokenizer
    for kind in (ByteTokenizer, CharTokenizer, BpeTokenizer):
        if kind.recognizes(tokenizer.backend_tokenizer):
            around = tokenizer("").input_ids  # what stands before and after each text
            has_bos = around[:1] == [tokenizer.bos_token_id]
            has_eos = around[has_bos:] == [tokenizer.eos_token_id]
            return kind.from_pretrained(name_or_path, add_bos_token=has_bos, add_eos_token=has_eos)
    return tokenizer


def joins_last_space(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """
    Whether a text ends in a space that the tokenizer joins with the word after it, as byte-level BPE does. A model has
    hardly seen that space alone: it continues the text without it far better.
    """
    if not text.endswith(" "):
        return False
    alone, followed = (tokenizer(t, add_special_tokens=False, verbose=False).input_ids for t in (text, text + "a"))
    return followed[: len(alone)] != alone


__all__ = [
    "BOS_ID",
    "CHAT_TEMPLATE",
    "EOS_ID",
    "PAD_ID",
    "SPECIAL_TOKENS",
    "UNK_ID",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "MiniTokenizer",
    "encode_messages",
    "joins_last_space",
    "load_tokenizer",
    "marks_the_assistant",
    "text_of",
]
