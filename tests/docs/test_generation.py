"""docs/GENERATION.md as somebody follows it: every block, in order, on a run named like that of the README."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers.programs import ROOT, run_program
from modeling_mini.export import quantized
from training_mini.build import SAMPLING
from transformers import GenerationConfig

PAGE = (ROOT / "docs" / "GENERATION.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def run_line(line: str, folder: Path) -> str:
    """A line of the page; bash runs what is no program of Mini."""
    before, python, arguments = line.rpartition("python ")
    words = shlex.split(arguments)
    if not python:
        return subprocess.check_output(["bash", "-c", line], cwd=folder, text=True)
    if words[:2] == ["-m", "modeling_mini.export.quantized"]:
        quantized.run(words[2:])
        return ""
    piped = subprocess.check_output(["bash", "-c", before.rstrip(" |")], text=True) if before else None
    result = run_program(*words, cwd=folder, input=piped)
    assert result.returncode == 0, f"{line}\n{result.stderr}"
    return result.stdout


def test_default_sampling() -> None:
    said = "takes a temperature of {temperature} and top-p {top_p} by default, and transformers adds top-k 50"
    assert said.format(**SAMPLING) in PAGE
    assert GenerationConfig()._get_default_generation_params()["top_k"] == 50


@pytest.mark.slow
def test_blocks(quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny-python-stdlib").symlink_to(quick_run)
    outputs = []
    for language, block in BLOCKS:
        assert language in ("bash", "python"), f"nobody runs a block of {language}"
        if language == "bash":
            outputs += [run_line(line, tmp_path) for line in block.splitlines()]
            continue
        (tmp_path / "block.py").write_text(block, encoding="utf-8")
        result = run_program(str(tmp_path / "block.py"), cwd=tmp_path)  # in a process without Mini
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    streamed, two, by_the_box, _, _, in_python, _ = outputs
    assert by_the_box.startswith("def read_lines(path):\n")
    assert streamed.startswith("def ") and two.count("class Stack") == 2 and in_python.startswith("import ")
    texts = [json.loads(line) for line in (tmp_path / "runs" / "texts.jsonl").read_text().splitlines()]
    assert [text["prompt"] for text in texts] == ["import ", "def ", "class "]
    assert all(text.keys() == {"text", "tokens", "finish_reason"} for line in texts for text in line["texts"])
    assert {text["finish_reason"] for line in texts for text in line["texts"]} <= {"end", "stop", "length"}
    assert (tmp_path / "runs" / "int4" / "model.safetensors").is_file()
