"""Tokenizers over bytes and characters, with frozen special tokens, that load anywhere with no custom code."""

import os

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .base import BOS_ID, CHAT_TEMPLATE, EOS_ID, PAD_ID, SPECIAL_TOKENS, UNK_ID, MiniTokenizer
from .byte import ByteTokenizer
from .char import CharTokenizer
from .chat import encode_messages, marks_the_assistant


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint folder or Hub repository: a `ByteTokenizer` or `CharTokenizer` where it is one, so
    that it has the raw path for corpora, and otherwise what `AutoTokenizer` gives.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    vocab = tokenizer.get_vocab()
    if [tokenizer.convert_ids_to_tokens(i) for i in range(len(SPECIAL_TOKENS))] != list(SPECIAL_TOKENS):
        return tokenizer
    if vocab == ByteTokenizer().get_vocab():
        return ByteTokenizer.from_pretrained(name_or_path)
    if all(len(token) == 1 for token in vocab if token not in SPECIAL_TOKENS):
        return CharTokenizer.from_pretrained(name_or_path)
    return tokenizer


__all__ = [
    "BOS_ID",
    "CHAT_TEMPLATE",
    "EOS_ID",
    "PAD_ID",
    "SPECIAL_TOKENS",
    "UNK_ID",
    "ByteTokenizer",
    "CharTokenizer",
    "MiniTokenizer",
    "encode_messages",
    "load_tokenizer",
    "marks_the_assistant",
]
