"""`--version`: what a report of a fault needs."""

import importlib.metadata
import re
from pathlib import Path

import installation_mini
import pytest
from generation_mini.arguments import parse_arguments as generation_arguments
from installation_mini import LIBRARIES, processor_name, version_of_mini
from training_mini.arguments import parse_arguments


@pytest.mark.parametrize("parse", [parse_arguments, generation_arguments], ids=["mini-train", "mini-generate"])
def test_the_facts(parse, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--version"])
    assert ended.value.code == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"] == importlib.metadata.version("torch")
    assert {*LIBRARIES, "mini-lm", "python", "system", "memory", "gpu"} <= facts.keys()
    assert facts["processor"].startswith(processor_name()) and "cores" in facts["processor"]


def test_the_version_of_mini_has_the_commit_in_a_clone_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.match(r"\d+\.\d+\.\d+", version_of_mini())
    monkeypatch.setattr(installation_mini, "__file__", str(tmp_path / "installation_mini.py"))
    assert version_of_mini() in ("not installed", "0.1.0"), "what pip says"
    (tmp_path / "setup.cfg").write_text("[metadata]\nname = mini-lm\nversion = 1.2.3\n")
    assert version_of_mini() == "1.2.3"


def test_another_system_than_linux_has_a_processor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **settings: "processor: 0\nFeatures: neon\n")
    assert processor_name()
