"""The card that each format writes: how to run it, what equals Mini, and the facts of the model's own card."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from files_mini import read_text
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

MARK = "<!-- Written by modeling_mini.export. -->"


@dataclass
class Card:
    """
    What a format says of itself.

    Attributes:
        title: what the folder holds, in a few words.
        usage: Markdown that shows how to run it, with commands that work as they stand.
        exactness: one or two sentences on what equals Mini, and how nearly.
        facts: further rows of the table, name to value.
        library_name, tags: metadata of the Hub.
        of_model: whether the folder holds the model, so that what its own card says is true of the folder.
    """

    title: str
    usage: str
    exactness: str
    facts: dict[str, str] = field(default_factory=dict)
    library_name: str | None = None
    tags: list[str] = field(default_factory=list)
    of_model: bool = True


def write_card(card: Card, model: PreTrainedModel, folder: Path) -> None:
    """Writes `README.md`. What the model's own card says of data, training and evaluation goes along."""
    metadata, facts = {}, {}
    if card.of_model:
        metadata, facts = facts_of_source(Path(model.name_or_path) / "README.md")
        # The same weights, so licence, data and figures are the same; another library reads them.
        metadata.update(library_name=card.library_name, pipeline_tag="text-generation")
        facts.setdefault("parameters", f"{model.num_parameters():,}")
    metadata["tags"] = ["mini", *card.tags]
    data = ModelCardData(**{name: value for name, value in metadata.items() if value is not None})
    sections = [f"---\n{data.to_yaml()}\n---", f"# {card.title}", card.usage.strip(), card.exactness.strip()]
    if rows := {**facts, **card.facts}:
        sections.append("\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]))
    sections.append(MARK)
    (folder / "README.md").write_text(str(ModelCard("\n\n".join(sections) + "\n")), encoding="utf-8")


def facts_of_source(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata of a card, and the rows of its tables of two columns; nothing where there is no card."""
    if not path.is_file():
        return {}, {}
    source = read_card(path)
    return source.data.to_dict(), rows_of(source.text)


def rows_of(text: str) -> dict[str, str]:
    """The rows of tables of two columns."""
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 2 and cells[0] and set(cells[0]) - set("-: "):
            rows[cells[0]] = cells[1]
    return rows


def read_card(path: Path) -> ModelCard:
    """A card from a file; raises ValueError, naming it, where it or its metadata cannot be read."""
    logger = logging.getLogger("huggingface_hub.repocard")
    was_disabled, logger.disabled = logger.disabled, True  # it says where there are no metadata, which is no fault
    text = read_text(path)
    try:
        return ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).split(". Pass `")[0]  # advice to a caller of the library
        raise ValueError(f"The metadata of {path} cannot be read: {reason}.") from None
    finally:
        logger.disabled = was_disabled


def name_of(model: PreTrainedModel) -> str:
    """A name for files: that of the run, of the checkpoint folder, or of the repository."""
    folder = Path(model.name_or_path)
    if folder.name in ("best", "final") and folder.parent.name:
        folder = folder.parent
    return folder.name or "mini"
