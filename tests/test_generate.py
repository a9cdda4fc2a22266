"""generate.py as a user types it."""

import json
import os
import shutil
import sys
from pathlib import Path

import pexpect
import pytest
from conftest import ROOT, run_program
from test_train_accelerate import one_sentence
from transformers import AutoModelForCausalLM, AutoTokenizer


def generate(run: Path, *arguments: object, **settings: object):
    return run_program("generate.py", "--model", run, *arguments, cwd=run.parent.parent, **settings)


def test_default_model_is_the_newest_run(quick_run: Path) -> None:
    result = run_program("generate.py", "--prompt", "the ", "--max_new_tokens", 10, cwd=quick_run.parent.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the ") and len(result.stdout) > 5
    assert result.stderr == ""


def test_seed_and_its_absence(quick_run: Path) -> None:
    same = [generate(quick_run, "--prompt", "the ", "--seed", 3).stdout for _ in range(2)]
    assert same[0] == same[1]
    assert generate(quick_run, "--prompt", "the ", "--seed", 4).stdout != same[0]


def test_max_tokens_is_another_name(quick_run: Path) -> None:
    result = generate(quick_run, "--prompt", "the ", "--max_tokens", 7, "--temperature", 0)
    again = generate(quick_run, "--prompt", "the ", "--max_new_tokens", 7, "--temperature", 0)
    assert result.stdout == again.stdout and result.returncode == 0
    model = AutoModelForCausalLM.from_pretrained(quick_run / "best", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(quick_run / "best", trust_remote_code=True)
    output = model.generate(**tokenizer("the ", return_tensors="pt"), do_sample=False, max_new_tokens=7)
    assert result.stdout == tokenizer.decode(output[0], skip_special_tokens=True) + "\n"


def test_prompt_from_a_pipe_and_streaming(quick_run: Path) -> None:
    plain = generate(quick_run, "--temperature", 0, "--max_tokens", 50, input="Übung ")
    streamed = generate(quick_run, "--temperature", 0, "--max_tokens", 50, "--stream", input="Übung ")
    assert plain.stdout.startswith("Übung ") and plain.stdout == streamed.stdout


def test_several_texts(quick_run: Path) -> None:
    result = generate(quick_run, "--prompt", "the ", "--num_return_sequences", 3, "--max_tokens", 20, "--seed", 1)
    parts = result.stdout.split("--- ")
    assert len(parts) == 4 and len(set(parts)) == 4


def test_long_prompt_says_what_was_done_and_keeps_the_pipe_clean(quick_run: Path) -> None:
    result = generate(quick_run, "--max_tokens", 5, input="a" * 100)
    assert "(The prompt has 101 tokens and the context 64: only the last 31 tokens" in result.stderr
    assert result.stdout.startswith("a" * 100) and "context" not in result.stdout


@pytest.fixture
def broken(quick_run: Path, tmp_path: Path):
    def broken(change) -> Path:
        shutil.copytree(quick_run / "best", tmp_path / "model")
        change(tmp_path / "model")
        return tmp_path / "model"

    return broken


def test_truncated_weights(broken) -> None:
    folder = broken(lambda folder: os.truncate(folder / "model.safetensors", 20_000))
    assert "are damaged or cut short" in one_sentence(generate(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_missing_file_is_named(broken, name: str) -> None:
    folder = broken(lambda folder: (folder / name).unlink())
    assert name in one_sentence(generate(folder))


def test_impossible_configuration(broken) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 7}))

    assert "num_attention_heads (2) must be divisible by num_key_value_heads (7)" in one_sentence(
        generate(broken(change))
    )


def test_what_is_no_model(quick_run: Path, tmp_path: Path) -> None:
    assert "There is no trained model under runs/" in one_sentence(run_program("generate.py", cwd=tmp_path))
    assert "There is no run or checkpoint folder './none'" in one_sentence(
        run_program("generate.py", "--model", "./none", cwd=tmp_path)
    )
    state = quick_run / "checkpoints" / "step_40"
    assert "is a state to resume training from" in one_sentence(generate(state))
    (tmp_path / "empty").mkdir()
    assert "holds no trained model" in one_sentence(generate(tmp_path / "empty"))


def test_model_of_a_run_that_died_while_replacing_its_best(broken, quick_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(quick_run, run)
    (run / "best").rename(run / ".best.previous")
    shutil.rmtree(run / "final")
    assert generate(run, "--max_tokens", 3, input="a").returncode == 0


class Terminal:
    """The interactive mode on a pseudo-terminal."""

    def __init__(self, run: Path, *arguments: object) -> None:
        command = [str(ROOT / "generate.py"), "--model", str(run), "--interactive", *map(str, arguments)]
        self.process = pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=60, dimensions=(50, 200))
        self.process.expect("Ctrl-D ends")
        self.prompt()

    def prompt(self) -> str:
        """Waits for the prompt and returns what came before it."""
        self.process.expect("\r\n> ")
        return self.process.before

    def say(self, line: str) -> str:
        self.process.sendline(line)
        return self.prompt()


def test_interactive(quick_run: Path) -> None:
    terminal = Terminal(quick_run, "--max_new_tokens", 20, "--seed", 0)
    assert len(terminal.say("the cat")) > len("the cat")
    help_text = terminal.say("/help")
    assert "/reset" in help_text and "Ctrl-C" in help_text
    assert "temperature = 0.7" in terminal.say("/set temperature 0.7")
    assert "top_p must be in (0, 1]" in terminal.say("/set top_p 7")
    assert "max_new_tokens must be a number, got 'many'" in terminal.say("/set max_new_tokens many")
    assert "did you mean '/reset'?" in terminal.say("/rest")
    assert "forgotten" in terminal.say("/reset")
    settings = terminal.say("/settings")
    assert "temperature = 0.7" in settings and "top_p = the default of the model" in settings
    terminal.process.sendeof()
    terminal.process.expect(pexpect.EOF)
    terminal.process.close()
    assert terminal.process.exitstatus == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(quick_run: Path) -> None:
    terminal = Terminal(quick_run, "--max_new_tokens", 1_000_000)
    terminal.process.sendline("the cat")
    terminal.process.expect("the cat\r\n.{20}")
    terminal.process.sendintr()
    terminal.prompt()
    assert "/reset" in terminal.say("/help")
    terminal.process.sendintr()
    terminal.process.expect("Ctrl-D or /quit ends")
    terminal.prompt()
    terminal.process.sendline("/quit")
    terminal.process.expect(pexpect.EOF)
    terminal.process.close()
    assert terminal.process.exitstatus == 0
