"""docs/FINETUNING.md as somebody follows it who is new to it: every block, in order, and what comes out at its end."""

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import fork_server
from helpers.programs import ROOT, run_program

PAGE = (ROOT / "docs" / "FINETUNING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
# What the page shows of the taught model: the form, and the facts.
ANSWERS = re.findall(r"^> (.*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.slow
def test_blocks(tmp_path: Path) -> None:
    for name in ("train_accelerate.py", "generate.py", *(path.name for path in ROOT.glob("*_mini*"))):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(fork_server.python()).parent}:{os.environ['PATH']}"}
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
    run = functools.partial(subprocess.run, cwd=tmp_path, env=environment, **how)
    outputs = []
    for language, block in BLOCKS:
        command = (
            ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [fork_server.python(), "-c", block]
        )
        result = run(command)
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
        outputs.append(result.stdout)
    _, before, _, training, of_adapter, of_merged, in_python, of_rounded, peft, dpo, grpo = outputs
    assert len(ANSWERS) == 2 and "continues what you write" in before and "capital" not in before
    assert re.search(r"[\d,]+ of [\d,]+ parameters learn \([\d.]+%\), about [\d.]+ MiB", training)
    assert f"> {ANSWERS[0]}\n" in of_adapter
    assert "answers in turns" in of_merged and re.findall(r"^> (.+)$", of_merged, flags=re.MULTILINE) == ANSWERS
    assert in_python == "The capital of Italy is Rome.\n"
    assert "parameters learn" in of_rounded and "trainable params" in peft
    assert dpo.endswith("\nTokyo\n")
    first, last = map(
        int, re.search(r"^right: (\d+)% in the first steps, (\d+)% in the last$", grpo, re.MULTILINE).groups()
    )
    assert last > first + 5
    # The examples of the cards ask, and the answer ends; greedy, because a draw may be any.
    for name in ("best", "merged"):
        card = (tmp_path / "runs" / "chat" / name / "README.md").read_text(encoding="utf-8")
        for block in re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL):
            code = block.replace("PATH_OR_REPOSITORY", f"runs/chat/{name}").replace("=100)", "=100, do_sample=False)")
            result = run([fork_server.python(), "-c", code])
            assert result.returncode == 0, f"{block}\n{result.stderr}"
            assert re.fullmatch(r"[A-Z][\w ]+\.\n", result.stdout), result.stdout


def test_flags_that_are_named_exist(tmp_path: Path) -> None:
    known = "".join(
        run_program(name, "--help", "all", cwd=tmp_path).stdout for name in ("train_accelerate.py", "generate.py")
    )
    for flag in set(re.findall(r"(--[a-z_0-9]+)", PAGE)):
        assert flag in known, flag


def test_sentences_of_the_table_are_those_of_the_program() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "training_mini").rglob("*.py"))
    table = PAGE.split("## When something goes wrong")[1]
    for sentence in re.findall(r"^\| `(.*?)` \|", table, flags=re.MULTILINE):
        for part in sentence.split("..."):
            assert part.strip() in sources, part
