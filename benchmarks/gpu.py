"""
All that only a GPU can show, in the minutes that there are: facts, correctness, training, decoding, learning,
quantization.

    python benchmarks/gpu.py --minutes 8 --output FOLDER [--shakespeare FILE] [--nanogpt FOLDER]

Each part is a program of its own with its share of the time, the most important first. What a part measures is written
when it ends; a crash or a time-out costs the other parts nothing. The same command again runs what is not finished.
FOLDER/gpu.json holds all results, FOLDER/PART.log what a part printed. `--device cpu` runs the parts at a size that
shows only that they work. docs/GPU.md says more.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from entry_points_mini import EXIT_STOPPED, ArgumentParser, Settings, one_sentence_errors, option
from files_mini import find_checkpoint, read_json_lines, write_text
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
# Of nanoGPT's README: its best checkpoint with the same budget.
NANOGPT_NATS = 1.4697
GOALS = {"mfu": 0.50, "times_llama": 20.0, "nats": 1.40}
# What a part gets to save what it has, after its time: a checkpoint is written in this.
SECONDS_TO_STOP = 15.0
QUICK_TEST = "tests/test_gpu.py::test_kinds_of_attention_agree"  # on a CPU, the suite runs the others
FINISHED, FAILED, TIMED_OUT, LEFT_OUT = "finished", "failed", "timed out", "left out"
Figure = tuple[str, str, str]  # what, its value, and the goal
progress = Console(stderr=True, highlight=False)


@dataclass
class GpuSettings(Settings):
    """What is measured, and for how long."""

    minutes: float = option(8.0, "time for all parts together", above=0)
    output: str = option("gpu-results", "folder of the results")
    device: str = option("cuda", "cuda; or cpu, to try the command", choices=("cuda", "cpu"))
    shakespeare: str | None = option(None, "the text file of Tiny Shakespeare, for the part learning")
    nanogpt: str | None = option(None, "folder of a nanoGPT checkout, which then takes part in training")
    only: list[str] = option([], "names of parts to run (default: all)")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [part.name for part in PARTS]
        for name in self.only:
            if name not in names:
                raise ValueError(f"only takes {', '.join(names)}, got {name!r}.")
        if self.shakespeare is not None and not Path(self.shakespeare).is_file():
            raise ValueError(f"There is no file {self.shakespeare!r}; shakespeare is the text of Tiny Shakespeare.")
        if self.nanogpt is not None and not (Path(self.nanogpt) / "model.py").is_file():
            raise ValueError(f"There is no model.py in {self.nanogpt!r}; nanogpt is the folder of a nanoGPT checkout.")
        if Path(self.output).exists() and not Path(self.output).is_dir():
            raise ValueError(f"output must be a folder, and {self.output!r} is a file.")
        if self.device == "cuda":
            import torch  # not above, for help and other mistakes need no torch, which takes seconds to load

            if not torch.cuda.is_available():
                raise ValueError("PyTorch finds no GPU here; --device cpu tries the command without one.")

    @property
    def folder(self) -> Path:
        return Path(self.output).absolute()

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Part:
    """
    One part.

    Attributes:
        weight: its share of the time on a GPU, beside those of the others: seconds, of about eight minutes.
        command: the program of the repository and its flags.
        figures: what the table shows of its result.
        obstacle: why it cannot run with these settings, or `None`.
        problem: what is wrong with a result of a part that ran to its end, or `None`.
    """

    name: str
    weight: float
    command: Callable[[GpuSettings], list[str]]
    figures: Callable[[dict[str, Any], dict[str, Any]], list[Figure]]
    obstacle: Callable[[GpuSettings], str | None] = lambda settings: None
    problem: Callable[[dict[str, Any]], str | None] = lambda result: None

    def share(self, settings: GpuSettings) -> float:
        """Its weight; on a CPU all are about equal, because to start a program takes most of its time."""
        return self.weight if settings.on_gpu else 1.0

    def result(self, settings: GpuSettings) -> dict[str, Any] | None:
        """What it has written so far."""
        if self.name == "learning":
            return result_of_learning(settings)
        path = settings.folder / f"{self.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def benchmark(settings: GpuSettings, part: str, program: str, on_gpu: str, on_cpu: str) -> list[str]:
    """The command of a program that takes `--device` and `--output`."""
    flags = (on_gpu if settings.on_gpu else on_cpu).split()
    output = str(settings.folder / f"{part}.json")
    return [f"benchmarks/{program}", "--device", settings.device, "--output", output, *flags]


def command_of_training(settings: GpuSettings, part: str, models: str) -> list[str]:
    on_gpu = "--size gpt2 --context 1024 --modes compiled --bf16 --batch_size 0 --rounds 5 --steps 4"
    on_cpu = "--size tiny --context 16 --modes eager --batch_size 0 --rounds 1 --steps 1"
    return [*benchmark(settings, part, "training.py", on_gpu, on_cpu), "--models", *models.split()]


def command_of_peers(settings: GpuSettings) -> list[str]:
    nanogpt = [] if settings.nanogpt is None else ["--nanogpt", str(Path(settings.nanogpt).absolute())]
    return [*command_of_training(settings, "training_peers", "Llama"), *nanogpt]


def command_of_decoding(settings: GpuSettings, part: str, size: str) -> list[str]:
    on_gpu = f"--size {size} --batch_sizes 1 64 --prompts 16 --tokens 200 --rounds 3 --bf16 --manners greedy"
    on_cpu = "--size tiny --batch_sizes 1 2 --prompts 8 --tokens 16 --rounds 1 --bf16 --manners greedy --static_cache"
    return benchmark(settings, part, "decoding.py", on_gpu, on_cpu)


def command_of_learning(settings: GpuSettings) -> list[str]:
    run = settings.folder / "learning"
    if (run / "checkpoints").is_dir():
        return ["train_accelerate.py", "--resume", "--output_dir", str(run)]
    on_cpu = (
        "--num_hidden_layers 1 --hidden_size 64 --intermediate_size 64 --num_attention_heads 2 --num_key_value_heads 2 "
        "--max_position_embeddings 32 --train_batch_size 4 --max_steps 20 --warmup_steps 2 --eval_steps 10"
    )
    return [
        "train_accelerate.py", "--config", str(ROOT / "configs" / "shakespeare_char_gpu.yaml"),
        "--dataset", str(Path(settings.shakespeare).absolute()), "--cache_dir", str(settings.folder / "cache"),
        "--output_dir", str(run), "--overwrite", *([] if settings.on_gpu else on_cpu.split()),
    ]  # fmt: skip


def result_of_learning(settings: GpuSettings) -> dict[str, Any] | None:
    """The evaluations so far."""
    path = settings.folder / "learning" / "metrics.jsonl"
    lines = read_json_lines(path)
    evaluations = [
        {name: line[name] for name in ("step", "eval_loss", "eval_bits_per_byte")}
        for line in lines
        if "eval_loss" in line
    ]
    if not evaluations:
        return None
    steps = [line for line in lines if "loss" in line]
    return {
        "benchmark": "learning",
        "parameters": next(line["parameters"] for line in lines if "parameters" in line),
        "tokens": max(line["tokens"] for line in steps),
        "best": min(evaluations, key=lambda evaluation: evaluation["eval_loss"]),
        "evaluations": evaluations,
        "tokens_per_second": steps[-1]["tokens_per_second"],
    }


def command_of_quantization(settings: GpuSettings) -> list[str]:
    command = benchmark(settings, "quantization", "quantization.py", "--rounds 3", "--rounds 1 --tokens 4")
    models = ["gpt2" if settings.on_gpu else "tiny"]
    with contextlib.suppress(ValueError):
        models.insert(0, str(Path(find_checkpoint(str(settings.folder / "learning"))).parent))
        command += ["--dataset", str(Path(settings.shakespeare).absolute())] if settings.shakespeare else []
    return [*command, "--models", *models]


def figures_of_device(result: dict[str, Any], results: dict[str, Any]) -> list[Figure]:
    speed, sheet = result["bfloat16_flops_per_second"], result["data_sheet_flops_per_second"]
    goal = "" if sheet is None else f"data sheet {sheet / 1e12:,.0f}"
    return [
        (result["machine"]["device"].split(",")[0], f"torch {result['machine']['torch']}", ""),
        ("bfloat16 product", f"{speed / 1e12:,.2f} TFLOP/s", goal),
        ("memory bandwidth", f"{result['bytes_per_second'] / 1e9:,.0f} GB/s", ""),
    ]


def figures_of_correctness(result: dict[str, Any], results: dict[str, Any]) -> list[Figure]:
    counts = Counter(outcome["outcome"] for outcome in result["outcomes"].values())
    return [("tests", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()), "0 failed")]


def problem_of_correctness(result: dict[str, Any]) -> str | None:
    failed = [name.split("::")[-1] for name, found in result["outcomes"].items() if found["outcome"] == "failed"]
    return f"failed: {', '.join(failed)}" if failed else None


def figures_of_training(result: dict[str, Any], results: dict[str, Any]) -> list[Figure]:
    figures = []
    settings, sheet = result["settings"], results.get("device", {}).get("data_sheet_flops_per_second")
    for row in result["contenders"]:
        what = f"{row['model']}, {settings['size']}, {settings['batch_size']} x {settings['context']}"
        figures.append((what, f"{row['tokens_per_second']:,.0f} tokens/s", ""))
        of_product = f"{row['mfu_of_square_product']:.1%} of the product"
        goal = f"{GOALS['mfu']:.0%}" if row["model"] == "Mini" else ""
        of_sheet = "" if sheet is None else f", {row['model_flops_per_second'] / sheet:.1%} of the data sheet"
        figures.append((f"{what}: MFU", of_product + of_sheet, goal))
        if row["peak_memory_bytes"] is not None:
            planned = row["planned_memory_bytes"]
            beside = "" if planned is None else f", planned {planned / 1e9:,.2f}"
            figures.append((f"{what}: peak", f"{row['peak_memory_bytes'] / 1e9:,.2f} GB{beside}", ""))
    return figures


def figures_of_decoding(result: dict[str, Any], results: dict[str, Any]) -> list[Figure]:
    figures, size = [], result["settings"]["size"]
    bandwidth = results.get("device", {}).get("bytes_per_second")
    for row in result["rows"]:
        share = "" if bandwidth is None else f", {row['bytes_read_per_second'] / bandwidth:.1%} of bandwidth"
        figure = f"{row['tokens_per_second']:,.0f} tokens/s, {row['times_llama']:.2f} x Llama{share}"
        is_goal = (row["contender"], row["batch_size"], size) == ("Mini, compiled", 1, "small")
        goal = f"{GOALS['times_llama']:g} x" if is_goal else ""
        figures.append((f"{row['contender']}, {size}, {row['batch_size']} at a time", figure, goal))
    return figures


def figures_of_learning(result: dict[str, Any], results: dict[str, Any]) -> list[Figure]:
    best = result["best"]
    goal = f"{GOALS['nats']:.2f}; nanoGPT {NANOGPT_NATS}"
    what = f"{result['parameters'] / 1e6:.2f}M parameters, {result['tokens'] / 1e6:.1f}M tokens"
    return [
        (f"{what}: best, step {best['step']}", f"{best['eval_loss']:.4f} nats", goal),
        ("speed of the trainer", f"{result['tokens_per_second']:,.0f} tokens/s", ""),
    ]


def figures_of_quantization(result: dict[str, Any], results: dict[str, Any]) -> list[Figure]:
    figures = []
    for row in result["rows"]:
        bits = "" if row["bits_per_byte"] is None else f", {row['bits_per_byte']:.4f} bits/byte"
        figure = f"{row['tokens_per_second']:,.0f} tokens/s, {row['bytes'] / 1e6:,.1f} MB{bits}"
        figures.append((f"{Path(row['model']).name}, {row['kind']}", figure, ""))
    return figures


# The order is that of importance.
PARTS = [
    Part(
        "device", 25, lambda settings: benchmark(settings, "device", "device.py", "", "--rounds 1"), figures_of_device
    ),
    Part(
        "correctness",
        75,
        lambda settings: benchmark(settings, "correctness", "correctness.py", "", f"--tests {QUICK_TEST}"),
        figures_of_correctness,
        problem=problem_of_correctness,
    ),
    Part("training", 90, lambda settings: command_of_training(settings, "training", "Mini"), figures_of_training),
    Part("training_peers", 80, command_of_peers, figures_of_training),
    Part("decoding", 45, lambda settings: command_of_decoding(settings, "decoding", "small"), figures_of_decoding),
    Part(
        "decoding_gpt2",
        45,
        lambda settings: command_of_decoding(settings, "decoding_gpt2", "gpt2"),
        figures_of_decoding,
    ),
    Part(
        "learning",
        120,
        command_of_learning,
        figures_of_learning,
        lambda settings: None if settings.shakespeare else "name the text of Tiny Shakespeare by --shakespeare",
    ),
    Part("quantization", 40, command_of_quantization, figures_of_quantization),
]


def run_part(part: Part, settings: GpuSettings, seconds: float) -> dict[str, Any]:
    """The record of a part: its status, and why; its command, its seconds and its result."""
    command = part.command(settings)
    log = settings.folder / f"{part.name}.log"
    environment = os.environ | ({} if settings.on_gpu else {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"})
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / command[0]), *command[1:]],
            cwd=settings.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it starts ends with it
        )
        timed_out = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = part.result(settings)
    status, reason = FINISHED, None
    if timed_out or process.returncode == EXIT_STOPPED:
        status, reason = TIMED_OUT, f"not done after {seconds:.0f} s"
    elif process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
        status, reason = FAILED, f"exit code {process.returncode}: {lines[-1]}"
    elif result is None:
        status, reason = FAILED, "it ended without a result"
    elif problem := part.problem(result):
        status, reason = FAILED, problem
    return {
        "status": status,
        "reason": reason,
        "seconds": time.monotonic() - started,
        "command": command,
        "result": result,
    }


def earlier_records(settings: GpuSettings) -> dict[str, Any]:
    """
    The records of parts that an earlier call left in the folder.

    Raises:
        ValueError: if they are of another device.
    """
    path = settings.folder / "gpu.json"
    if not path.is_file():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    if known["settings"]["device"] != settings.device:
        raise ValueError(
            f"{settings.output!r} has results of the device {known['settings']['device']!r}: name another folder."
        )
    return known["parts"]


def measure(settings: GpuSettings) -> dict[str, Any]:
    """Runs what is not finished yet; all records are in FOLDER/gpu.json after each part."""
    ends = time.monotonic() + 60 * settings.minutes
    records = earlier_records(settings)
    settings.folder.mkdir(parents=True, exist_ok=True)
    asked = [part for part in PARTS if part.name in settings.only or not settings.only]
    pending = [part for part in asked if records.get(part.name, {}).get("status") != FINISHED]
    results: dict[str, Any] = {"benchmark": "gpu", "settings": asdict(settings), "parts": records}
    while pending:
        part = pending[0]
        if obstacle := part.obstacle(settings):
            records[part.name] = {"status": LEFT_OUT, "reason": obstacle}
        else:
            # What a part leaves of its time goes to those after it.
            share = part.share(settings) / sum(each.share(settings) for each in pending)
            seconds = max(1.0, share * (ends - time.monotonic()))
            progress.print(f"{part.name}: up to {seconds:.0f} s")
            (settings.folder / f"{part.name}.json").unlink(missing_ok=True)
            records[part.name] = run_part(part, settings, seconds)
        results["parts"] = {each.name: records[each.name] for each in PARTS if each.name in records}
        write_text(settings.folder / "gpu.json", json.dumps(results, indent=1) + "\n")
        pending = pending[1:]
    return results


def show(results: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("part", "what", "measured", "goal"):
        table.add_column(name)
    known = {name: record["result"] for name, record in results["parts"].items() if record.get("result")}
    for part in PARTS:
        record = results["parts"].get(part.name)
        if record is None:
            continue
        figures = part.figures(known[part.name], known) if part.name in known else []
        status = f", {record['seconds']:.0f} s" if "seconds" in record else ""
        heading = record["status"] + status + ("" if record["reason"] is None else f": {record['reason']}")
        table.add_row(part.name, heading, "", "")
        for figure in figures:
            table.add_row("", *figure)
    Console(highlight=False, markup=False).print(table)


def main() -> None:
    description = " ".join(__doc__.strip().split("\n\n")[0].split())
    (settings,) = ArgumentParser(GpuSettings, description=description).parse(sys.argv[1:])
    show(measure(settings))
    print(f"All results: {Path(settings.output) / 'gpu.json'}")


if __name__ == "__main__":
    with one_sentence_errors():
        main()
