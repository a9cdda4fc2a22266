"""The commands of docs/EXPORT.md, in its order, on a run with the name of the README's first one."""

import re
import shlex
from pathlib import Path

import pytest
from modeling_mini.export import __main__

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_page(quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny-python-stdlib").symlink_to(quick_run)
    (tmp_path / "README.md").write_text("# Text\n" * 100)
    text = (ROOT / "docs" / "EXPORT.md").read_text()
    ran = []
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(block, "EXPORT.md", "exec"), {})
            continue
        for line in block.splitlines():
            words = shlex.split(line)
            if words[:2] != ["pip", "install"]:
                assert words[:3] == ["python", "-m", "modeling_mini.export"]
                __main__.run(words[3:])
                ran.append(words[3])
    assert ran == ["native", "mini", "gguf", "onnx", "lm_eval"]
    exports = {path.name for path in (tmp_path / "exports").iterdir()}
    assert exports == {"gguf", "mini", "native", "onnx", "python", "task"}
