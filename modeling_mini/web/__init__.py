"""
The page on which a model writes. It runs at two places: generation_mini/demo has a server behind it, and an ONNX export
computes in the browser. Each brings a `writer.js`, which is all that the page knows of where the model is.
"""

import contextlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

from cards_mini import CARD, PROMPT, Card, parse_card
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..loading.checkpoints import WITHOUT_ERRORS, is_chat_model

FOLDER = Path(__file__).parent
TEMPLATE = FOLDER / "index.html"
PAGE_FILES = (FOLDER / "page.css", FOLDER / "page.js", FOLDER / "details.js")


def path_of_card(name_or_path: str) -> Path:
    """Where the card of a folder or of a model on the Hub lies on this machine, if there is one."""
    path = Path(name_or_path, CARD)
    if not Path(name_or_path).is_dir():
        found = cached_file(name_or_path, CARD, **WITHOUT_ERRORS)
        path = Path(found) if found is not None else path
    return path


def card_of(name_or_path: str) -> Card:
    """The card of a folder or of a model on the Hub; an empty one where there is none, or it cannot be read."""
    path = path_of_card(name_or_path)
    return parse_card(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else Card()


def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    checkpoint: str | None = None,
    most_tokens: int | None = None,
) -> dict[str, Any]:
    """
    What the page knows of its model, ready for JSON.

    Args:
        name: what people call the model.
        checkpoint: the folder or Hub name whose card says what it was trained on (default: that of the model).
        most_tokens: how many tokens a text may have at most.
    """
    card = card_of(checkpoint or model.name_or_path)
    is_chat = is_chat_model(model, tokenizer)
    settings = model.generation_config
    temperature = 0.0 if settings.do_sample is False else settings.temperature
    return {
        "name": name,
        "sentences": sentences(card, model, is_chat),
        "prompts": card.facts.prompts or [PROMPT.strip()],
        "is_chat": is_chat,
        "temperature": 1.0 if temperature is None else temperature,
        "top_k": settings.top_k or 0,
        "top_p": 1.0 if settings.top_p is None else settings.top_p,
        "most_tokens": most_tokens,
    }


def sentences(card: Card, model: PreTrainedModel, is_chat: bool) -> list[str]:
    """What the model is, what it was trained on, and how well it learned that."""
    facts = card.facts
    on = f", trained on {facts.dataset}" if facts.dataset else ""
    if facts.base:
        on = f", fine-tuned from {facts.base}" + (f" on {facts.dataset}" if facts.dataset else "")
    manner = "It answers in turns" if is_chat else "It continues what you write"
    context = getattr(model.config, "max_position_embeddings", None)
    lines = [
        f"A language model of {model.num_parameters():,} parameters{on}.",
        f"{manner}, and sees at most {context:,} tokens at once." if context else f"{manner}.",
    ]
    figures = {}
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # people may have written anything there
        figures = {
            metric["type"]: metric["value"]
            for index in card.metadata.get("model-index", [])
            for result in index["results"]
            for metric in result["metrics"]
        }
    if isinstance(bits := figures.get("bits_per_byte"), int | float):
        compressor = next(iter(reversed(facts.compressors.items())), None)
        than = f"; {compressor[0]} -9 needs {compressor[1]:.2f}" if compressor else ""
        lines.append(f"It needs {bits:.2f} bits for each byte of text that it had not read before{than}.")
    return lines


def render_page(description: dict[str, Any]) -> str:
    """The page as HTML, with the description of its model in it."""
    # In a script, "</script>" or "<!--" within a text would end it or change how it is read.
    as_json = json.dumps(description, ensure_ascii=False).replace("<", "\\u003c")
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=html.escape(description["name"]),
        sentences=html.escape(" ".join(description["sentences"])),
        model=as_json,
    )
