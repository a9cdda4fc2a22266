"""`python -m modeling_mini.export.quantized CHECKPOINT OUT --load_in_4bit` writes a folder with quantized weights."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cards_mini import CARD, render
from entry_points_mini import (
    ArgumentParser,
    Settings,
    checkpoint_and_out,
    one_sentence_errors,
    option,
    quantization_of,
    quiet_libraries,
)
from files_mini import destination, find_checkpoint, new_folder, writing

from .card import card_of_weights

PROGRAM = "python -m modeling_mini.export.quantized CHECKPOINT OUT"
WEIGHTS = "model*.safetensors"


@dataclass
class QuantizationArguments(Settings):
    """What to make of the checkpoint."""

    load_in_8bit: bool = option(False, "quantize to INT8")
    load_in_4bit: bool = option(False, "quantize to INT4 (nf4, double quantization)")
    adapter: str | None = option(None, "adapter to merge into the weights before they are quantized")
    merge_quantized: bool = option(
        False,
        "merge the adapter into a checkpoint that is quantized already, which rounds what the adapter has learned",
    )
    overwrite: bool = option(False, "replace OUT if there is something in it")
    device: str | None = option(None, "where to quantize: cpu, cuda (default: a GPU if there is one)")
    trust_remote_code: bool = option(False, "run the Python code that comes with a model of another class")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kind = quantization_of(self)


def quantize(checkpoint: str, out: str | Path, arguments: QuantizationArguments) -> Path:
    """
    Writes a self-contained checkpoint folder with quantized weights, which loads without a flag.

    Args:
        checkpoint: run, checkpoint folder, adapter folder or Hub name.

    Raises:
        ValueError: if it cannot be quantized, or there is something in `out`.
    """
    for read in (checkpoint, arguments.adapter):
        if read is not None:
            target = destination(out, arguments.overwrite, find_checkpoint(read))
    # Not above: these load torch, which takes seconds.
    from transformers import PreTrainedModel

    from ..loading.checkpoints import load_checkpoint, load_model

    loading = {"trust_remote_code": arguments.trust_remote_code, "device": arguments.device}
    model, tokenizer = load_model(checkpoint, arguments.adapter, arguments.merge_quantized, **loading)
    source = model.name_or_path
    destination(out, arguments.overwrite, source)  # the base of an adapter
    if getattr(model, "is_quantized", False):
        if arguments.kind is not None:
            raise ValueError(f"{source!r} is quantized already: give neither load_in_8bit nor load_in_4bit.")
        if not arguments.merge_quantized or arguments.adapter is None:
            raise ValueError(
                f"{source!r} is quantized already. An adapter merged into it is rounded, and the weights a second time "
                "(0.0065 bits per byte in INT4, where merging before quantizing cost 0.0017: docs/LOG.md): merge it "
                "into the model that this one was made of, or give --adapter and --merge_quantized if you want that."
            )
    elif arguments.kind is None:
        raise ValueError("Give load_in_8bit or load_in_4bit.")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"The adapter {arguments.adapter or checkpoint!r} cannot be merged into {source!r}.")
    card = card_of_weights(find_checkpoint(arguments.adapter or checkpoint), model)
    with new_folder(target) as partial:
        if arguments.kind is not None:
            exact = partial / "exact"  # with the adapter in it, which no folder holds yet
            with writing(target):
                model.save_pretrained(exact)
                tokenizer.save_pretrained(exact)
            model, tokenizer = load_checkpoint(str(exact), quantization=arguments.kind, **loading)
            shutil.rmtree(exact)
        with writing(target):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            text = render(card.facts, card.metadata, model.config.to_dict(), card, trust_remote_code=True)
            (partial / CARD).write_text(text, encoding="utf-8")
    return Path(out)


def main() -> None:
    with one_sentence_errors():
        run(sys.argv[1:])


def run(argv: list[str]) -> None:
    """
    Parses and writes one folder.

    Raises:
        ValueError: for wrong input, in one sentence.
    """
    places, flags = checkpoint_and_out(argv, PROGRAM)
    description = "A checkpoint folder with quantized weights."
    (arguments,) = ArgumentParser(QuantizationArguments, prog=PROGRAM, description=description).parse(flags)
    find_checkpoint(places[0])  # what is missing shows before a library is loaded
    quiet_libraries()
    folder = quantize(*places, arguments)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.glob(WEIGHTS)) / 1e6:,.1f} MB of weights")


if __name__ == "__main__":
    main()
