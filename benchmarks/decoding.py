"""
Decoding speed and memory of Mini beside transformers' Llama of the same shape, in one run and in turns: batches, short
and long prompts, greedy and sampling, with and without a cache.

    python benchmarks/decoding.py [--size small] [--batch_sizes 1 8 64] [--prompts 16 1000] [--tokens 200]

"Mini" is `generate` as it comes, on its fast path; "Mini, loop" the same model on transformers' loop; "Mini, compiled"
after `compile_decoding()`: on a CPU a native function, on a GPU a CUDA graph. "Llama, static" has
transformers' static cache, for which `generate` compiles the model on a GPU. llama.cpp and onnxruntime take part with
one sequence, greedy, where they are installed. Medians over the rounds; the last line is JSON. On two quiet cores all
of it should take about five minutes, and a minute more the first time, for compiling.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

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
from runtimes import RUNTIMES, installed_runtimes, make_runtime  # isort: skip

COMPILED, FAST, LOOP, LLAMA, STATIC = "Mini, compiled", "Mini", "Mini, loop", "Llama", "Llama, static"
CONTENDERS = (FAST, LOOP, LLAMA)
MANNERS = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "top_k": 50, "top_p": 0.9}}
# Without a cache each token costs a whole forward: a few tell enough, and are compared with as many with a cache.
TOKENS_WITHOUT_CACHE = 24


@dataclass
class Settings(PlaceSettings):
    """What is measured, and how often."""

    size: str = option("small", "preset of MiniConfig whose shape both models take")
    layers: int | None = option(None, "layers of all models; default: the preset's", at_least=1)
    batch_sizes: list[int] = option([1, 8, 64], "sequences at a time")
    prompts: list[int] = option([16, 1000], "tokens in a prompt")
    tokens: int = option(200, "tokens to write after the prompt", at_least=2)
    most_prompt_tokens: int = option(
        4096, "cases whose prompts have more tokens in all are left out: they would take minutes", at_least=1
    )
    rounds: int = option(3, "how often each contender has its turn; the median counts", at_least=1)
    bf16: bool = option(False, "weights in bfloat16")
    manners: list[str] = option(list(MANNERS), "greedy, sampling or both", choices=MANNERS)
    compile: bool = option(True, "also measure compiled decoding (about a minute of compiling the first time)")
    static_cache: bool | None = option(None, "also measure Llama with a static cache (default: on a GPU)")
    runtimes: list[str] = option(list(RUNTIMES), "others that take part where they are installed")

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "prompts"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name} must be at least 1 each, got {getattr(self, name)}.")
        if unknown := set(self.runtimes) - set(RUNTIMES):
            raise ValueError(f"runtimes are {', '.join(RUNTIMES)}, not {', '.join(sorted(unknown))}.")
        super().__post_init__()
        on_cpu_in_float32 = self.device == "cpu" and not self.bf16
        self.compile = self.compile and (on_cpu_in_float32 or self.device == "cuda")
        if not on_cpu_in_float32:  # the same weights, on the same processor
            self.runtimes = []
        if self.static_cache is None:
            self.static_cache = self.device == "cuda"
        self.manners = [manner for manner in MANNERS if manner in self.manners]
        self.runtimes = [name for name in self.runtimes if name in installed_runtimes()]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The numbers of sequences, each with the lengths of prompt that are measured with it."""
        pairs = [(batch_size, prompt) for batch_size in self.batch_sizes for prompt in self.prompts]
        return [pair for pair in pairs if pair[0] * pair[1] <= self.most_prompt_tokens] or pairs[:1]

    def contenders(self, batch_size: int, manner: str) -> list[str]:
        """Who takes part in a case."""
        compiled = [COMPILED] if self.compile else []
        static = [STATIC] if self.static_cache else []
        runtimes = self.runtimes if batch_size == 1 and manner == "greedy" else []
        return [*compiled, *CONTENDERS, *static, *runtimes]

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bf16 else "float32"

    @property
    def model_names(self) -> list[str]:
        """Those that are models of transformers."""
        compiled, static = [COMPILED] if self.compile else [], [STATIC] if self.static_cache else []
        return [*compiled, *CONTENDERS, *static]

    @property
    def mini_config(self) -> "MiniConfig":
        layers = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return MiniConfig.preset(self.size, max_position_embeddings=max(self.prompts) + self.tokens, **layers)


if __name__ == "__main__":
    SETTINGS = settings_of(Settings, __doc__)  # help and mistakes come before torch, which takes seconds to load

import torch
from configuration_mini import MiniConfig
from modeling_mini import fast_generation
from modeling_mini.analysis import ModelCost
from transformers import AutoModelForCausalLM, PreTrainedModel


class Case(NamedTuple):
    """One call of `generate`."""

    contender: str
    batch_size: int
    prompt: int
    manner: str
    use_cache: bool
    tokens: int


def make_model(contender: str, settings: Settings) -> PreTrainedModel:
    config = llama_config_of(settings.mini_config) if contender in (LLAMA, STATIC) else settings.mini_config
    model = AutoModelForCausalLM.from_config(config).eval().to(settings.device)
    if settings.bf16:
        model = model.to(torch.bfloat16)
    # All write the same number of tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if contender == COMPILED:
        model.compile_decoding()
        assert model.compiled_step is not None
    with mock.patch.object(fast_generation, "decode", wraps=fast_generation.decode) as fast_path:
        run_model(model, Case(contender, 1, 4, "greedy", True, 2), settings)
    assert fast_path.called == (contender in (FAST, COMPILED))
    return model


def prompt_of(case: "Case") -> torch.Tensor:
    return torch.randint(8, 264, (case.batch_size, case.prompt))


