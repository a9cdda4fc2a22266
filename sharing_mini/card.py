"""What a push knows of a model: the facts of its card, the run beside it, and what the Hub has already."""

import dataclasses
import math
import subprocess
from pathlib import Path
from typing import Any

import yaml
from cards_mini import CARD, OLD_MARK_OF_EXPORTS, Card, Sample, parse_card, public_settings, read_card, render
from files_mini import read_steps, read_text
from modeling_mini.remote_code import ROOT_FILES, remote_code_files

from .staging import CURVES, Source, Staged
from .verification import SEED, Proof

# Metadata that say what is in the repository; all others are the user's to set, also on the Hub.
OF_THE_FILES = ("model-index", "library_name", "pipeline_tag", "base_model")


def gather(source: Source, staged: Staged, on_the_hub: str | None = None) -> Card:
    """
    The card of the folder, with the facts of the run beside it, and with what people wrote on the Hub.

    Args:
        on_the_hub: the card that is there now.

    Raises:
        ValueError: for a card or settings that cannot be read, naming them.
    """
    card = read_card(source.folder / CARD)
    facts = card.facts
    if source.run is not None:
        settings = settings_of(source.run)
        lines = read_steps(source.run / "metrics.jsonl")
        # A card from before cards held facts does not say the step.
        step = facts.step if facts.step is not None else evaluated_step(lines, source.folder.name)
        facts = dataclasses.replace(
            facts, settings=settings, dataset=str(settings.get("dataset") or ""), step=step,
            base=facts.base or str(settings.get("model") or ""), **progress_at(lines, step),
        )  # fmt: skip
    if not facts.is_export:
        context = facts.context if facts.context is not None else staged.config.get("max_position_embeddings")
        is_native = staged.kind == "model" and not staged.has_code and OLD_MARK_OF_EXPORTS in card.text
        kind = "native" if is_native else staged.kind
        facts = dataclasses.replace(facts, kind=kind, context=context)
    card.facts = dataclasses.replace(facts, code=commit_of_code(staged))
    if on_the_hub is not None:
        add_words(card, parse_card(on_the_hub))
    return card


def add_words(card: Card, there: Card) -> None:
    """Adds what people wrote into the card on the Hub, where the card here says nothing of its own."""
    for name, value in there.metadata.items():
        if name not in OF_THE_FILES:
            card.metadata.setdefault(name, value)
    if there.is_own and not card.is_own:
        card.text, card.words, card.sections, card.is_own = there.text, there.words, {}, True
    else:
        card.words = {**there.words, **card.words}


def settings_of(run: Path) -> dict[str, Any]:
    """The settings of a run as anybody may read them."""
    path = run / "config.yaml"
    try:
        settings = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold lines of the form 'name: value'.")
    return public_settings(settings)


def progress_at(lines: list[dict[str, Any]], step: int | None) -> dict[str, Any]:
    """How much the training had read at a step: the last line of training at or before it."""
    if step is None:
        return {}
    found = next((each for each in reversed(lines) if each["step"] <= step and isinstance(each.get("tokens"), int)), {})
    return {name: found[name] for name in ("tokens", "epoch") if isinstance(found.get(name), int | float)}


def evaluated_step(lines: list[dict[str, Any]], checkpoint: str) -> int | None:
    """The step of `best` or `final`, by the evaluations of the run."""
    losses = {line["step"]: line["eval_loss"] for line in lines if isinstance(line.get("eval_loss"), float)}
    losses = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
    return (max(losses) if "final" in checkpoint else min(losses, key=losses.get)) if losses else None


def commit_of_code(staged: Staged) -> str | None:
    """The commit of Mini's repository, if the code that the folder carries is what that commit has."""
    if not staged.has_code:
        return None
    carried = {name: path.read_text(encoding="utf-8") for name, path in staged.files.items() if path.suffix == ".py"}
    if carried != remote_code_files():
        return None
    root = Path(__file__).parent.parent
    paths = [name if name in ROOT_FILES else f"modeling_mini/{name}" for name in carried]
    try:
        changed, head, top = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["status", "--porcelain", "--", *paths],
                ["rev-parse", "HEAD"],
                ["rev-parse", "--show-toplevel"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # there is no git, or Mini is installed and not cloned
    return head if Path(top) == root and not changed else None


def write_card(
    card: Card, staged: Staged, repository: str, license: str | None, proof: Proof | None, revision: str | None
) -> None:  # fmt: skip
    """Writes `README.md` into the staged folder."""
    facts = card.facts
    if proof is not None and facts.kind != "adapter":  # of an adapter, those of its base are counted too
        facts = dataclasses.replace(facts, parameters=proof.parameters)
    text = render(
        facts,
        metadata_of(card, staged, repository, license),
        {} if facts.is_export else staged.config,
        card,
        repository=repository,
        revision=revision,
        trust_remote_code=staged.has_code or staged.kind == "adapter",
        sample=None if proof is None else Sample(proof.prompt, proof.sample, SEED, proof.is_chat),
        has_curves=(staged.folder / CURVES).is_file(),
    )
    (staged.folder / CARD).write_text(text, encoding="utf-8")


def metadata_of(card: Card, staged: Staged, repository: str, license: str | None) -> dict[str, Any]:
    """What the Hub reads: the metadata of the card in the folder, and what the push adds."""
    metadata = dict(card.metadata)
    metadata.setdefault("pipeline_tag", "text-generation")
    if staged.kind in ("model", "adapter"):
        metadata["library_name"] = "peft" if staged.kind == "adapter" else "transformers"
    # peft names the base among the tags too, by the folder on the disk where it lay.
    tags = metadata.pop("tags", None) or []
    tags = [tag for tag in ([tags] if isinstance(tags, str) else tags) if not str(tag).startswith("base_model:")]
    if staged.config.get("model_type") == "mini":
        tags.insert(0, "mini")
    if staged.kind == "adapter":
        metadata["base_model"] = staged.config["base_model_name_or_path"]
    if tags:
        metadata["tags"] = list(dict.fromkeys(tags))
    if license is not None:
        metadata["license"] = license
    for model in metadata.get("model-index", []):
        model["name"] = repository.split("/")[-1]
    return metadata
