"""What the byte and the character tokenizer share."""

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models
from transformers import TokenizersBackend

# The eight special tokens, in the order of their frozen ids: every checkpoint depends on them.
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)

# A turn is the token of its role, its text, and <|end|>. Nothing stands between turns: the special tokens separate
# them, and a small model should not spend its context on newlines. `generation` marks what an assistant-only loss sees.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("The role of a message must be system, user or assistant, got " ~ message.role ~ ".") -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}{{- message.content ~ "<|end|>" -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content ~ "<|end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""


class MiniTokenizer(TokenizersBackend):
    """
    A fast tokenizer with the frozen special tokens and one id for each of its characters or bytes.

    A prompt gets `<|bos|>` and no `<|eos|>`. What `save_pretrained` writes loads with `AutoTokenizer` anywhere: all
    that a text needs is in `tokenizer.json`. These classes add only the raw path from corpora to ids.
    """

    model = models.BPE  # tells transformers that `vocab` is a dictionary
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab: dict[str, int], **kwargs: Any) -> None:
        self._tokenizer = self.build_backend(vocab)
        # The backend of a saved tokenizer is built anew from its vocabulary, so only the vocabulary is taken from it.
        for name in ("tokenizer_object", "tokenizer_file", "merges"):
            kwargs.pop(name, None)
        kwargs["add_bos_token"] = True
        defaults = {
            "pad_token": SPECIAL_TOKENS[PAD_ID],
            "bos_token": SPECIAL_TOKENS[BOS_ID],
            "eos_token": SPECIAL_TOKENS[EOS_ID],
            "unk_token": SPECIAL_TOKENS[UNK_ID],
            "extra_special_tokens": list(SPECIAL_TOKENS[4:]),
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",  # what generation with a batch of prompts needs
        }
        super().__init__(**{**defaults, **kwargs})
        if self.chat_template is None:
            self.chat_template = CHAT_TEMPLATE

    @staticmethod
    @abstractmethod
    def build_backend(vocab: dict[str, int]) -> Tokenizer:
        """The tokenizer of the `tokenizers` library over this vocabulary."""

    @abstractmethod
    def encode_corpus(self, data: bytes) -> np.ndarray:
        """Raw bytes of text to ids without special tokens: text that looks like a special token stays text."""

    @abstractmethod
    def decode_corpus(self, ids: np.ndarray) -> bytes:
        """Ids back to the bytes of their text; special tokens have none."""

    @abstractmethod
    def bytes_per_token(self) -> np.ndarray:
        """The number of bytes of text that each id stands for, `(len(self),)`; 0 for special tokens."""

    @property
    def id_dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every id."""
        return np.dtype(np.uint16 if len(self) <= 2**16 else np.uint32)

    def _save_pretrained(self, save_directory: str, file_names: tuple[str, ...], **kwargs: Any) -> tuple[str, ...]:
        """Names a class that every version of transformers has: no custom code, and no warning about an unknown one."""
        for name in file_names:
            if name.endswith("tokenizer_config.json"):
                path = Path(name)
                config = json.loads(path.read_text(encoding="utf-8"))
                config["tokenizer_class"] = "PreTrainedTokenizerFast"
                path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, **kwargs)
