"""
Training speed and memory of Mini beside transformers' Llama of the same shape and, where a checkout of it is given,
nanoGPT: in one run and in turns, eager and compiled.

    python benchmarks/training.py [--size small] [--batch_size 8] [--context 256] [--nanogpt FOLDER]

A step is forward, backward, clipping of the gradient and fused AdamW, on random tokens. On a CPU, Mini computes with
what its trainer would choose there: the faster library for each matrix product, and the fastest attention. Medians over
the rounds; the last line is JSON.
"""

import contextlib
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import option
from rich import box
from rich.console import Console
from rich.table import Table

from measuring import (  # isort: skip
    PlaceSettings,
    in_child,
    in_turns,
    llama_config_of,
    machine,
    peak_resident_memory,
    run_benchmark,
    settings_of,
)

MODES = ("eager", "compiled")
PEERS = ("Mini", "Llama")
# The most that is tried where the batch is to be found: beyond it, nothing of these sizes becomes faster.
MOST_SEQUENCES = 64
STEPS_FOR_MEMORY = 3
# Side of the square matrices whose product stands for the peak of the device: about 20 ms on two cores, 3 ms on a GPU.
SQUARE_SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass
class Settings(PlaceSettings):
    """What is measured, and how often."""

    size: str = option("small", "preset of MiniConfig whose shape all models take")
    layers: int | None = option(None, "layers of all models; default: the preset's", at_least=1)
    batch_size: int = option(
        8, f"sequences in a batch; 0: the largest power of two that fits, up to {MOST_SEQUENCES}", at_least=0
    )
    context: int = option(256, "tokens in a sequence", at_least=1)
    rounds: int = option(7, "how often each contender has its turn; the median counts", at_least=1)
    steps: int = option(5, "training steps in a turn", at_least=1)
    modes: list[str] = option(list(MODES), "eager, compiled or both", choices=MODES)
    models: list[str] = option(list(PEERS), "Mini, Llama or both", choices=PEERS)
    nanogpt: str | None = option(None, "folder of a nanoGPT checkout, whose model.py then takes part")
    nanogpt_width: int | None = option(
        None, "width of nanoGPT; default: the preset's, with twice its parameters", at_least=1
    )
    nanogpt_heads: int | None = option(None, "heads of nanoGPT; default: the preset's", at_least=1)
    bf16: bool = option(False, "autocast to bfloat16, for all models and matrix products")
    attn_implementation: str = option("sdpa", "attention of Mini and Llama, by its name in transformers")

    def __post_init__(self) -> None:
        if self.nanogpt is not None and not (Path(self.nanogpt) / "model.py").is_file():
            raise ValueError(f"There is no model.py in {self.nanogpt!r}; nanogpt is the folder of a nanoGPT checkout.")
        super().__post_init__()
        self.modes = [mode for mode in MODES if mode in self.modes]
        self.models = [name for name in PEERS if name in self.models]

    @property
    def model_names(self) -> list[str]:
        return [*self.models, *(["nanoGPT"] if self.nanogpt is not None else [])]

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @property
    def dtype(self) -> "torch.dtype":
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def mini_config(self) -> "MiniConfig":
        layers = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return MiniConfig.preset(self.size, max_position_embeddings=self.context, **layers)


