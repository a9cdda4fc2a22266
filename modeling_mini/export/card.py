"""The card of an export: how to run it and what equals Mini, with the facts of the model's own card."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cards_mini import CARD, TITLE, Card, Facts, first_prompt, read_card, render, section_of
from files_mini import display_name

if TYPE_CHECKING:
    from configuration_mini import MiniConfig
    from transformers import PreTrainedModel


@dataclass
class ExportCard:
    """
    What a format says of itself.

    Attributes:
        title: what the folder holds, in a few words; "" for what a card is called anyway.
        usage: Markdown that shows how to run it, with commands that work as they stand; "" for those of any Mini.
        exactness: one or two sentences on what equals Mini, and how nearly.
        usage_of_chat: the same for a model that was taught to answer, with `QUESTION` where code asks it something.
        facts: further rows of the table, name to value.
        library_name, tags: metadata of the Hub.
        of_model: whether the folder holds the model, so that what its own card says is true of the folder.
        config: of what was written, where that is a Mini: its card is that of any Mini.
    """

    title: str
    usage: str
    exactness: str
    usage_of_chat: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    library_name: str | None = None
    tags: list[str] = field(default_factory=list)
    of_model: bool = True
    config: "MiniConfig | None" = None


def write_card(
    card: ExportCard, model: "PreTrainedModel", folder: Path, format: str, checkpoint: str, is_merged: bool = True
) -> None:
    """
    Writes `README.md`. What the model's own card says of data, training and evaluation goes along.

    Args:
        checkpoint: whose card that is: of a model with an adapter, the adapter.
        is_merged: whether an adapter is in the weights, and not in a file beside them.
    """
    texts = {"Exactness": section_of("Exactness", card.exactness)}
    if card.usage:
        texts["How to use"] = section_of("How to use", card.usage)
    if not card.of_model:
        texts |= {TITLE: f"# {card.title}", "Limits": ""}  # limits are those of a model
        text = render(Facts(kind=format), {"tags": ["mini", *card.tags]}, {}, texts=texts)
    else:
        source = card_of_weights(checkpoint, model)
        if source.facts.is_chat and card.usage_of_chat:
            question = json.dumps(first_prompt(source.facts), ensure_ascii=False)
            texts["How to use"] = section_of("How to use", card.usage_of_chat.replace("QUESTION", question))
        # The same weights, so licence, data and figures are the same; another library reads them.
        metadata = source.metadata | {"library_name": card.library_name, "pipeline_tag": "text-generation"}
        metadata["tags"] = ["mini", *card.tags]
        context = getattr(model.config, "max_position_embeddings", None)
        facts = dataclasses.replace(
            source.facts, kind=format if card.config is None else "model", title=card.title, context=context,
            parameters=model.num_parameters(), rows=card.facts, is_merged=source.facts.is_merged and is_merged,
        )  # fmt: skip
        config = (card.config or model.config).to_dict()
        text = render(facts, metadata, config, source, texts, trust_remote_code=card.config is not None)
    (folder / CARD).write_text(text, encoding="utf-8")


def card_of_weights(checkpoint: str, model: "PreTrainedModel") -> Card:
    """The card of a model, or of one that an adapter was merged into: its data and figures are those of the adapter."""
    from ..web import path_of_card  # loads torch

    try:
        card = read_card(path_of_card(checkpoint))
    except ValueError:
        if Path(checkpoint).is_dir():
            raise
        card = Card()  # on the Hub, nobody can set it right
    if card.facts.kind == "adapter":
        card.facts = dataclasses.replace(card.facts, kind="model", is_merged=True, parameters=model.num_parameters())
        card.metadata = {name: value for name, value in card.metadata.items() if name != "base_model"}
        card.metadata |= {"library_name": "transformers", "tags": ["mini"]}
    return card


def name_for_files(name_or_path: str) -> str:
    """
    A name for files: that of the run, of the checkpoint or adapter folder, or of the repository, without what a command
    line or the Hub would not take in it.
    """
    name = display_name(name_or_path).split("/")
    return re.sub(r"[^\w.-]+", "-", name[0] if Path(name_or_path).is_dir() else name[-1]).lstrip("-") or "mini"
