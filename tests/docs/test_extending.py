"""docs/EXTENDING.md as somebody follows it: every block, in order."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import fork_server
from helpers.programs import ROOT, run_program

PAGE = (ROOT / "docs" / "EXTENDING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash)(?: file=(\S+))?\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_blocks(tmp_path: Path) -> None:
    assert len(BLOCKS) == PAGE.count("\n```python") + PAGE.count("\n```bash") > 9
    for _, name, block in BLOCKS:
        if name:
            (tmp_path / name).write_text(block)
    # The blocks of Python in one process, as in a notebook.
    script = "\n".join(block for language, name, block in BLOCKS if language == "python" and not name)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [fork_server.python(), "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "TrainingResult('runs/python', 20 steps in " in done.stdout and done.stdout.endswith("False\n")
    assert re.search(r"^LlamaForCausalLM \d\.\d+$", done.stdout, re.MULTILINE)
    assert int(re.search(r"^(\d+) steps$", done.stdout, re.MULTILINE)[1]) < 20
    assert "The data is an iterable: its order is that of the batches" in done.stderr
    outputs = []
    for command in (line for language, _, block in BLOCKS if language == "bash" for line in block.splitlines()):
        python, program, *arguments = re.findall(r'"([^"]*)"|(\S+)', command)
        result = run_program(program[1], *(quoted or plain for quoted, plain in arguments), cwd=tmp_path)
        assert python[1] == "python" and result.returncode == 0, f"{command}\n{result.stderr}"
        outputs.append(result.stdout)
    _, square, resumed, without_digits = outputs
    assert square.startswith("The ") and "Trained 30 steps" in resumed
    assert not re.search(r"\d", without_digits.removeprefix("1 plus 2 is "))


def test_each_thing_takes_about_ten_lines() -> None:
    lengths = {name or block.splitlines()[0]: len(block.splitlines()) for _, name, block in BLOCKS}
    longest = max(length for name, length in lengths.items() if name != "square_mini.py")
    assert longest <= 12 and lengths["square_mini.py"] <= 30
