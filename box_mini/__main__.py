"""Makes the model that comes with Mini of three runs: `--model`, `--marks` and `--chat`, in the order of `COMMANDS`."""

import importlib.metadata
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cards_mini import CARD, read_card, render, section_of, table
from entry_points_mini import ArgumentParser, Settings, one_sentence_errors, option, quiet_libraries
from files_mini import ADAPTER_CONFIG, BOX, MODEL_CONFIG, find_checkpoint, new_folder, read_json, write_text
from training_mini.data.packages import PACKAGES, licence_of

LARGEST_BOX = 8_000_000  # bytes of weights that people who install Mini download with it
ORIGIN = "Where it comes from"
COMMANDS = """\
python train_accelerate.py --config box_mini/1_packages.yaml
python train_accelerate.py --config box_mini/2_library.yaml --model runs/small-python-packages/final
python -m box_mini --model runs/box
python train_accelerate.py --config box_mini/3_marks.yaml --model box
python -m box_mini --marks runs/marks
python train_accelerate.py --config box_mini/4_chat.yaml --model box
python -m box_mini --chat runs/box-python-questions-lora"""

ABOUT_THE_MODEL = (
    "Files that repeat others were left out, so that no copy of the held-out text was learned from. The figures are "
    "those before `--marks`, which gives the eight special tokens the embedding of an adapter."
)

HOW_TO_ASK = """
Its base is the model that comes with Mini, so it answers where Mini is installed:

```bash
mini-generate --model box --interactive
```
"""


@dataclass
class BoxSettings(Settings):
    """The runs whose best models become the box."""

    model: str | None = option(None, "run of the model that writes Python source")
    marks: str | None = option(None, "run of an adapter on `--model box` that learned the embedding of marks of turns")
    chat: str | None = option(None, "run of a LoRA adapter on `--model box` that answers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and self.marks is None and self.chat is None:
            raise ValueError("Name a run by --model, --marks or --chat.")


def main() -> None:
    with one_sentence_errors():
        (settings,) = ArgumentParser(BoxSettings, description="Make the model that comes with Mini.").parse(
            sys.argv[1:]
        )
        runs = (settings.model, settings.marks, settings.chat)
        model, marks, chat = (None if run is None else Path(find_checkpoint(run)) for run in runs)
        quiet_libraries()
        if model is not None:
            write_model(model)
        if marks is not None:
            write_marks(marks)
        if chat is not None:
            write_adapter(chat)
        size = sum(file.stat().st_size for folder in BOX.values() for file in folder.glob("*.safetensors"))
        print(f"The box holds {size / 1e6:.1f} MB of weights, of {LARGEST_BOX / 1e6:.0f} that it may.")


def write_model(checkpoint: Path) -> None:
    """The model with its tokenizer and card. Its code is that of Mini itself."""
    import modeling_mini  # noqa: F401  (makes the Auto classes know Mini; not above, because it takes seconds)
    import torch
    from modeling_mini.loading.checkpoints import load_checkpoint

    model, tokenizer = load_checkpoint(str(checkpoint), dtype=torch.bfloat16, device="cpu")
    with new_folder(BOX["box"]) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*.py"):
            file.unlink()
        config = read_json(folder / MODEL_CONFIG)
        del config["auto_map"]
        # The file has bfloat16, to be half as large; a CPU computes faster with float32.
        write_text(folder / MODEL_CONFIG, json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
        write_text(folder / CARD, card_with_origin(checkpoint, ABOUT_THE_MODEL))


def write_marks(checkpoint: Path) -> None:
    """
    Gives the model the embedding of special tokens that an adapter has learned. The model never reads those of turns,
    so they are noise in it, and an adapter without an embedding of its own hardly learns to end an answer. With one, it
    would be seven times as large.
    """
    import modeling_mini  # noqa: F401  (as above)
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    learned = load_file(checkpoint / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    ids = AutoTokenizer.from_pretrained(BOX["box"]).all_special_ids
    with new_folder(BOX["box"]) as folder:
        shutil.copytree(BOX["box"], folder, dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        embedding = weights["model.embed_tokens.weight"]
        embedding[ids] = learned[ids].to(embedding.dtype)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_adapter(checkpoint: Path) -> None:
    """The adapter in bfloat16. Its base is the box by its name, wherever Mini is installed."""
    from safetensors.torch import load_file, save_file

    with new_folder(BOX["box-chat"]) as folder:
        # Its tokenizer is that of the model.
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
        weights = folder / "adapter_model.safetensors"
        save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights, {"format": "pt"})
        config = {**read_json(folder / ADAPTER_CONFIG), "base_model_name_or_path": "box"}
        write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        card = read_card(checkpoint / CARD)
        texts = {"How to use": section_of("How to use", HOW_TO_ASK)}  # only Mini finds its base
        write_text(folder / CARD, render(card.facts, card.metadata, {}, card, texts))
        also = "Its questions are about the whole standard library, also about the files that the model has not seen."
        write_text(folder / CARD, card_with_origin(folder, also))


def card_with_origin(checkpoint: Path, about_the_text: str) -> str:
    """The card of a folder, and behind it what was learned from and by which commands."""
    versions = [("Python's standard library", f"{sys.version.split()[0]}, PSF-2.0")]
    for name in PACKAGES:
        package = importlib.metadata.distribution(name)
        versions.append((name, f"{package.version}, {licence_of(package).rpartition(' :: ')[2]}"))
    reason = f"It comes with Mini, and was made by these commands, from the packages below. {about_the_text}"
    card = (checkpoint / CARD).read_text(encoding="utf-8").rstrip()
    return "\n\n".join([card, f"## {ORIGIN}", reason, f"```text\n{COMMANDS}\n```", table(versions)]) + "\n"


if __name__ == "__main__":
    main()