def run_model(model: PreTrainedModel, case: Case, settings: Settings) -> float:
    """The seconds of one call of `generate`."""
    ids = prompt_of(case).to(settings.device)
    switch = {LOOP: {"fast_decoding": False}, STATIC: {"cache_implementation": "static"}}.get(case.contender, {})
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=case.tokens,
        use_cache=case.use_cache,
        **MANNERS[case.manner],
        **switch,
    )
    if settings.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert output.shape[1] == case.prompt + case.tokens
    return seconds


def cases_of(settings: Settings) -> list[Case]:
    """Whole texts; first tokens; and, at one sequence, what a cache is worth."""
    cases = [
        Case(contender, batch_size, prompt, manner, True, tokens)
        for batch_size, prompt in settings.sizes
        for manner in settings.manners
        for contender in settings.contenders(batch_size, manner)
        for tokens in (settings.tokens, 1)
        if tokens > 1 or manner == settings.manners[0]
    ]
    few = min(settings.tokens, TOKENS_WITHOUT_CACHE)
    cases += [
        Case(FAST, min(settings.batch_sizes), prompt, "greedy", use_cache, few)
        for prompt in settings.prompts
        for use_cache in (True, False)
    ]
    return list(dict.fromkeys(cases))


def peak_memory(contender: str, settings: Settings) -> int | None:
    """
    The bytes that the largest case needs, weights included: on a GPU what tensors hold, on a CPU what a process of its
    own takes beyond what it holds after its imports.
    """
    on_gpu = settings.device == "cuda"
    before = 0 if on_gpu else peak_resident_memory(reset=True)
    model = make_model(contender, settings)
    batch_size, prompt = max(settings.sizes, key=lambda size: size[0] * (size[1] + settings.tokens))
    case = Case(contender, batch_size, prompt, "greedy", True, settings.tokens)
    run_model(model, case, settings)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_memory()
    return peak - before if peak is not None and before is not None else None


def measure(settings: Settings) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    models = {name: make_model(name, settings) for name in settings.model_names}
    cost = ModelCost(settings.mini_config)
    cases = cases_of(settings)
    context = max(settings.prompts) + settings.tokens
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {
            name: make_runtime(name, models[FAST], Path(folder), context, torch.get_num_threads())
            for name in settings.runtimes
        }

        def seconds_of(case: Case) -> float:
            if case.contender in runtimes:
                return runtimes[case.contender].seconds(prompt_of(case)[0].tolist(), case.tokens)
            return run_model(models[case.contender], case, settings)

        seconds = in_turns({case: lambda case=case: seconds_of(case) for case in cases}, settings.rounds)
    median = {case: statistics.median(values) for case, values in seconds.items()}
    rows = []
    for case in cases:
        if case.tokens != settings.tokens or not case.use_cache:
            continue
        of_llama = median[case._replace(contender=LLAMA)]
        first = median[case._replace(manner=settings.manners[0], tokens=1)]
        per_token = (median[case] - first) / (case.tokens - 1)
        # A step reads each weight, and the cache, which is half written on average.
        read = cost.inference_memory(case.batch_size, case.prompt + case.tokens // 2, settings.dtype)
        rows.append(
            {
                **case._asdict(),
                "tokens_per_second": case.batch_size * case.tokens / median[case],
                "times_llama": of_llama / median[case],
                "seconds_to_first_token": first,
                "seconds_per_further_token": per_token,
                "bytes_read_per_second": (read.weights + read.kv_cache) / per_token,
                "seconds": seconds[case],
            }
        )
    few, batch_size = min(settings.tokens, TOKENS_WITHOUT_CACHE), min(settings.batch_sizes)
    gains = {
        prompt: median[Case(FAST, batch_size, prompt, "greedy", False, few)]
        / median[Case(FAST, batch_size, prompt, "greedy", True, few)]
        for prompt in settings.prompts
    }
    return {
        "benchmark": "decoding",
        "machine": machine(settings.device),
        "settings": asdict(settings),
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "rows": rows,
        "cache_gain": {"tokens": few, "batch_size": batch_size, "by_prompt": gains},
        "peak_memory_bytes": {name: in_child(peak_memory, name, settings) for name in CONTENDERS},
    }


def show(results: dict[str, Any], settings: Settings) -> None:
    console = Console()
    place = f"{results['machine']['device']}, {results['machine']['threads']} threads"
    title = f"Decoding {settings.size}, {settings.tokens} tokens: {place}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for heading in ("batch", "prompt", "", ""):
        table.add_column(heading)
    for heading in ("tokens/s", "times\nLlama", "first\ntoken ms", "each\nfurther ms"):
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        table.add_row(
            f"{row['batch_size']}",
            f"{row['prompt']:,}",
            row["manner"],
            row["contender"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['times_llama']:.2f}x",
            f"{1000 * row['seconds_to_first_token']:,.1f}",
            f"{1000 * row['seconds_per_further_token']:,.2f}",
        )
    console.print(table)
    gain = results["cache_gain"]
    for prompt, factor in gain["by_prompt"].items():
        console.print(f"With a cache, {gain['tokens']} tokens after {prompt:,} come {factor:.1f} times sooner.")
    peaks = {name: peak for name, peak in results["peak_memory_bytes"].items() if peak is not None}
    console.print("Peak memory of the largest case: " + ", ".join(f"{n} {p / 1e6:,.0f} MB" for n, p in peaks.items()))
    for name in RUNTIMES:
        if name not in settings.runtimes:
            console.print(f"{name} does not take part: it is not installed, or not asked for.")


if __name__ == "__main__":
    run_benchmark(SETTINGS, measure, show)
