"""From messages to ids by a tokenizer's chat template, with what people wrote in them kept apart from its own marks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

# Unicode promises that these are in no text. One of them splits what would otherwise be read as a special token.
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
HALF_OF_A_CHARACTER = re.compile("[\ud800-\udfff]")
GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """
    The ids of a conversation, and for each whether the assistant says it: its text and the mark that ends its turn.

    `apply_chat_template` would read `<|end|>` in a message as the end of the turn; here it stays the text that it is.
    Where the template does not mark what the assistant says (by `{% generation %}`), nothing counts as said by it.

    Raises:
        ValueError: if there is no chat template, or it refuses the messages, or one of them is not text.
    """
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template, so it cannot read messages.")
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if len(token) > 1]
    contents = [text_of(message.get("content")) for message in messages]
    used = "".join(contents)
    split = next((character for character in NONCHARACTERS if character not in used), None)
    if split is None:
        raise ValueError("The messages hold every noncharacter of Unicode from U+FDD0 to U+FDEF, which no text does.")
    kept_apart = []
    for message, content in zip(messages, contents, strict=True):
        for token in special:
            content = content.replace(token, token[0] + split + token[1:])
        kept_apart.append({**message, "content": content})
    template = tokenizer.get_chat_template()
    try:
        texts, spans = render_jinja_template(
            [kept_apart],
            chat_template=template,
            return_assistant_tokens_mask=marks_the_assistant(tokenizer),
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program of its own
        raise ValueError(f"The chat template refuses the messages: {error}") from None
    said = spans[0] if spans else []
    ids: list[int] = []
    assistant_mask: list[bool] = []
    start = 0
    for piece in texts[0].split(split):
        encoding = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += encoding["input_ids"]
        assistant_mask += [
            any(first <= start + begin and start + end <= last for first, last in said)
            for begin, end in encoding["offset_mapping"]
        ]
        start += len(piece) + len(split)
    return ids, assistant_mask


def text_of(content: Any) -> str:
    """
    The text of a message: its content, or that of the parts which that has.

    Raises:
        ValueError: if the content is neither text nor parts of the type text alone, or has half of a character.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence):
        raise ValueError(f"A message needs a content: text, or a list of parts of the type text; got {content!r:.80}.")
    for part in parts:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"A message is text, and a part of it that is not cannot be read: {part!r:.80}.")
    text = "".join(part["text"] for part in parts)
    if half := HALF_OF_A_CHARACTER.search(text):  # programs that cut a text leave it in JSON
        where, code = half.start() + 1, ord(half[0])
        raise ValueError(f"A message is not valid UTF-8 at character {where}, where it has half of one: U+{code:04X}.")
    return text


def marks_the_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template says which part the assistant says."""
    return bool(GENERATION_MARK.search(tokenizer.get_chat_template()))
