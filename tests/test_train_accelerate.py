"""train_accelerate.py as a user types it: what a run leaves behind, how it goes on, and what wrong input says."""

import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import psutil
import pytest
import torch
import train_accelerate
import yaml
from accelerate.utils import write_basic_config
from helpers import fork_server
from helpers.programs import ROOT, one_sentence, one_sentence_of, run_program, start_program
from helpers.runs import ENDLESS, QUICK, losses, metrics, run_on_a_full_disk, train, wait_for_steps, weights
from modeling_mini.remote_code import remote_code_files
from training_mini.checkpoints import states_of
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_what_a_run_leaves_behind(quick_run: Path) -> None:
    assert {path.name for path in quick_run.iterdir()} == {
        "best", "checkpoints", "config.yaml", "curves.png", "final", "metrics.jsonl", "samples.jsonl",
    }  # fmt: skip
    assert {path.name for path in (quick_run / "checkpoints").iterdir()} == {"step_20", "step_40"}
    for name in ("best", "final"):
        assert {path.name for path in (quick_run / name).iterdir()} == {
            "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json", *remote_code_files(),
        }  # fmt: skip
    assert (quick_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert losses(quick_run)[-1] < losses(quick_run)[0] - 1


def test_metrics(quick_run: Path) -> None:
    training = [line for line in metrics(quick_run) if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 41))
    assert set(training[0]) == {
        "step", "loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm", "clipped_share",
        "tokens_per_second", "memory_bytes", "tokens", "epoch", "seconds",
    }  # fmt: skip
    seconds = [line["seconds"] for line in metrics(quick_run)]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1] < 600
    first = metrics(quick_run)[0]
    assert first["step"] == 0 and first["parameters"] == sum(tensor.numel() for tensor in weights(quick_run).values())
    assert first["training_flops_per_token"] > 6 * 0.9 * first["parameters"]
    assert training[0]["tokens"] == 8 * 64
    assert training[1]["learning_rate"] == pytest.approx(0.01), "half way through two warmup steps"
    assert training[-1]["learning_rate"] == pytest.approx(0.02 / 38), "linear: the next one would be 0"
    evaluations = [line for line in metrics(quick_run) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [20, 40]
    assert set(evaluations[0]) == {"step", "seconds", "eval_loss", "eval_perplexity", "eval_bits_per_byte"}


@pytest.mark.slow
def test_resolved_configuration_repeats_the_run(quick_run: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((quick_run / "config.yaml").read_text())
    assert settings["dataset"] == "sample" and settings["max_steps"] == 40 and settings["hidden_size"] == 64
    result = run_program("train_accelerate.py", "--config", quick_run / "config.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    again = tmp_path / "runs" / "tiny-sample"
    assert losses(again) == losses(quick_run)
    assert all(torch.equal(tensor, weights(quick_run)[name]) for name, tensor in weights(again).items())


def test_report(tmp_path: Path) -> None:
    result = train(tmp_path, "--max_steps", 6, "--eval_steps", 3, "--output_dir", "here")
    assert result.returncode == 0, result.stderr
    for words in (
        "Mini ", "gzip -9 ", "xz -9 ", "--- a sample ---", "here/best", "here/curves.png",
        f"python {ROOT}/generate.py --model here --prompt ",
        f"python {ROOT}/train_accelerate.py --resume --output_dir here --max_steps 12",
        "(Bits per byte: how many bits ", "Loading PyTorch", "First step ...", "step 3: ",
    ):  # fmt: skip
        assert words in result.stdout
    assert "Writing model shards" not in result.stderr and "warn" not in result.stderr.lower()
    commands = [
        line.split("python ")[1].removeprefix(f"{ROOT}/") for line in result.stdout.splitlines() if "python " in line
    ]
    followed = run_program(*commands[1].split(), cwd=tmp_path)
    assert followed.returncode == 0 and "Resuming at step 6" in followed.stdout


def test_model_card_states_facts_of_the_run(quick_run: Path) -> None:
    card = (quick_run / "best" / "README.md").read_text()
    best = min((line for line in metrics(quick_run) if "eval_loss" in line), key=lambda line: line["eval_loss"])
    assert f"{best['eval_bits_per_byte']:.4f}" in card
    assert "pipeline_tag: text-generation" in card and "library_name: transformers" in card
    assert "seed 42" in card and str(quick_run) not in card


STRANGER = """
import importlib.util
assert importlib.util.find_spec("modeling_mini") is None and importlib.util.find_spec("tokenization") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
for folder in ("given", "saved_again"):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    output = model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    generator = pipeline("text-generation", model=folder, trust_remote_code=True)
    assert generator("the cat", max_new_tokens=20, do_sample=False)[0]["generated_text"] == text
    print(text)
    model.save_pretrained("saved_again")
    tokenizer.save_pretrained("saved_again")
"""


@pytest.mark.slow
def test_model_of_a_run_works_where_mini_is_not_installed(quick_run: Path, tmp_path: Path) -> None:
    shutil.copytree(quick_run / "best", tmp_path / "given")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    result = subprocess.run(
        [fork_server.python(), "-c", STRANGER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    settings = ("--prompt", "the cat", "--max_tokens", 20, "--temperature", 0)
    ours = run_program("generate.py", "--model", quick_run, *settings, cwd=tmp_path).stdout
    assert result.stdout == ours * 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "given", trust_remote_code=True)
    assert model.generation_config.do_sample and model.generation_config.top_p == 0.95


def test_interrupted_and_resumed_twice_is_the_same_run(quick_run: Path, tmp_path: Path) -> None:
    settings = ["--max_steps", 40, "--eval_steps", 20, "--save_steps", 20, "--residual_dropout", 0.1]
    whole = train(tmp_path, *settings, "--output_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    stop = ["--save_steps", 7]
    process = start_program("train_accelerate.py", *QUICK, *settings, *stop, "--output_dir", "parts", cwd=tmp_path)
    wait_for_steps(tmp_path / "parts", 9, process)
    process.kill()
    process.wait()
    assert not (tmp_path / "parts" / "final").exists()
    # Once more: a run that resumes, is killed, and resumes.
    process = start_program("train_accelerate.py", "--resume", "--output_dir", "parts", cwd=tmp_path)
    wait_for_steps(tmp_path / "parts", 24, process)
    process.kill()
    process.wait()
    result = run_program("train_accelerate.py", "--resume", "--output_dir", "parts", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [
        line["step"] for line in metrics(tmp_path / "whole")
    ]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_run_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = start_program(
        "train_accelerate.py", *QUICK, "--max_steps", ENDLESS, "--output_dir", "run", cwd=tmp_path, fresh=True
    )
    wait_for_steps(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    step = int(output.split("Stopped at step ")[1].split(";")[0])
    assert f"Go on:       python {ROOT}/train_accelerate.py --resume --output_dir run\n" in output
    # Nothing was evaluated yet, and there are curves and a model all the same.
    assert not (tmp_path / "run" / "best").exists() and (tmp_path / "run" / "curves.png").is_file()
    assert "--model run --prompt" in output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert (tmp_path / "run" / "checkpoints" / f"step_{step}" / "trainer_state.json").is_file()
    result = run_program(
        "train_accelerate.py", "--resume", "--output_dir", "run", "--max_steps", step + 3, cwd=tmp_path
    )
    assert result.returncode == 0 and f"Resuming at step {step}" in result.stdout, result.stderr


@pytest.mark.slow
def test_resume_without_a_name_takes_the_newest_run(tmp_path: Path) -> None:
    for name in ("runs/a", "runs/b"):
        assert train(tmp_path, "--max_steps", 3, "--output_dir", name).returncode == 0
    result = run_program("train_accelerate.py", "--resume", "--max_steps", 5, cwd=tmp_path)
    assert result.returncode == 0 and "Resuming at step 3" in result.stdout
    assert len(losses(tmp_path / "runs/b")) == 5 and len(losses(tmp_path / "runs/a")) == 3


@pytest.mark.slow
def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    for parts in (1, 4):
        result = train(
            tmp_path, "--max_steps", 10, "--gradient_accumulation_steps", parts, "--output_dir", f"parts{parts}"
        )
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "parts1") == pytest.approx(losses(tmp_path / "parts4"), abs=1e-4)


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    write_basic_config(save_location=tmp_path / "accelerate.json")
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "accelerate.json"]
        + ["--cpu", str(ROOT / "train_accelerate.py"), *QUICK, "--max_steps", "3"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**environment, "OMP_DISPLAY_ENV": "verbose"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "tiny-sample" / "final" / "model.safetensors").is_file()
    # The launcher sets OMP_NUM_THREADS to 1, and that is not what training runs with.
    cores = psutil.cpu_count(logical=False)
    assert f"1 x cpu with {cores} thread{'s' * (cores > 1)}, " in result.stdout
    assert "GOMP_SPINCOUNT = '10000'" in result.stderr  # as OpenMP itself says it


@pytest.mark.slow
@pytest.mark.parametrize("key", ["\x03", None], ids=["Ctrl-C", "wrong input"])
def test_the_launch_of_the_quickstart_shows_no_traceback_of_the_launcher(key: str | None, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "QUICKSTART.md").read_text(encoding="utf-8")
    (launch,) = re.findall(r"`\((trap '' INT; accelerate launch .*) train_accelerate\.py\)`", page)
    settings = [*QUICK, "--output_dir", "run", "--max_steps", str(ENDLESS) if key else "none"]
    command = f"({launch} {ROOT}/train_accelerate.py {shlex.join(settings)}); echo exit code $?"
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with pexpect.spawn(
        "bash", ["-c", command], cwd=tmp_path, env=environment, encoding="utf-8", timeout=200, dimensions=(24, 200)
    ) as terminal:
        if key is not None:
            terminal.expect("bits/byte")
            terminal.send(key)
        terminal.expect(r"exit code (\d+)")
        assert terminal.match[1] == "1", "that of accelerate with -q"
        assert ("Stopped at step" if key else "error: ") in terminal.before
        assert "Traceback" not in terminal.before and "KeyboardInterrupt" not in terminal.before


@pytest.mark.slow
def test_ctrl_c_on_several_processes_shows_no_traceback(tmp_path: Path) -> None:
    command = [str(ROOT / "train_accelerate.py"), *QUICK, "--num_processes", "2", "--output_dir", "run"]
    with pexpect.spawn(
        sys.executable, [*command, "--max_steps", "100000"], cwd=tmp_path, encoding="utf-8", timeout=200,
        dimensions=(24, 200), env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"},
        # A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as terminal:  # fmt: skip
        terminal.expect(r"2\S* x cpu with \S*1\S* thread \S*DDP")  # between them: colours
        terminal.expect("bits/byte")
        terminal.send("\x03")
        terminal.expect(pexpect.EOF)
        said = terminal.before
    assert terminal.exitstatus == 130, said
    assert said.count("Stopped at step") == 1
    assert "Traceback" not in said and "KeyboardInterrupt" not in said and "Interrupted" not in said
    assert len(states_of(tmp_path / "run")) == 1
    assert "num_processes" not in (tmp_path / "run" / "config.yaml").read_text(), "another time it may be another one"


@pytest.mark.slow
def test_char_tokenizer_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Über allen Gipfeln ist Ruh.\r\n" * 200, encoding="utf-8")
    arguments = [value if value != "sample" else "text.txt" for value in QUICK]
    result = run_program("train_accelerate.py", *arguments, "--tokenizer", "char", "--max_steps", 30, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "tiny-text"
    model = AutoModelForCausalLM.from_pretrained(run / "best", trust_remote_code=True)
    assert model.config.vocab_size == 8 + len(set("Über allen Gipfeln ist Ruh.\r\n"))
    written = run_program("generate.py", "--model", run, "--prompt", "Über", "--max_tokens", 40, cwd=tmp_path)
    assert written.returncode == 0 and written.stdout.startswith("Über")
    written = run_program("generate.py", "--model", run, "--prompt", "Über!?", "--max_tokens", 4, cwd=tmp_path)
    assert "(The model does not know '!' '?', and reads <|unk|> instead.)" in written.stderr


@pytest.mark.slow
def test_learned_merges_end_to_end(tmp_path: Path) -> None:
    arguments = ("--tokenizer", "bpe", "--vocab_size", 400, "--output_dir", "run", "--save_steps", 10)
    result = train(tmp_path, *arguments, "--max_steps", 20)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["tokenizer"], settings["vocab_size"]) == ("bpe", 400)
    evaluation = metrics(run)[-1]
    tokenizer = AutoTokenizer.from_pretrained(run / "best")
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(run / "best").config.vocab_size == 400
    assert "merges of them that were learned from the training text" in (run / "best" / "README.md").read_text()
    # A token stands for several bytes, and the bits are those of each byte.
    bits_per_token = evaluation["eval_loss"] / math.log(2)
    assert 3 < bits_per_token / evaluation["eval_bits_per_byte"] < 8
    result = run_program("train_accelerate.py", "--resume", "--max_steps", 24, "--output_dir", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(losses(run)) == 24
    result = run_program("train_accelerate.py", "--resume", "--vocab_size", 500, "--output_dir", "run", cwd=tmp_path)
    assert "was trained on another corpus: another tokenizer;" in one_sentence(result)
    written = run_program("generate.py", "--model", run, "--prompt", "The cat é", "--max_tokens", 9, cwd=tmp_path)
    assert written.returncode == 0 and written.stdout.startswith("The cat é")


BAD_INPUT = [
    (["--dataset", "missing.txt"], "There is no file or directory 'missing.txt'."),
    (["--dataset", "empty.txt"], "There is no text in 'empty.txt'."),
    (["--dataset", "short.txt"], "less than one context of 64"),
    (["--dataset", "letter.txt"], "'letter.txt' has 2 tokens, too few to train on some and hold some out."),
    (["--dataset", "latin1.txt", "--tokenizer", "char"], "latin1.txt is not valid UTF-8 at byte 1"),
    (["--dataset", "python-stdlbi"], "did you mean 'python-stdlib'?"),
    (["--size", "tinny"], "There is no preset 'tinny'; the presets are tiny, small, medium, large, gpt2, did you mean"),
    (["--num_attention_heads", "3"], "hidden_size (64) must be divisible by num_attention_heads (3)"),
    (["--tokenizer", "nonsense"], "--tokenizer 'nonsense' is neither byte, char nor bpe"),
    (
        ["--vocab_size", "300"],
        "vocab_size is the size that --tokenizer bpe learns: add that, or leave out --vocab_size",
    ),
    (["--tokenizer", "bpe", "--vocab_size", "264"], "vocab_size must be at least 265"),
    (["--tokenizer", "bpe", "--dataset", "letter.txt"], "The text can fill a vocabulary of 264"),
    (["--learning_rat", "1"], "There is no flag '--learning_rat', did you mean 'learning_rate'?"),
    (["--learning_rate", "fast"], "invalid float value: 'fast'"),
    (["--learning_rate", "-1"], "learning_rate must be above 0"),
    (["--max_steps", "0"], "max_steps must be at least 1"),
    (["--max_steps", "2"], "warmup_steps (2) must be less than max_steps (2)"),
    (["--train_batch_size", "7", "--gradient_accumulation_steps", "2"], "train_batch_size (7) must be divisible by"),
    (["--validation_ratio", "1.5"], "validation_ratio must be in (0, 1)"),
    (["--output_dir", "empty.txt/run"], "empty.txt"),
    (["--output_dir", "mine", "--overwrite"], "'mine' holds files that are not a run of Mini"),
    (["--config", "unknown.yaml"], "unknown.yaml has an unknown key 'learing_rate', did you mean 'learning_rate'?"),
    (["--config", "broken.yaml"], "broken.yaml is not valid YAML"),
    (["--config", "value.yaml"], "invalid int value: 'many'"),
    (["--config", "nowhere.yaml"], "There is no configuration file 'nowhere.yaml'."),
    (["--resume"], "There is no run under runs/ to resume"),
    (["--resume", "--output_dir", "mine"], "There is no run in 'mine' to resume"),
    (["--resume", "--overwrite", "--output_dir", "mine"], "There is no run in 'mine'"),
    (["stray"], "The argument 'stray' belongs to no flag."),
    (
        ["--dataset", "a.txt", "/dev/null"],
        "belongs to no flag; if it comes of a pattern such as *.txt, put",
    ),
    (["--dataset", ""], "dataset is empty"),
    (["--output_dir", ""], "output_dir is empty"),
    (["--model", ""], "model is empty"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[" ".join(arguments) for arguments, _ in BAD_INPUT])
def test_bad_input(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process, because each of these is over before a new one would have imported torch."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a short text of fifty letters")
    (tmp_path / "letter.txt").write_text("a")
    (tmp_path / "latin1.txt").write_bytes("aé".encode("latin-1") * 200)
    (tmp_path / "unknown.yaml").write_text("learing_rate: 1e-3\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "value.yaml").write_text("max_steps: many\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_accelerate.py", *QUICK, *arguments])
    with pytest.raises(SystemExit) as stopped:
        train_accelerate.main()
    assert message in one_sentence_of(stopped.value.code, capfd.readouterr().err)
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "runs"]
    assert left == [], "a run that never began leaves nothing"
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_a_run_is_never_overwritten_by_accident(tmp_path: Path) -> None:
    assert train(tmp_path, "--max_steps", 3).returncode == 0
    run = tmp_path / "runs" / "tiny-sample"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    sentence = one_sentence(train(tmp_path, "--max_steps", 3))
    assert "go on with it by --resume, replace it by --overwrite" in sentence
    # Nor by --overwrite with other bad input.
    one_sentence(train(tmp_path, "--max_steps", 3, "--overwrite", "--dataset", "missing.txt"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert train(tmp_path, "--max_steps", 4, "--overwrite").returncode == 0
    assert len(losses(run)) == 4


@pytest.mark.slow
def test_resume_on_another_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("first text " * 500)
    arguments = [value if value != "sample" else "text.txt" for value in QUICK]
    assert run_program("train_accelerate.py", *arguments, "--max_steps", 3, cwd=tmp_path).returncode == 0
    (tmp_path / "text.txt").write_text("other text " * 500)
    result = run_program("train_accelerate.py", "--resume", "--max_steps", 5, cwd=tmp_path)
    assert "was trained on another corpus: another content;" in one_sentence(result)
    # Another tokenizer is known before any data is looked at.
    result = run_program(
        "train_accelerate.py", "--resume", "--tokenizer", "char", "--dataset", "gone.txt", cwd=tmp_path
    )
    assert "was trained on another corpus: another tokenizer;" in one_sentence(result)


def test_resume_with_another_shape_is_refused(quick_run: Path, tmp_path: Path) -> None:
    shutil.copytree(quick_run, tmp_path / "run")
    settings = ("--resume", "--output_dir", "run", "--max_steps", 50)
    result = run_program("train_accelerate.py", *settings, "--hidden_size", 128, cwd=tmp_path)
    sentence = one_sentence(result)
    assert "hidden_size (was 64, now 128)" in sentence and "num_hidden_layers" not in sentence


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (["--optimizer", "adamw"], "optimizer (was muon, now adamw)"),
        (["--ema_decay", "0.9"], "average of the weights (was False, now True)"),
    ],
)
def test_resume_with_other_methods_is_refused(
    settings: list[str], change: str, quick_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(quick_run, tmp_path / "run")
    arguments = ("--resume", "--output_dir", "run", "--max_steps", 50, *settings)
    sentence = one_sentence(run_program("train_accelerate.py", *arguments, cwd=tmp_path))
    assert "cannot go on with other methods than it began with" in sentence and change in sentence


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_full_disk_ends_in_a_sentence_and_keeps_what_was_complete(tmp_path: Path) -> None:
    assert train(tmp_path, "--max_steps", 4, "--output_dir", "run").returncode == 0
    before = weights(tmp_path / "run")

    result = run_on_a_full_disk(tmp_path, "--resume", "--output_dir", "run", "--max_steps", 8)
    sentence = one_sentence(result)
    assert "could not be written" in sentence and "what was complete before is still there" in sentence
    assert all(torch.equal(tensor, weights(tmp_path / "run")[name]) for name, tensor in before.items())
    assert (tmp_path / "run" / "checkpoints" / "step_4" / "trainer_state.json").is_file()
    result = run_program("train_accelerate.py", "--resume", "--output_dir", "run", "--max_steps", 8, cwd=tmp_path)
    assert result.returncode == 0 and "Resuming at step 4" in result.stdout
