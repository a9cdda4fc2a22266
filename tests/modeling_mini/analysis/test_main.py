"""The commands as a user runs them, their mistakes, and every block of docs/ANALYSIS.md."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from configuration_mini import MiniConfig
from modeling_mini.analysis import __main__ as program
from modeling_mini.analysis import drawing, reports
from modeling_mini.analysis.attention import AttentionSummary
from tokenization import ByteTokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "ANALYSIS.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
PROMPT_OF_64_TOKENS = "x" * 63


@pytest.fixture
def working_folder(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, beside the run and a text."""
    (tmp_path / "runs").symlink_to(run_folder.parent)
    (tmp_path / "corpus.txt").write_text(
        "def area(self):\n    return self.width * self.height\n" * 40, encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reports.console, "_width", 120)
    return tmp_path


@pytest.mark.slow
def test_model_stays_light_and_a_mistake_of_the_program_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import runpy, sys, modeling_mini; print({'matplotlib', 'modeling_mini.analysis'} & set(sys.modules)); "
        "runpy.run_module('modeling_mini.analysis', run_name='__main__', alter_sys=True)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "cost", "--preset", "tinny"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "set()\n"
    assert result.stderr == (
        "error: There is no preset 'tinny'; the presets are tiny, small, medium, large, gpt2, did you mean 'tiny'?\n"
    )
    assert result.returncode == 2


def test_cost_counts_every_kind_of_model(working_folder: Path, capsys: pytest.CaptureFixture) -> None:
    program.run(["cost"])
    count = AutoModelForCausalLM.from_pretrained("runs/tiny-python-stdlib/best").num_parameters()
    assert f"runs/tiny-python-stdlib/best: {count:,} parameters" in " ".join(capsys.readouterr().out.split())
    program.run(["cost", "--preset", "gpt2"])
    assert "gpt2: 123,5" in capsys.readouterr().out
    program.run(["cost", "--size", "tiny", "--num_hidden_layers", "5", "--tie_word_embeddings", "false"])
    output = " ".join(capsys.readouterr().out.split())
    with torch.device("meta"):
        config = MiniConfig.preset("tiny", num_hidden_layers=5, tie_word_embeddings=False)
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    assert f"tiny num_hidden_layers=5 tie_word_embeddings=False: {count:,} parameters" in output
    program.run(["cost", "--vocab_size", "2048"])
    assert "tiny vocab_size=2048: " in capsys.readouterr().out
    LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2).save_pretrained("l")
    program.run(["cost", "--model", "l", "--length", "100"])
    output = capsys.readouterr().out
    assert "FLOPs per token at length 100" in output
    assert re.search(r"head +│ +2,048,000", output)


@pytest.mark.slow
def test_cost_shows_measured_peaks_and_batches(working_folder: Path, capsys: pytest.CaptureFixture) -> None:
    program.run(
        ["cost", "--model", "runs/tiny-python-stdlib", "--batch_size", "2", "--measure", "--device_memory", "100KB"]
    )
    output = capsys.readouterr().out
    assert output.count("measured peak") == output.count("largest batch in 97.7 KiB") == 3
    assert "none fits" in output


@pytest.mark.slow
def test_attention_of_a_prompt_and_of_a_text(working_folder: Path, capsys: pytest.CaptureFixture) -> None:
    program.run(["attention", "--prompt", "a b", "--output", "a/prompt.png"])
    output = capsys.readouterr().out
    assert "uniform attention has 1.06" in output  # (ln 2 + ln 3 + ln 4) / 3
    assert output.endswith("Wrote a/prompt.png\n")
    program.run(["attention", "--text_file", "corpus.txt", "--windows", "2", "--length", "32", "--output", "text.png"])
    assert Path("a/prompt.png").is_file() and Path("text.png").is_file()


