"""What the tokenizers of bytes, of characters and of learned merges share."""

import functools
import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from files_mini import write_text
from tokenizers import AddedToken, Tokenizer, models
from transformers import TokenizersBackend

from .raw_encoding import RawEncoder

# The eight special tokens, in the order of their frozen ids: every checkpoint depends on them.
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)

# A turn is the token of its role, its text, and <|end|>. Nothing stands between turns: the special tokens separate
# them, and a small model should not spend its context on newlines. The text of a message may come in parts, as
# pipelines and servers write it. `generation` marks what an assistant-only loss sees.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("The role of a message must be system, user or assistant, got " ~ message.role ~ ".") -}}
    {%- endif -%}
    {%- if message.content is string -%}
        {%- set text = message.content -%}
    {%- elif message.content is defined and message.content is iterable and message.content is not mapping -%}
        {%- set text -%}
            {%- for part in message.content -%}
                {%- if part is mapping and part.type == "text" and part.text is string -%}
                    {{- part.text -}}
                {%- else -%}
                    {{- raise_exception("A message is text, and a part of it that is not cannot be read.") -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endset -%}
    {%- else -%}
        {{- raise_exception("A message needs a content: text, or a list of parts of the type text.") -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}{{- text ~ "<|end|>" -}}{%- endgeneration -%}
    {%- else -%}
        {{- text ~ "<|end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""


def id_dtype_of(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type for the ids of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class MiniTokenizer(TokenizersBackend):
    """
    A fast tokenizer with the frozen special tokens, which has an id for each of its characters or bytes.

    A prompt gets `<|bos|>` and no `<|eos|>`. What `save_pretrained` writes loads with `AutoTokenizer` anywhere: all
    that a text needs is in `tokenizer.json`. These classes add only the raw path from corpora to ids.

    Padding is on the left, which generation with a batch of prompts needs. A collator may pad so for training too:
    `MiniForCausalLM` counts no prediction of padding. For another class of model give it `padding_side="right"`, or the
    first token of each shorter text counts as predicted from padding.

    Args:
        vocab: the id of each token, without tokens that were added later.
        merges: pairs of tokens that become one, the first first.
    """

    model = models.BPE  # tells transformers that `vocab` is a dictionary
    model_input_names = ["input_ids", "attention_mask"]
    _is_built = False

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]] | None = None, **kwargs: Any) -> None:
        self._tokenizer = self.build_backend(vocab, list(merges or ()))
        # The backend of a saved tokenizer is built anew, so only its vocabulary and its merges are taken from it.
        for name in ("tokenizer_object", "tokenizer_file"):
            kwargs.pop(name, None)
        defaults = {
            "pad_token": SPECIAL_TOKENS[PAD_ID],
            "bos_token": SPECIAL_TOKENS[BOS_ID],
            "eos_token": SPECIAL_TOKENS[EOS_ID],
            "unk_token": SPECIAL_TOKENS[UNK_ID],
            "extra_special_tokens": list(SPECIAL_TOKENS[4:]),
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "add_bos_token": True,
        }
        super().__init__(**{**defaults, **kwargs})
        if self.chat_template is None:
            self.chat_template = CHAT_TEMPLATE
        self._is_built = True

    @staticmethod
    @abstractmethod
    def build_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
        """The tokenizer of the `tokenizers` library over this vocabulary."""

    @classmethod
    def recognizes(cls, backend: Tokenizer) -> bool:
        """Whether a tokenizer of the `tokenizers` library does what one of this class does, added tokens aside."""
        theirs = json.loads(backend.to_str())
        model = theirs["model"]
        if model["type"] != "BPE" or not cls.owns_vocabulary(model["vocab"], model["merges"]):
            return False
        ours = json.loads(cls.build_backend(model["vocab"], [tuple(merge) for merge in model["merges"]]).to_str())
        return cls.has_same_words(ours["pre_tokenizer"], theirs["pre_tokenizer"]) and all(
            ours[part] == theirs[part] for part in ("normalizer", "model", "decoder")
        )

    @staticmethod
    @abstractmethod
    def owns_vocabulary(vocab: dict[str, int], merges: list[list[str]]) -> bool:
        """Whether a vocabulary with its merges, as `tokenizer.json` has them, is one of this class."""

    @staticmethod
    def has_same_words(ours: dict[str, Any], theirs: dict[str, Any] | None) -> bool:
        """Whether two pre-tokenizers, as `tokenizer.json` has them, give the same ids in a tokenizer of this class."""
        return ours == theirs

    def encode_corpus(self, data: bytes) -> np.ndarray:
        """
        Raw bytes of text to ids without special tokens, `(tokens,)`: text that looks like a special token stays text.
        Tokens that were added and are not special are found in it, as the tokenizer itself finds them.
        """
        if any(token in data for token in self._added_texts):
            return self._encode_with_added(data)
        return self._encode_plain(data)

    @abstractmethod
    def _encode_plain(self, data: bytes) -> np.ndarray:
        """The ids of text that holds no added token."""

    @abstractmethod
    def _encode_with_added(self, data: bytes) -> np.ndarray:
        """The ids of text that holds added tokens."""

    def decode_corpus(self, ids: np.ndarray) -> bytes:
        """Ids back to the bytes of their text; special tokens have none."""
        token_bytes = self.token_bytes()
        return b"".join([token_bytes[i] for i in ids.tolist() if i < len(token_bytes)])

    def token_bytes(self) -> list[bytes]:
        """The bytes of text that each id stands for, by id; none for special tokens."""
        token_bytes = self._vocabulary_bytes
        token_bytes = token_bytes + [b""] * (len(self) - len(token_bytes))
        special = set(self.all_special_ids)
        for i, token in self.added_tokens_decoder.items():
            if not token.special and i not in special:
                token_bytes[i] = token.content.encode("utf-8")
        return token_bytes

    @functools.cached_property
    @abstractmethod
    def _vocabulary_bytes(self) -> list[bytes]:
        """As `token_bytes`, without the added tokens. A corpus of short documents is decoded in thousands of calls."""

    def bytes_per_token(self) -> np.ndarray:
        """The number of bytes of text that each id stands for, `(len(self),)`; 0 for special tokens."""
        return np.array([len(token) for token in self.token_bytes()], dtype=np.int64)

    @property
    def id_dtype(self) -> np.dtype:
        """The type of the ids that `encode_corpus` gives."""
        return id_dtype_of(len(self))

    @functools.cached_property
    def _added_texts(self) -> list[bytes]:
        """The added tokens that a corpus may hold: those that are not special."""
        return [token.content.encode("utf-8") for token in self.added_tokens_decoder.values() if not token.special]

    @functools.cached_property
    def raw_encoder(self) -> RawEncoder:
        """What encodes a corpus where numpy alone cannot: by the tokenizer itself, but without special tokens."""
        return RawEncoder(plain_backend(self), self.id_dtype, first_byte_id=None, added=self._added_texts)

    def _add_tokens(self, new_tokens: Iterable[str | AddedToken], special_tokens: bool = False) -> int:
        number = super()._add_tokens(list(new_tokens), special_tokens=special_tokens)
        self.__dict__ = self.__getstate__()
        return number

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed again: copies are small, and libraries that hash tokenizers see no change."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if not isinstance(getattr(type(self), name, None), functools.cached_property)
        }

    def _settings(
        self, new_special_tokens: Iterable[str | AddedToken] | None, special_tokens_map: dict[str, str] | None
    ) -> dict[str, Any]:
        """What a tokenizer of another corpus takes over, with the names that `train_new_from_iterator` was given."""
        renamed = {
            name: (special_tokens_map or {}).get(token, token) for name, token in self.special_tokens_map.items()
        }
        return {
            **renamed,
            "extra_special_tokens": [*self.extra_special_tokens, *(new_special_tokens or [])],
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "chat_template": self.chat_template,
            "add_bos_token": self.add_bos_token,
            "add_eos_token": self.add_eos_token,
        }

    def _save_pretrained(self, save_directory: str, file_names: tuple[str, ...], **kwargs: Any) -> tuple[str, ...]:
        """Names a class that every version of transformers has: no custom code, and no warning about an unknown one."""
        for name in file_names:
            if name.endswith("tokenizer_config.json"):
                path = Path(name)
                config = json.loads(path.read_text(encoding="utf-8"))
                config["tokenizer_class"] = "PreTrainedTokenizerFast"
                write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return super()._save_pretrained(save_directory, file_names, **kwargs)


def plain_backend(tokenizer: TokenizersBackend) -> Tokenizer:
    """A copy of a tokenizer's backend as a corpus needs it, in which nothing is cut or filled up."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
