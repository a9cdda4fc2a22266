"""
The tokenizer of a GGUF file: byte-level BPE, with merges or without.

llama.cpp does not read tokenizer.json. It has tokenizers of its own, which get the tokens, the merges, and the name of
a way to split text into words. Its byte-level BPE gives the same ids as transformers for any text. It has no character
tokenizer like Mini's, which reads each unknown character as one <|unk|>: its tokenizers drop unknown characters, or
read one for each byte or for several characters.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# How llama.cpp splits text. With merges, the split must be that of ByteLevel, whose names are "gpt-2" and "trillion".
# Without merges, no split changes an id. Both names here leave text as it is: with "gpt-2", `llama_detokenize` drops
# spaces before punctuation.
SPLIT_AS_BYTE_LEVEL, SPLIT_WITHOUT_MERGES = "trillion", "qwen2"
# llama.cpp refuses an empty list of merges. This merge of two <|pad|> never applies, because text is read as bytes.
NO_MERGE = "<|pad|> <|pad|>"
END_OF_TURN = "<|end|>"


@dataclass
class Vocabulary:
    """
    Attributes:
        tokens: the token of each id, as in the tokenizer's vocabulary (bytes as characters).
        types: the `gguf.TokenType` of each id.
        merges: pairs of tokens with a space between.
        split: the name of the way to split text into words.
        add_bos: whether a prompt begins with bos.
        special_ids: the ids of special tokens, by llama.cpp's names.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    split: str
    add_bos: bool
    special_ids: dict[str, int]
    chat_template: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int) -> "Vocabulary":
        """
        The vocabulary of a tokenizer, for a model with `size` rows in its embedding.

        Raises:
            ValueError: if llama.cpp would give other ids, with the reason.
        """
        if len(tokenizer) > size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens and the model {size}: they do not belong together."
            )
        if not tokenizer.is_fast:
            raise ValueError("gguf needs a fast tokenizer (tokenizer.json).")
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        if reason := obstacle(backend):
            raise ValueError(
                f"llama.cpp cannot read text as this tokenizer does: {reason}. Export the model as native or onnx "
                f"instead."
            )
        prefix = tokenizer("").input_ids
        if prefix not in ([], [tokenizer.bos_token_id]) or tokenizer("a").input_ids[:-1] != prefix:
            raise ValueError(
                "llama.cpp cannot read text as this tokenizer does: it adds other tokens than a bos in front."
            )

        merges = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
        added = {entry["id"]: entry for entry in backend["added_tokens"]}
        tokens, types = [], []
        for i in range(size):
            token = tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else None
            if token is None:
                tokens.append(f"[UNUSED{i}]")
                types.append(gguf.TokenType.UNUSED)
                continue
            tokens.append(token)
            if i not in added:
                types.append(gguf.TokenType.NORMAL)
            elif not added[i]["special"]:
                types.append(gguf.TokenType.USER_DEFINED)
            else:
                is_unknown = i == tokenizer.unk_token_id and i != tokenizer.eos_token_id
                types.append(gguf.TokenType.UNKNOWN if is_unknown else gguf.TokenType.CONTROL)
        special_ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        special_ids["eot"] = tokenizer.get_vocab().get(END_OF_TURN)
        return cls(
            tokens=tokens,
            types=types,
            merges=merges or [NO_MERGE],
            split=SPLIT_AS_BYTE_LEVEL if merges else SPLIT_WITHOUT_MERGES,
            add_bos=bool(prefix),
            special_ids={name: i for name, i in special_ids.items() if i is not None},
            chat_template=tokenizer.chat_template,
        )

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Adds the vocabulary to a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, token_id in self.special_ids.items():
            getattr(writer, f"add_{name}_token_id")(token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        if self.chat_template is not None:
            writer.add_chat_template(without_generation_marks(self.chat_template))


def obstacle(backend: dict[str, Any]) -> str | None:
    """The reason why llama.cpp would give other ids than this tokenizer.json; `None` if it gives the same."""
    model = backend["model"]
    splitter = backend["pre_tokenizer"] or {}
    if splitter.get("type") == "Sequence" and len(splitter["pretokenizers"]) == 1:
        splitter = splitter["pretokenizers"][0]
    if model["type"] != "BPE" or splitter.get("type") != "ByteLevel":
        has_characters = model["type"] == "BPE" and not model["merges"]
        own = "single characters" if has_characters else "no bytes"
        return f"its tokens are {own}, and there they are bytes or merged bytes, as those of --tokenizer byte and bpe"
    if missing := [byte for byte, character in bytes_to_unicode().items() if character not in model["vocab"]]:
        return f"it has no token for {len(missing)} of the 256 bytes"
    if backend["normalizer"] is not None:
        return "it normalises text"
    if splitter["add_prefix_space"]:
        return "it puts a space in front of a text (add_prefix_space)"
    if model["merges"] and not splitter["use_regex"]:
        return "it merges across words (use_regex is false)"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback"):
        if model.get(name):
            return f"its {name} is {model[name]!r}"
    for token in backend["added_tokens"]:
        for name in ("lstrip", "rstrip", "single_word"):
            if token[name]:
                return f"{name} of its token {token['content']!r} is true"
    return None


def without_generation_marks(template: str) -> str:
    """
    A chat template without the `{% generation %}` tags, which mark the assistant's text and are not standard Jinja.
    They become a condition that is always true, so that white space does not change.
    """
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template)
