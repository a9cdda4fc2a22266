"""
What INT8 and INT4 are worth: memory, decoding speed, and bits per byte on held-out text, beside float32 and bfloat16.

    python benchmarks/quantization.py [--models box small runs/NAME] [--dataset python-stdlib] [--compiled small]

A model is a trained run or checkpoint folder, `box` (the trained model that comes with Mini), or the name of a preset,
whose weights are random and predict nothing: that shows memory and speed. Of the models named by --compiled, float32,
INT8 and INT4 also write after `compile_decoding()`. Medians over the rounds, in turns; the last line is JSON.
"""

import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option, quiet_libraries
from files_mini import find_checkpoint
from rich import box
from rich.console import Console
from rich.table import Table
from shape_mini import PRESETS

from measuring import PlaceSettings, in_turns, machine, run_benchmark, settings_of  # isort: skip

COMPILED_KINDS = ("float32", "int8", "nf4")
PROMPT, WINDOWS_AT_ONCE = 16, 16


@dataclass
class Settings(PlaceSettings):
    """What is measured, and how often."""

    models: list[str] = option(
        ["box", *PRESETS], "trained runs or checkpoint folders, the box, and presets with random weights"
    )
    compiled: list[str] = option(["small", "medium"], "those of them that also write compiled, on a CPU")
    dataset: str = option("python-stdlib", "what was trained on; its held-out part is predicted")
    eval_tokens: int = option(65536, "held-out tokens to predict", at_least=1)
    tokens: int = option(64, "tokens to write, one sequence, after a prompt of 16", at_least=2)
    rounds: int = option(3, "how often each has its turn at writing; the median counts", at_least=1)

    def __post_init__(self) -> None:
        for name in self.models:
            if name not in PRESETS:
                find_checkpoint(name)
        super().__post_init__()


if __name__ == "__main__":
    SETTINGS = settings_of(Settings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import torch
from configuration_mini import MiniConfig
from memory_mini import free_memory
from modeling_mini import fast_generation
from modeling_mini.loading.checkpoints import load_checkpoint
from tokenization import ByteTokenizer
from torch.nn import functional as F
from training_mini.arguments import DataArguments
from training_mini.data.corpus import Corpus, load_corpus
from transformers import AutoModelForCausalLM, PreTrainedModel

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.float32, "quantization": "8bit"},
    "nf4": {"dtype": torch.float32, "quantization": "4bit"},
}


def bytes_of_weights(model: PreTrainedModel) -> int:
    """All that a checkpoint of the model holds: weights, each once, and what is needed to read quantized ones."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return sum(tensor.nbytes for tensor in tensors.values())


def bits_per_byte(model: PreTrainedModel, corpus: Corpus, settings: Settings) -> float:
    """The bits that the model needs for the held-out text, in windows of one context that begin with bos."""
    length = model.config.max_position_embeddings
    ids = torch.from_numpy(corpus.validation[: settings.eval_tokens].astype("int64"))
    nats = 0.0
    for windows in ids.split(WINDOWS_AT_ONCE * length):
        whole = len(windows) // length * length
        for targets in (windows[:whole].view(-1, length), windows[whole:].view(1, -1)):
            if targets.numel():
                targets = targets.to(model.device)
                inputs = F.pad(targets[:, :-1], (1, 0), value=model.config.bos_token_id)
                with torch.no_grad():
                    logits = model(inputs, use_cache=False).logits
                nats += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
    return nats / math.log(2) / corpus.bytes_per_token[ids.numpy()].sum().item()


def seconds_to_write(model: PreTrainedModel, settings: Settings) -> float:
    """The time of one greedy call of `generate`."""
    ids = torch.arange(8, 8 + PROMPT, device=model.device)[None]
    start = time.perf_counter()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.tokens, do_sample=False)
    if settings.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert output.shape[1] == PROMPT + settings.tokens
    return seconds


def measure_model(name: str, folder: str, settings: Settings) -> list[dict[str, Any]]:
    """The rows of one model."""
    models = {kind: load_checkpoint(folder, device=settings.device, **how)[0] for kind, how in KINDS.items()}
    if name in settings.compiled and settings.device == "cpu":
        for kind in COMPILED_KINDS:
            model, _ = load_checkpoint(folder, device=settings.device, **KINDS[kind])
            model.compile_decoding()
            if model.compiled_step is not None:  # else a warning has said why
                models[f"{kind}, compiled"] = model
    corpus = None
    if name not in PRESETS:
        corpus = load_corpus(DataArguments(dataset=settings.dataset, tokenizer=folder), show_progress=False)
    rows = {}
    for kind, model in models.items():
        rows[kind] = {
            "model": name,
            "kind": kind,
            "parameters": models["float32"].num_parameters(),
            "bytes": bytes_of_weights(model),
            "bits_per_byte": None if corpus is None else bits_per_byte(model, corpus, settings),
        }
        # All write the same number of tokens.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        with mock.patch.object(fast_generation, "decode", wraps=fast_generation.decode) as fast_path:
            seconds_to_write(model, settings)
        rows[kind]["fast_path"] = fast_path.called
    turns = {kind: lambda model=model: seconds_to_write(model, settings) for kind, model in models.items()}
    for kind, seconds in in_turns(turns, settings.rounds).items():
        rows[kind]["tokens_per_second"] = settings.tokens / statistics.median(seconds)
    return list(rows.values())


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    quiet_libraries()
    rows, left_out = [], []
    for name in settings.models:
        with tempfile.TemporaryDirectory() as folder:
            if name not in PRESETS:
                rows += measure_model(name, find_checkpoint(name), settings)
                continue
            model = AutoModelForCausalLM.from_config(MiniConfig.preset(name))
            free = free_memory(settings.device)
            if 4 * bytes_of_weights(model) > free:  # four models, of which two are smaller, and what loading needs
                left_out.append(name)
                continue
            model.save_pretrained(folder)
            ByteTokenizer().save_pretrained(folder)
            del model
            rows += measure_model(name, folder, settings)
    return {
        "benchmark": "quantization",
        "machine": machine(settings.device),
        "settings": asdict(settings),
        "rows": rows,
        "left_out": left_out,
    }


def show(results: dict[str, Any], settings: Settings) -> None:
    console = Console()
    place = f"{results['machine']['device']}, {results['machine']['threads']} threads"
    table = Table(title=f"Quantization, held-out {settings.dataset}: {place}", box=box.SIMPLE_HEAD, padding=(0, 1))
    for heading in ("model", "weights"):
        table.add_column(heading)
    for heading in ("MB", "tokens/s", "bits/byte", "more than\nfloat32"):
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        bits = row["bits_per_byte"]
        reference = next(r["bits_per_byte"] for r in results["rows"] if r["model"] == row["model"])
        table.add_row(
            Path(row["model"]).name if row["kind"] == "float32" else "",
            row["kind"] + ("" if row["fast_path"] else " (loop)"),
            f"{row['bytes'] / 1e6:,.2f}",
            f"{row['tokens_per_second']:,.0f}",
            "random" if bits is None else f"{bits:.4f}",
            "" if bits is None else f"{bits - reference:+.4f}",
        )
    console.print(table)
    console.print(
        "Compiled: after compile_decoding(). Loop: decoded by transformers' loop, which a GPU needs for quantized "
        "layers; the others by Mini's own."
    )
    for name in results["left_out"]:
        console.print(f"{name} does not fit into the memory that is free.")


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
