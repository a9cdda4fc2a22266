"""What is installed, and on which machine: what a report of a fault needs, and what a figure of speed depends on."""

import configparser
import importlib.metadata
import platform
import subprocess
from pathlib import Path

NAME = "mini-lm"
# What results depend on, besides Mini.
LIBRARIES = (
    "torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "bitsandbytes", "safetensors",
    "huggingface_hub", "numpy",
)  # fmt: skip


def report() -> str:
    """One fact a line. It loads torch, to ask for GPUs."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    cores = f"{psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads"
    facts = {
        NAME: version_of_mini(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in LIBRARIES},
        "system": platform.platform(),
        "processor": f"{processor_name()}; {cores}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "gpu": ", ".join(gpus) or "none",
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items())


def version_of(name: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def version_of_mini() -> str:
    """The version of Mini; in a clone of the repository with its commit."""
    folder = Path(__file__).parent
    if not (folder / "setup.cfg").is_file():
        return version_of(NAME)
    setup = configparser.ConfigParser()
    setup.read(folder / "setup.cfg", encoding="utf-8")
    version = setup["metadata"]["version"]
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        return version
    return f"{version}, commit {commit}"


def processor_name() -> str:
    """The name with family, model and vector extensions: processors of one name may differ in speed by half."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()  # of the first core
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        vectors = [flag for flag in facts["flags"].split() if flag.startswith(("avx", "amx"))]
        return f"{facts['model name']}, family {facts['cpu family']} model {facts['model']}, {' '.join(vectors)}"
    except (OSError, KeyError):  # not Linux, or not x86
        return platform.processor() or platform.machine()