if __name__ == "__main__":
    SETTINGS = settings_of(Settings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
import torch
from configuration_mini import MiniConfig
from memory_mini import free_memory
from modeling_mini.analysis import ModelCost
from torch import nn
from training_mini.arguments import OptimizationArguments
from training_mini.cpu_attention import BLOCKS, FUSED, NATIVE, attention_by, fastest_attention
from training_mini.cpu_kernels import (
    faster_products,
    linear_product,
    measure_products,
    onednn_is_available,
    use_products,
)
from training_mini.kernels import has_native_attention
from training_mini.optimizers import make_adamw
from transformers import AutoModelForCausalLM, PreTrainedConfig


def import_nanogpt(folder: str) -> ModuleType:
    """
    The module `model.py` of a nanoGPT checkout.

    Raises:
        ValueError: if it does not define GPT and GPTConfig.
    """
    specification = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where a dataclass looks for the names in its annotations
    specification.loader.exec_module(module)
    for name in ("GPT", "GPTConfig"):
        if not hasattr(module, name):
            raise ValueError(f"model.py in {folder!r} defines no {name}; nanogpt is the folder of a nanoGPT checkout.")
    return module


def make_model(name: str, settings: Settings) -> nn.Module:
    """A contender with random weights, on the device and in training mode."""
    if name == "nanoGPT":
        nanogpt, shape = import_nanogpt(settings.nanogpt), settings.mini_config
        config = nanogpt.GPTConfig(
            n_layer=shape.num_hidden_layers,
            n_head=settings.nanogpt_heads or shape.num_attention_heads,
            n_embd=settings.nanogpt_width or shape.hidden_size,
            block_size=settings.context,
            vocab_size=shape.vocab_size,
            dropout=0.0,
            bias=False,
        )
        with contextlib.redirect_stdout(sys.stderr):  # its constructor prints
            model = nanogpt.GPT(config)
    else:
        config = settings.mini_config if name == "Mini" else llama_config_of(settings.mini_config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.attn_implementation)
        if name == "Mini" and settings.device == "cpu" and not settings.bf16:
            use_products(model, measure_products(model, settings.tokens_per_step))  # as Mini's trainer does
    return model.to(settings.device).train()


def training_flops_per_token(name: str, model: nn.Module, settings: Settings) -> int:
    """
    Floating-point operations to train on one token, as `ModelCost` counts them: 6 for each parameter of a matrix, and
    12 L H Q T for attention, which counts in full.
    """
    if name == "nanoGPT":
        matrix_parameters = sum(module.weight.numel() for module in linear_layers(model))
        shape = settings.mini_config
        width = settings.nanogpt_width or shape.hidden_size
        return 6 * matrix_parameters + 12 * shape.num_hidden_layers * width * settings.context
    config: PreTrainedConfig = model.config
    return ModelCost(config).training_flops_per_token(settings.context)


def planned_memory(contender: "Contender") -> int | None:
    """What `ModelCost` expects a step of Mini or Llama to need, in bytes; the compiler may save some of it."""
    settings = contender.settings
    if contender.name == "nanoGPT":
        return None
    dtype = str(settings.dtype).removeprefix("torch.")
    return ModelCost(contender.model.config).training_memory(settings.batch_size, settings.context, dtype).total


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Every matrix that each token is multiplied with; a tied head is among them."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def synchronize(settings: Settings) -> None:
    if settings.device == "cuda":
        torch.cuda.synchronize()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The trainer's AdamW, for models that know nothing of transformers too: matrices decay, vectors do not."""
    settings = OptimizationArguments(optimizer="adamw")
    rate = settings.learning_rate
    groups = {}
    for kind, decay in (("matrices", settings.weight_decay), ("vectors", 0.0)):
        parameters = [p for p in model.parameters() if (p.ndim >= 2) == (kind == "matrices")]
        groups[kind] = {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
    (optimizer,) = make_adamw(groups, settings)
    return optimizer


class Contender:
    """
    A model in training.

    Args:
        name: one of `Settings.model_names`.
        mode: one of `MODES`.
    """

    def __init__(self, name: str, mode: str, settings: Settings) -> None:
        torch.manual_seed(0)
        self.name, self.mode, self.settings = name, mode, settings
        self.model = make_model(name, settings)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.flops_per_token = training_flops_per_token(name, self.model, settings)
        self.products = Counter((layer.in_features, layer.out_features) for layer in linear_layers(self.model))
        self.optimizer = make_optimizer(self.model)
        self.attention = FUSED
        if name == "Mini" and settings.device == "cpu":
            ways = [BLOCKS, *([NATIVE] if has_native_attention() else [])]
            self.attention = fastest_attention(self.model.config, settings.batch_size, settings.dtype, ways)
        if mode == "compiled":
            self.model.compile()
        # The same tokens for all. One more than the context, so that nanoGPT has its targets.
        shape = settings.steps, settings.batch_size, settings.context + 1
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(settings.mini_config.vocab_size, shape, generator=generator)
        self.batches = list(tokens.to(settings.device))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        input_ids = batch[:, :-1].contiguous()
        attention = contextlib.nullcontext() if self.attention == FUSED else attention_by(self.model, self.attention)
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.bf16), attention:
            if self.name == "nanoGPT":
                return self.model(input_ids, batch[:, 1:].contiguous())[1]
            # A cache would be of no use, and is on by default.
            return self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss

    def step(self, batch: torch.Tensor) -> None:
        self.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def steps_for_memory(self) -> None:
        for step in range(STEPS_FOR_MEMORY):
            self.step(self.batches[step % len(self.batches)])

    def bytes_between_steps(self) -> int:
        """What weights, moments and batches hold, after a first step."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.batches, *filter(torch.is_tensor, moments)]
        return sum(tensor.nbytes for tensor in tensors)

    def seconds_of_first_step(self) -> float:
        """When compiled, nearly all of it is the compiler."""
        start = time.perf_counter()
        self.step(self.batches[0])
        synchronize(self.settings)
        return time.perf_counter() - start

    def turn(self) -> float:
        """Seconds for each of the steps of a turn."""
        synchronize(self.settings)
        start = time.perf_counter()
        for batch in self.batches:
            self.step(batch)
        synchronize(self.settings)
        return (time.perf_counter() - start) / len(self.batches)


class MatrixProducts:
    """
    Matrix products alone, by the fastest kernel that any contender has: `torch.mm`, or oneDNN where that is faster.

    Args:
        shapes: rows, inner and columns of each product, and how often it occurs.
    """

    def __init__(self, shapes: dict[tuple[int, int, int], int], settings: Settings) -> None:
        self.settings = settings
        has_onednn = settings.device == "cpu" and not settings.bf16 and onednn_is_available()
        self.flops = sum(2 * rows * inner * columns * count for (rows, inner, columns), count in shapes.items())
        self.operands = []
        for (rows, inner, columns), count in shapes.items():
            left, right = (
                torch.rand(shape, dtype=settings.dtype, device=settings.device)
                for shape in ((rows, inner), (inner, columns))
            )
            # Into memory that is there already: the product alone is measured.
            result = torch.empty(rows, columns, dtype=settings.dtype, device=settings.device)
            by_onednn = has_onednn and "output" in faster_products(columns, inner, rows)
            self.operands.append((left, right, result, count, by_onednn))

    @classmethod
    def square(cls, settings: Settings) -> "MatrixProducts":
        side = SQUARE_SIDE[settings.device]
        return cls({(side, side, side): 1}, settings)

    @classmethod
    def of_model(cls, contender: Contender) -> "MatrixProducts":
        """
        Those of all linear layers in a training step: the outputs, and in the backward pass the gradients of inputs and
        of weights. The two products inside attention are left out, because a fused kernel does not do them as such.
        """
        tokens = contender.settings.tokens_per_step
        shapes: Counter[tuple[int, int, int]] = Counter()
        for (inputs, outputs), count in contender.products.items():
            shapes[tokens, inputs, outputs] += count
            shapes[tokens, outputs, inputs] += count
            shapes[outputs, tokens, inputs] += count
        return cls(shapes, contender.settings)

    def turn(self) -> float:
        """Seconds for all products once."""
        synchronize(self.settings)
        start = time.perf_counter()
        for left, right, result, count, by_onednn in self.operands:
            for _ in range(count):
                if by_onednn:
                    linear_product(left, right.t())
                else:
                    torch.mm(left, right, out=result)
        synchronize(self.settings)
        return time.perf_counter() - start


@contextlib.contextmanager
def empty_compiler_cache() -> Iterator[None]:
    """
    Compiled kernels of earlier runs out of reach, so that compile times are those of a first run, while the child
    processes that measure memory find the kernels of this one.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="mini-benchmark-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def compile_something(settings: Settings) -> None:
    """What the compiler does once in a process and once on a machine: not for the first contender alone to pay."""
    layer = nn.Linear(64, 64, device=settings.device)
    layer.compile()
    layer(torch.ones(64, 64, device=settings.device)).relu().sum().backward()


def memory_of(name: str | None, mode: str, settings: Settings) -> int | None:
    """
    The peak in bytes of this process, on a CPU, while a contender trains, without its first step, where the compiler
    works. Run in a process of its own; without a name, it is what such a process holds when it has imported everything
    (and used the compiler).
    """
    if name is None:
        if mode == "compiled":
            compile_something(settings)
        return peak_resident_memory(reset=True)
    contender = Contender(name, mode, settings)
    contender.seconds_of_first_step()
    peak_resident_memory(reset=True)
    contender.steps_for_memory()
    return peak_resident_memory()


def memory_on_gpu(contender: Contender) -> int:
    """The peak in bytes of what a contender's tensors hold while it trains, beside those of the others."""
    others = torch.cuda.memory_allocated() - contender.bytes_between_steps()
    torch.cuda.reset_peak_memory_stats()
    contender.steps_for_memory()
    return torch.cuda.max_memory_allocated() - others


def measure_memory(
    contenders: dict[tuple[str, str], Contender], settings: Settings
) -> dict[tuple[str, str], int | None]:
    """Peak memory in bytes of each model and mode."""
    if settings.device == "cuda":
        return {key: memory_on_gpu(contender) for key, contender in contenders.items()}
    peaks = {}
    for mode in settings.modes:
        baseline = in_child(memory_of, None, mode, settings)
        for name in settings.model_names:
            peak = in_child(memory_of, name, mode, settings) if baseline is not None else None
            peaks[name, mode] = peak - baseline if peak is not None else None
    return peaks


def batch_that_should_fit(settings: Settings) -> int:
    """The largest power of two that fits by the estimate of `ModelCost` for Mini; 1 where not even that does."""
    free = free_memory(settings.device)
    dtype = str(settings.dtype).removeprefix("torch.")
    fits = ModelCost(settings.mini_config).largest_training_batch(free, settings.context, dtype)
    return 1 << (max(1, min(fits, MOST_SEQUENCES)).bit_length() - 1)


def make_contenders(settings: Settings) -> tuple[dict[tuple[str, str], Contender], dict[tuple[str, str], float]]:
    """
    The contenders, and the seconds of the first step of each; with a batch that is to be found, of the largest size
    with which all of them fit.

    Raises:
        ValueError: if they do not fit.
    """
    is_given = settings.batch_size > 0
    settings = settings if is_given else replace(settings, batch_size=batch_that_should_fit(settings))
    while True:
        contenders = {}
        try:
            for mode in settings.modes:
                for name in settings.model_names:
                    contenders[name, mode] = Contender(name, mode, settings)
            if "compiled" in settings.modes:
                compile_something(settings)
            return contenders, {key: contender.seconds_of_first_step() for key, contender in contenders.items()}
        except torch.OutOfMemoryError:
            if is_given or settings.batch_size == 1:
                raise ValueError(f"Batches of {settings.batch_size} x {settings.context} do not fit.") from None
        # Not in the handler above: the traceback of the error holds tensors.
        del contenders
        torch.compiler.reset()  # or another batch would be compiled for any size of batch
        gc.collect()
        torch.cuda.empty_cache()
        settings = replace(settings, batch_size=settings.batch_size // 2)


@dataclass
class Figures:
    """What was measured of one model in one mode."""

    model: str
    mode: str
    parameters: int
    training_flops_per_token: int
    tokens_per_second: float
    model_flops_per_second: float
    mfu_of_square_product: float
    mfu_of_model_products: float
    seconds_to_first_step: float
    peak_memory_bytes: int | None
    planned_memory_bytes: int | None
    seconds_per_step: list[float] = field(repr=False)  # of each round


@empty_compiler_cache()
def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    contenders, first_steps = make_contenders(settings)
    settings = next(iter(contenders.values())).settings
    products = {"square": MatrixProducts.square(settings)}
    products |= {name: MatrixProducts.of_model(contenders[name, settings.modes[0]]) for name in settings.model_names}
    turns = {key: part.turn for key, part in (contenders | products).items()}
    seconds = in_turns(turns, settings.rounds)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    flops_per_second = {name: product.flops / medians[name] for name, product in products.items()}
    peaks = measure_memory(contenders, settings)
    figures = []
    for key, contender in contenders.items():
        tokens_per_second = settings.tokens_per_step / medians[key]
        model_flops_per_second = contender.flops_per_token * tokens_per_second
        figures.append(
            Figures(
                model=contender.name,
                mode=contender.mode,
                parameters=contender.parameters,
                training_flops_per_token=contender.flops_per_token,
                tokens_per_second=tokens_per_second,
                model_flops_per_second=model_flops_per_second,
                mfu_of_square_product=model_flops_per_second / flops_per_second["square"],
                mfu_of_model_products=model_flops_per_second / flops_per_second[contender.name],
                seconds_to_first_step=first_steps[key],
                peak_memory_bytes=peaks[key],
                planned_memory_bytes=planned_memory(contender),
                seconds_per_step=seconds[key],
            )
        )
    speeds = {(each.model, each.mode): each.tokens_per_second for each in figures}
    return {
        "benchmark": "training",
        "machine": machine(settings.device),
        "settings": asdict(settings),
        "product_flops_per_second": flops_per_second,
        "contenders": [asdict(each) for each in figures],
        "mini_tokens_per_second_ratio": {
            mode: {name: speeds["Mini", mode] / speeds[name, mode] for name in settings.model_names if name != "Mini"}
            for mode in (settings.modes if "Mini" in settings.models else [])
        },
    }


def show(results: dict[str, Any], settings: Settings) -> None:
    console = Console()
    place = f"{results['machine']['device']}, {results['machine']['threads']} threads"
    dtype = str(settings.dtype).removeprefix("torch.")
    batch_size = results["settings"]["batch_size"]
    title = f"Training {settings.size}, batch {batch_size} x {settings.context}: {place}, {dtype}"
    # Narrow enough for 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    headings = (
        "para-\nmeters",
        "tokens/s",
        "Mini\nis",
        "GFLOP/s",
        "MFU\nsquare",
        "MFU\nshapes",
        "peak\nMB",
        "first\nstep s",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in results["contenders"]:
        ratio = results["mini_tokens_per_second_ratio"].get(row["mode"], {}).get(row["model"])
        peak = row["peak_memory_bytes"]
        table.add_row(
            f"{row['model']}, {row['mode']}",
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['tokens_per_second']:,.0f}",
            "" if ratio is None else f"{ratio:.2f}x",
            f"{row['model_flops_per_second'] / 1e9:,.1f}",
            f"{row['mfu_of_square_product']:.1%}",
            f"{row['mfu_of_model_products']:.1%}",
            "" if peak is None else f"{peak / 1e6:,.0f}",
            f"{row['seconds_to_first_step']:.1f}",
        )
    console.print(table)
    square, *of_models = (f"{speed / 1e9:,.1f} ({name})" for name, speed in results["product_flops_per_second"].items())
    console.print(
        f"Matrix products, GFLOP/s: {square.replace('square', f'square, side {SQUARE_SIDE[settings.device]}')}; "
        f"in the shapes of the linear layers, forward and backward: {', '.join(of_models)}. "
        "MFU is model FLOPs over each of the two.",
        highlight=False,
    )
    if settings.nanogpt is not None:
        console.print(
            "nanoGPT has the same depth (and width, unless told another), but an MLP of 4 times the width, as many "
            "key/value heads as heads, and learned positions: compare GFLOP/s beside tokens/s.",
            highlight=False,
        )


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
