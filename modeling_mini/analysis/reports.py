"""What the commands of `python -m modeling_mini.analysis` print and draw."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from configuration_mini import MiniConfig
from files_mini import display_name, find_checkpoint
from memory_mini import free_memory
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.measure import Measurement
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..loading.checkpoints import load_model
from .activations import gradient_norms, record_activations
from .arguments import ActivationsArguments, AttentionArguments, CostArguments
from .attention import AttentionSummary, summarize_attention
from .cost import DTYPES, ModelCost
from .inputs import prompt_ids, text_windows, token_labels
from .peak_memory import measure_inference_memory, measure_training_memory

console = Console(highlight=False)


def show_cost(arguments: CostArguments) -> None:
    """Prints parameters, FLOPs and memory."""
    device_memory = None
    if arguments.device_memory is not None:
        device_memory = parse_memory(arguments.device_memory)
    config, name = find_config(arguments)
    cost = ModelCost(config)
    length = length_within(arguments.length, config)

    console.print(f"{name}: {cost.num_parameters:,} parameters", soft_wrap=True, markup=False)
    parameters = Table("part")
    parameters.add_column("parameters", justify="right")
    parameters.add_column("share", justify="right")
    for part, count in cost.parameters.items():
        if part == "head" and not count:
            parameters.add_row("head", "tied", "")
        else:
            parameters.add_row(part, f"{count:,}", f"{count / cost.num_parameters:.1%}")
    console.print(parameters)

    flops = Table("pass", title=f"FLOPs per token at length {length:,}", title_justify="left")
    flops.add_column("FLOPs", justify="right")
    flops.add_column("of which attention", justify="right")
    attention_share = cost.attention_flops_per_token(length) / cost.forward_flops_per_token(length)
    for label, count in (
        ("forward", cost.forward_flops_per_token(length)),
        ("training", cost.training_flops_per_token(length)),
    ):
        flops.add_row(label, format_flops(count), f"{attention_share:.1%}")
    console.print(flops)
    console.print(memory_table(cost, arguments.batch_size, length, device_memory, arguments.measure))


def memory_table(cost: ModelCost, batch_size: int, length: int, device_memory: int | None, measure: bool) -> Table:
    """Memory for inference and training in each of `DTYPES`, a section each."""
    table = Table(title=f"Memory for {batch_size} x {length:,} tokens", title_justify="left")
    table.add_column("")
    for dtype in DTYPES:
        table.add_column(dtype, justify="right")

    def add(label: str, values: list[str], bold: bool = False) -> None:
        table.add_row(label, *values, style="bold" if bold else None)

    sections: list[tuple[str, Any, Any, Any, dict[str, bool]]] = [
        ("inference", cost.inference_memory, measure_inference_memory, cost.largest_inference_batch, {}),
        ("training", cost.training_memory, measure_training_memory, cost.largest_training_batch, {}),
        (
            "training with gradient checkpointing",
            cost.training_memory,
            measure_training_memory,
            cost.largest_training_batch,
            {"gradient_checkpointing": True},
        ),
    ]
    for label, estimate, measured, largest, kwargs in sections:
        estimates = [estimate(batch_size, length, dtype, **kwargs) for dtype in DTYPES]
        add(label, [format_bytes(memory.total) for memory in estimates], bold=True)
        for part in estimates[0].__dataclass_fields__:
            # What checkpointing leaves as it is stands in the section above.
            if not kwargs or part in ("weights", "activations", "working"):
                add(f"  {part.replace('_', ' ')}", [format_bytes(getattr(memory, part)) for memory in estimates])
        if measure:
            peaks = []
            for dtype, memory in zip(DTYPES, estimates, strict=True):
                check_free_memory(memory.total)
                peaks.append(format_bytes(measured(cost.config, batch_size, length, dtype, **kwargs)))
            add("  measured peak", peaks)
        if device_memory is not None:
            batches = [largest(device_memory, length, dtype, **kwargs) for dtype in DTYPES]
            values = [f"{batch:,}" if batch else "none fits" for batch in batches]
            add(f"  largest batch in {format_bytes(device_memory)}", values)
        table.add_section()
    return table


def check_free_memory(needed: int) -> None:
    """Raises ValueError if there is not enough memory for a measurement, so that no process is killed for it."""
    free = free_memory("cuda" if torch.cuda.is_available() else "cpu")
    if needed > free:
        raise ValueError(
            f"Measuring needs {format_bytes(needed)}, and {format_bytes(free)} are free: choose a smaller --batch_size "
            f"or --length, or leave --measure out."
        )


def show_attention(arguments: AttentionArguments) -> None:
    """Prints the entropy of every head and draws its map."""
    from .drawing import draw_attention  # loads matplotlib, which show_cost does not need

    model, tokenizer, name = find_model(arguments.model)
    windows = find_windows(arguments, model.config, tokenizer)
    summary = summarize_attention(model, windows)
    console.print(fitting_table(summary))
    labels = token_labels(tokenizer, windows[0].tolist()) if arguments.prompt is not None else None
    draw_attention(summary, arguments.output, labels, f"Attention of {name} on {describe_text(arguments, windows)}")
    console.print(f"Wrote {arguments.output}", soft_wrap=True, markup=False)


def fitting_table(summary: AttentionSummary) -> Table:
    """The entropy of the heads, with as much as fits the terminal, so that no cell breaks in two."""
    wide = console.options.update(max_width=sys.maxsize)
    for with_nats, padding in ((True, 1), (False, 1), (False, 0)):
        table = table_of_entropy(summary, with_nats, padding)
        if Measurement.get(console, wide, table).maximum <= console.width:
            break
    return table


def table_of_entropy(summary: AttentionSummary, with_nats: bool, padding: int) -> Table:
    """A row for each layer, and a column for each head: the share of uniform attention, with the nats before it."""
    uniform = f"{summary.maximum_entropy:.2f}"
    title = f"Entropy of attention in nats; uniform attention has {uniform}"
    if not with_nats:
        title = f"Entropy of attention by head, as a share of that of uniform attention ({uniform} nats)"
    table = Table("layer", title=title, title_justify="left", padding=(0, padding))
    for name in (*("head " * with_nats + str(head) for head in range(summary.entropy.shape[1])), "mean"):
        table.add_column(name, justify="right")
    for layer, (entropies, shares) in enumerate(zip(summary.entropy, summary.share, strict=True)):
        pairs = [*zip(entropies, shares, strict=True), (entropies.mean(), shares.mean())]
        table.add_row(str(layer), *(f"{nats:.2f} " * with_nats + f"{share:.0%}" for nats, share in pairs))
    return table


def show_activations(arguments: ActivationsArguments) -> None:
    """Prints and draws statistics of activations, and the norms of the gradients of the loss on the text."""
    from .drawing import draw_activations  # loads matplotlib

    model, tokenizer, name = find_model(arguments.model)
    windows = find_windows(arguments, model.config, tokenizer)
    for parameter in model.parameters():  # peft freezes a model that it puts an adapter into, also where it merges it
        parameter.requires_grad_(parameter.is_floating_point())  # not what is quantized
    with record_activations(model) as recorder:
        for window in windows:
            ids = window[None].to(model.device)
            (model(input_ids=ids, labels=ids, use_cache=False).loss / len(windows)).backward()
    statistics, gradients = recorder.statistics(), gradient_norms(model)

    table = Table("site", title=f"Activations of {name} on {describe_text(arguments, windows)}", title_justify="left")
    for column in ("mean", "rms", "kurtosis", "largest", "dead"):
        table.add_column(column, justify="right")
    for site, values in statistics.items():
        table.add_row(
            site,
            f"{values.mean:.3f}",
            f"{values.rms:.3f}",
            f"{values.kurtosis:.1f}",
            f"{values.largest:.2f}",
            f"{values.dead:.1%}",
        )
    console.print(table)
    norms = Table("parameters", title="Gradient of the loss", title_justify="left")
    norms.add_column("norm", justify="right")
    for group, value in gradients.items():
        norms.add_row(group, f"{value:.4f}")
    console.print(norms)
    title = f"{name} on {describe_text(arguments, windows)}"
    draw_activations(statistics, gradients, arguments.output, title)
    console.print(f"Wrote {arguments.output}", soft_wrap=True, markup=False)


def find_config(arguments: CostArguments) -> tuple[PreTrainedConfig, str]:
    """
    The configuration, and a name for it.

    Raises:
        ValueError: if there is none of that name.
    """
    if arguments.names_a_shape:
        preset = arguments.preset or "tiny"
        changes = [f"{name}={value}" for name, value in arguments.shape.items()]
        return MiniConfig.preset(preset, **arguments.shape), " ".join([preset, *changes])
    name = find_checkpoint(arguments.model)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False), name
    except OSError as error:
        raise ValueError(f"No configuration could be loaded from {name!r}: {error}") from None


def find_model(model: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The model, with the adapter in it if it is the folder of one; its tokenizer; and what people call them."""
    return *load_model(model), display_name(find_checkpoint(model))


