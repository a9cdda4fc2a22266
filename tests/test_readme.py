"""Every shell and Python block of the README and of docs/QUICKSTART.md, in a copy of the repository, in order."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import fork_server
from helpers.environments import installed_for, lend_libraries
from helpers.programs import INSTALLING, ROOT, run_program
from helpers.runs import wait_for_steps
from modeling_mini import MiniConfig, MiniForCausalLM
from training_mini.arguments import NEW_MODEL

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("train_accelerate.py", "generate.py", "push_to_hub.py", "benchmarks/gpu.py")
MODULES = (
    "modeling_mini.analysis cost", "modeling_mini.analysis attention", "modeling_mini.export gguf",
    "modeling_mini.export onnx", "modeling_mini.export lm_eval", "modeling_mini.export.quantized",
    "generation_mini.demo", "training_mini.sweep", "training_mini.compare", "box_mini",
)  # fmt: skip
QUICKSTART = (ROOT / "docs" / "QUICKSTART.md").read_text(encoding="utf-8")
(TEST_COMMAND,) = re.findall(r"^```\n(.*)\n```$", README, flags=re.MULTILINE)
BLOCKS, QUICKSTART_BLOCKS = (
    re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL) for page in (README, QUICKSTART)
)


def libraries_of(requirements: str) -> set[str]:
    """What a file of requirements asks for, but accelerate."""
    lines = (ROOT / requirements).read_text(encoding="utf-8").splitlines()
    return installed_for(line for line in lines if line and not line.startswith(("#", "-r "))) - {"accelerate"}


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """
    What git has, and what is not ignored; and the beginning of `.venv`, which finds what requirements.txt asks for and
    nothing else. CI itself installs it into an empty environment. Here pip compares the versions with those that are
    asked for, and installs accelerate, whose command the first block calls.
    """
    temporary = tempfile.TemporaryDirectory(prefix="mini-readme-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
    folder = Path(temporary.name, "mini")
    lend_libraries(folder / ".venv", libraries_of("requirements.txt"), Path(temporary.name, "lent"))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    with temporary:
        yield folder


# Of the 2,000 steps of the first command. With so few, and the learning rate falling to zero over them, the model is
# already better than xz.
ENOUGH_STEPS = 500


def interrupted(command: list[str], run: Path, environment: dict[str, str]) -> str:
    """What a command prints that a person stops by Ctrl-C in its terminal, once it trains."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    cwd = run.parents[1]
    process = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)
    with ThreadPoolExecutor(1) as reader:
        outputs = reader.submit(process.communicate)  # ends with the trainer: the launcher does not wait for it
        try:
            wait_for_steps(run, 3, process, seconds=600)
            os.killpg(process.pid, signal.SIGINT)
            output, errors = outputs.result(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0, f"{output}\n{errors}"
    return output


@pytest.mark.slow
def test_blocks(copy: Path, request: pytest.FixtureRequest) -> None:
    """
    In one test, because each block builds on those before it: the first one installs and trains. The quickstart begins
    with the same command, and goes on from the run that is there.

    The first command takes minutes of all cores. Ctrl-C stops it as soon as it trains, and then the command that it
    names goes on with the run, to a nearer end.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = environment["PATH"] = f"{copy}/.venv/bin:{environment['PATH']}"
    environment |= INSTALLING
    assert [language for language, _ in BLOCKS].count("bash") >= 4
    assert QUICKSTART_BLOCKS[0] == BLOCKS[0]
    run = copy / "runs" / "tiny-python-stdlib"
    bash = ["bash", "-euo", "pipefail", "-c"]
    begun = interrupted([*bash, BLOCKS[0][1]], run, environment)
    (go_on,) = re.findall(r"^Go on: +(python train_accelerate.py --resume .*)$", begun, flags=re.MULTILINE)
    if fork_server.IS_POSSIBLE:
        # What is installed now is imported once for all further blocks.
        forks = fork_server.Server(f"{copy}/.venv/bin/python", environment, copy)
        request.addfinalizer(forks.close)
        environment = {**environment, "PATH": f"{forks.executable.parent}:{environment['PATH']}"}
    outputs = []
    for language, block in [("bash", f"{go_on} --max_steps {ENOUGH_STEPS}"), *BLOCKS[1:], *QUICKSTART_BLOCKS[1:]]:
        if language == "text":  # what a command printed, or what needs an account
            continue
        command = [*bash, block] if language == "bash" else ["python", "-c", block]
        assert language in ("bash", "python"), f"nobody runs a block of {language}"
        result = subprocess.run(
            command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
        outputs.append(result.stdout)
    trained = outputs[0]
    bits = {name: float(value) for name, value in re.findall(r"(Mini|gzip -9|xz -9) (\d\.\d+)[,.]", trained)}
    assert bits["Mini"] < bits["xz -9"] < bits["gzip -9"], (
        "the model of the first command predicts Python better than xz"
    )
    sample = trained.split("--- a sample ---\n")[1]
    assert re.search(r"\b(self|if|in|not|return|import|class)\b", sample.removeprefix("def "))
    assert (copy / ".venv" / "bin" / "accelerate").exists()
    # The second command as it stands there, on the quick tests of one file.
    more = libraries_of("requirements-test.txt") - libraries_of("requirements.txt")
    lend_libraries(copy / ".venv", more, copy.parent / "lent-for-tests")
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    environment["PATH"] = path
    environment["PYTEST_ADDOPTS"] = "-n 0 -m 'not slow' tests/test_files.py"
    result = subprocess.run(
        ["bash", "-c", TEST_COMMAND], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and re.search(r"\d passed", result.stdout), f"{result.stdout}\n{result.stderr}"


def test_test_command_is_what_ci_runs() -> None:
    """In an environment of its own, CI installs what this command installs, and runs what it runs."""
    *_, install, command = TEST_COMMAND.split(" && ")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command in lines
    pip, requirements = install.split(" install ")
    assert any(line.startswith(f"{pip} install ") and line.endswith(f" {requirements}") for line in lines)


@pytest.mark.parametrize("row", re.findall(r"^\| `(\w+)` \| ([\d.]+)M \| (.*) \|$", README, flags=re.MULTILINE))
def test_table_of_sizes(row: tuple[str, str, str]) -> None:
    import torch

    name, millions, shape = row
    config = MiniConfig.preset(name, **NEW_MODEL)  # as `--size` makes it
    with torch.device("meta"):
        parameters = MiniForCausalLM(config).num_parameters()
    assert float(millions) == pytest.approx(parameters / 1e6, abs=0.05 if float(millions) > 5 else 0.006)
    heads = f"{config.num_attention_heads} ({config.num_key_value_heads})"
    expected = f"{config.num_hidden_layers} | {config.hidden_size} | {heads} | {config.intermediate_size} | "
    assert shape.startswith(f"{expected}{config.max_position_embeddings} | ")


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_pictures_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text("utf-8") if target else text, re.MULTILINE)
        # As GitHub makes them.
        assert heading in {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}, heading


def test_flags_that_are_named_exist() -> None:
    help_texts = "".join(run_program(program, "--help", "all", cwd=ROOT).stdout for program in PROGRAMS)
    for module in MODULES:
        command = [sys.executable, "-m", *module.split(), "--help", "all"]
        help_texts += subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "LOG.md"]
    assert len(paths) > 10
    pages = [README, *(path.read_text(encoding="utf-8") for path in paths)]
    # Of accelerate, Slurm, torchrun and the server of transformers.
    others = {"--config_file", "--quiet", "--signal", "--standalone", "--master_port", "--rdzv_endpoint", "--nnodes"}
    others |= {"--continuous"}  # -batching
    flags = {flag for page in pages for flag in re.findall(r"`(--[a-z0-9_]+)", page)} - others
    assert len(flags) > 40
    for flag in flags:
        assert re.search(rf"{flag}(?![a-z0-9_])", help_texts), flag