@pytest.mark.parametrize(
    ("width", "heads", "cell"), [(120, 5, " 0.50 50% "), (60, 5, " 50% "), (80, 8, " 50% "), (60, 12, "50%")]
)
def test_no_cell_of_the_heads_breaks_in_two(width: int, heads: int, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = AttentionSummary(torch.ones(2, heads, 3, 3) / 3, torch.full((2, heads), 0.5), 1.0)
    monkeypatch.setattr(reports.console, "_width", width)
    with reports.console.capture() as captured:
        reports.console.print(reports.fitting_table(summary))
    lines = captured.get().splitlines()
    assert [line.count(cell) for line in lines if "%" in line] == [heads + 1] * 2 and "1.00" in "".join(lines[:2])
    assert "…" not in captured.get()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("coast", "There is no command 'coast'; the commands are cost, attention, activations, did you mean 'cost'?"),
        ("cost --preset small --model x", "Give --model or --preset, not both."),
        ("cost --hidden_size 64 --model x", "The model has a shape already: leave out hidden_size, or --model."),
        (
            "cost --preset tiny --num_attention_heads 3",
            "MiniConfig: hidden_size (128) must be divisible by num_attention_heads (3)",
        ),
        ("cost --model missing", "There is no run or checkpoint folder 'missing'."),
        (
            "cost --model gpt2like",
            "GPT2LMHeadModel is not Llama-shaped: Llama has no parameter transformer.wte.weight.",
        ),
        ("cost --preset tiny --length 257", "length must be at most 256, the context of the model, got 257."),
        ("cost --preset tiny --batch_size 0", "batch_size must be at least 1, got 0."),
        ("cost --preset tiny --lenght 3", "There is no flag '--lenght', did you mean 'length'?"),
        (
            "cost --preset tiny --device_memory 24G",
            "device_memory must be a size with its unit, such as 24GiB or 500MB, got '24G'.",
        ),
        *(
            (f"cost --preset tiny --device_memory {size}GiB", "device_memory must be a size with its unit")
            for size in ("1e30", "1e400")
        ),
        ("cost --preset gpt2 --batch_size 1000000 --measure", "Measuring needs 105.9 TiB, and "),
        ("attention", "Give exactly one of --prompt and --text_file."),
        ("attention --prompt a --text_file corpus.txt", "Give exactly one of --prompt and --text_file."),
        (
            f"attention --prompt {PROMPT_OF_64_TOKENS}x",
            "The prompt has 65 tokens; the context of the model has 64.",
        ),
        ("attention --prompt ''", "The prompt must have at least two tokens."),
        ("attention --text_file missing.txt", "No such file or directory: missing.txt"),
        (
            "attention --text_file corpus.txt --length 65",
            "length must be at most 64, the context of the model, got 65.",
        ),
        ("attention --prompt ab --output corpus.txt/a.png", "output must be in a folder, and 'corpus.txt' is a file."),
        ("activations --prompt ab --output runs", "output must name a file, and 'runs' is a folder."),
        ("activations --text_file latin1.txt", "latin1.txt is not valid UTF-8 (invalid continuation byte)."),
        ("activations --text_file corpus.txt --windows 0", "windows must be at least 1, got 0."),
        ("activations --model untrained --prompt ab", "'untrained' has no weights: model.safetensors is missing."),
    ],
)
def test_mistakes_end_in_one_sentence(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command: str, sentence: str
) -> None:
    (working_folder / "latin1.txt").write_bytes("né à".encode("latin-1"))
    GPT2Config(n_embd=64, n_layer=1, n_head=2).save_pretrained("gpt2like")
    MiniConfig.preset("tiny").save_pretrained("untrained")
    monkeypatch.setattr(sys, "argv", ["analysis", *shlex.split(command)])
    with pytest.raises(SystemExit) as stop:
        program.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1
    assert not list(working_folder.glob("*.png"))


@pytest.mark.slow
def test_longest_prompt_fits(working_folder: Path) -> None:
    program.run(["attention", "--prompt", PROMPT_OF_64_TOKENS])
    assert Path("attention.png").is_file()


def test_a_model_with_an_adapter_has_gradients(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also after it was merged: peft has frozen the weights."""
    gradients: dict[str, float] = {}
    monkeypatch.setattr(drawing, "draw_activations", lambda activations, norms, *about: gradients.update(norms))
    program.run(["activations", "--model", "box-chat", "--prompt", "def area"])
    assert {"embed_tokens", "layers.0.self_attn", "layers.0.mlp", "norms"} <= gradients.keys()
    assert all(norm > 0 for norm in gradients.values())


def test_windows_of_a_text_keep_its_ends_of_lines(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a\r\nb\r")
    arguments = SimpleNamespace(prompt=None, text_file=str(tmp_path / "text"), length=None, windows=1)
    (window,) = reports.find_windows(arguments, SimpleNamespace(max_position_embeddings=6), ByteTokenizer())
    assert window.tolist() == [1, *(byte + 8 for byte in b"a\r\nb\r")]


def test_figures_name_a_model_as_the_command_line_does(working_folder: Path) -> None:
    names = {name: reports.find_model(name)[2] for name in ("runs/tiny-python-stdlib", "box", "box-chat")}
    assert names == {"runs/tiny-python-stdlib": "tiny-python-stdlib", "box": "box", "box-chat": "box-chat"}


def test_help_names_commands_and_flags(capsys: pytest.CaptureFixture) -> None:
    program.run(["--help"])
    output = capsys.readouterr().out
    assert all(command in output for command in ("cost", "attention", "activations"))
    with pytest.raises(SystemExit) as stop:
        program.run(["cost", "--help"])
    assert stop.value.code == 0
    assert "--device_memory" in capsys.readouterr().out


@pytest.mark.slow
def test_blocks_of_the_document_run(working_folder: Path, capsys: pytest.CaptureFixture) -> None:
    """In order and in one folder, as a reader would; what the document says is printed is printed."""
    (working_folder / "modeling_mini").symlink_to(ROOT / "modeling_mini")
    names: dict[str, object] = {}
    kinds = [kind for kind, _ in BLOCKS]
    assert {"bash", "python", "text"} == set(kinds)
    output = ""
    for kind, block in BLOCKS:
        if kind == "text":
            assert block.strip() in output
            continue
        capsys.readouterr()
        if kind == "python":
            exec(compile(block, "docs/ANALYSIS.md", "exec"), names)
        for command in block.replace("\\\n", "").splitlines() if kind == "bash" else ():
            start, arguments = "python -m modeling_mini.analysis ", shlex.split(command)[3:]
            assert command.startswith(start)
            program.run(arguments)
        output = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())


def test_pictures_of_the_document_exist() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", DOCUMENT)
    assert pictures
    for picture in pictures:
        assert (ROOT / "docs" / picture).is_file()