def find_windows(
    arguments: AttentionArguments | ActivationsArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """
    The token ids to measure on, (windows, length).

    Raises:
        ValueError: if the text is too short, longer than the context, or not UTF-8.
    """
    if arguments.prompt is not None:
        return prompt_ids(tokenizer, config, arguments.prompt)
    length = length_within(arguments.length, config)
    try:
        text = Path(arguments.text_file).read_bytes().decode("utf-8")  # keeps CRLF, as a corpus does
    except UnicodeDecodeError as error:
        raise ValueError(f"{arguments.text_file} is not valid UTF-8 ({error.reason}).") from None
    return text_windows(tokenizer, text, length, arguments.windows)


def length_within(length: int | None, config: PreTrainedConfig) -> int:
    """
    The length asked for, or the context of the model.

    Raises:
        ValueError: if more than the context was asked for.
    """
    context_length = config.max_position_embeddings
    if length is not None and length > context_length:
        raise ValueError(f"length must be at most {context_length}, the context of the model, got {length}.")
    return length or context_length


def describe_text(arguments: AttentionArguments | ActivationsArguments, windows: torch.Tensor) -> str:
    """The text in a few words."""
    if arguments.prompt is not None:
        return f"a prompt of {windows.shape[1]} tokens"
    return f"{len(windows)} x {windows.shape[1]} tokens of {Path(arguments.text_file).name}"


def parse_memory(size: str) -> int:
    """`"24GiB"` or `"24GB"` in bytes; raises ValueError otherwise."""
    try:
        memory = convert_file_size_to_int(size)
    except (ValueError, OverflowError):
        memory = 0
    if not 0 < memory < sys.maxsize:
        raise ValueError(f"device_memory must be a size with its unit, such as 24GiB or 500MB, got {size!r}.")
    return memory


def format_bytes(size: int) -> str:
    unit, suffix = pick_unit_and_suffix(size, ["bytes", "KiB", "MiB", "GiB", "TiB"], 1024)
    return f"{size / unit:,.{1 if unit > 1 else 0}f} {suffix}"


def format_flops(flops: int) -> str:
    unit, suffix = pick_unit_and_suffix(flops, ["FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"], 1000)
    return f"{flops / unit:,.2f} {suffix}"
