"""generate.py as a user types it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import files_mini
import peft
import pexpect
import pytest
import torch
from generation_mini.__main__ import main
from helpers import fork_server
from helpers.programs import ROOT, one_sentence, run_program
from modeling_mini import MiniConfig, MiniForCausalLM
from modeling_mini.loading.checkpoints import load_model
from tokenization import ByteTokenizer, CharTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig


def generate(run: Path, *arguments: object, **settings: object):
    return run_program("generate.py", "--model", run, *arguments, cwd=run.parent.parent, **settings)


def test_default_model_is_the_newest_run(quick_run: Path) -> None:
    result = run_program("generate.py", "--prompt", "the ", "--max_new_tokens", 10, cwd=quick_run.parent.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the ") and len(result.stdout) > 5
    assert result.stderr == ""


@pytest.mark.slow
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


def test_standard_input_is_taken_byte_for_byte(
    quick_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(data: bytes, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(quick_run), "--max_tokens", "1", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        main()

    write(b"a\r\nb\rc")
    assert capsys.readouterr().out.startswith("a\r\nb\rc")
    for data, prompt, message in (
        (b"a\xff", [], "error: Standard input is not valid UTF-8 at byte 1.\n"),
        (b"", ["--prompt", os.fsdecode(b"a\xff")], "error: The prompt is not valid UTF-8 at character 1.\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            write(data, *prompt)
        assert (stopped.value.code, *capsys.readouterr()) == (2, "", message)
    monkeypatch.setattr(sys, "stdin", None)  # as `generate.py <&-` leaves it
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(quick_run), "--max_tokens", "1"])
    main()


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["at the end", "stream"])
def test_a_reader_that_has_enough_is_no_error(
    stream: list[str], quick_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `generate.py ... | head -1` does; nor is what Python writes out when it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(quick_run), "--prompt", "a", *stream])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 141 and capsys.readouterr().err == ""


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


@pytest.mark.parametrize("content", ["{}", "{", '{"version": "1.0", "added_tokens": [], "model": 3}'])
def test_damaged_tokenizer(broken, content: str) -> None:
    folder = broken(lambda folder: (folder / "tokenizer.json").write_text(content))
    with pytest.raises(ValueError, match=r"tokenizer"):
        load_model(str(folder))


def test_model_of_another_family_without_a_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1, bos_token_id=1, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--prompt", "abc", "--max_tokens", "5", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    main()
    assert capsys.readouterr().out.startswith("abc")


def test_impossible_configuration(broken) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 7}))

    assert "num_attention_heads (2) must be divisible by num_key_value_heads (7)" in one_sentence(
        generate(broken(change))
    )


def test_what_is_no_model(
    quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files_mini, "BOX", {name: tmp_path / "stripped" / name for name in files_mini.BOX})
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == (
        "error: There is no trained model under runs/: train one first, or name it by --model.\n"
    )
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


@pytest.mark.slow
def test_stop_and_stats(quick_run: Path) -> None:
    plain = generate(quick_run, "--prompt", "the ", "--temperature", 0, "--max_tokens", 60)
    stop = plain.stdout[30:33]
    for stream in ([], ["--stream"]):
        result = generate(
            quick_run, "--prompt", "the ", "--temperature", 0, "--max_tokens", 60, "--stop", stop, "--stats", *stream
        )
        assert result.stdout == plain.stdout[: plain.stdout.index(stop, 4)] + "\n"
        assert re.fullmatch(r"\(\d+ tokens in [\d.]+ s: [\d,]+ tokens/s, the first after \d+ ms\.\)\n", result.stderr)


@pytest.mark.slow
def test_assistant_drafts_and_changes_nothing(quick_run: Path, tmp_path: Path) -> None:
    arguments = ("--prompt", "the ", "--temperature", 0, "--max_tokens", 100)
    plain = generate(quick_run, *arguments)
    for stream in ([], ["--stream"]):
        assert generate(quick_run, *arguments, "--assistant", quick_run / "final", *stream).stdout == plain.stdout
    CharTokenizer.from_text("abc").save_pretrained(tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(quick_run / "best" / name, tmp_path / "other")
    assert "has another tokenizer than the model" in one_sentence(
        generate(quick_run, *arguments, "--assistant", tmp_path / "other")
    )


@pytest.mark.slow
def test_dtype_and_device(quick_run: Path) -> None:
    model, _ = load_model(str(quick_run), dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    arguments = ("--prompt", "the ", "--max_tokens", 20, "--temperature", 0)
    plain = generate(quick_run, *arguments)
    result = generate(quick_run, *arguments, "--dtype", "bfloat16", "--device", "cpu")
    assert result.returncode == 0 and result.stdout[:10] == plain.stdout[:10]
    assert "There is no device 'cuda:99' here; there is cpu" in one_sentence(generate(quick_run, "--device", "cuda:99"))
    assert "There is no device 'gpu' here" in one_sentence(generate(quick_run, "--device", "gpu"))


@pytest.mark.slow
def test_compile(quick_run: Path) -> None:
    arguments = ("--prompt", "the ", "--max_tokens", 40, "--temperature", 0)
    compiled = generate(quick_run, *arguments, "--compile")
    assert (compiled.returncode, compiled.stderr) == (0, ""), compiled.stderr
    assert compiled.stdout == generate(quick_run, *arguments, "--compile", "false").stdout
    quantized = generate(quick_run, *arguments, "--compile", "--load_in_8bit")
    assert (quantized.returncode, quantized.stderr) == (0, ""), quantized.stderr
    assert quantized.stdout == generate(quick_run, *arguments, "--compile", "false", "--load_in_8bit").stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantized(quick_run: Path, kind: str) -> None:
    model, _ = load_model(str(quick_run), quantization=kind)
    layer = {"8bit": bitsandbytes.nn.Linear8bitLt, "4bit": bitsandbytes.nn.Linear4bit}[kind]
    assert type(model.model.layers[0].mlp.down_proj) is layer and type(model.lm_head) is torch.nn.Linear
    result = generate(quick_run, "--prompt", "the ", "--max_tokens", 20, f"--load_in_{kind}")
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("the ")
    assert len(result.stdout) > 10


def test_int4_of_a_shape_that_would_be_wrong_is_refused(broken) -> None:
    def change(folder: Path) -> None:
        config = MiniConfig.preset("tiny", num_hidden_layers=1, intermediate_size=80)
        MiniForCausalLM(config).save_pretrained(folder)

    folder = broken(change)
    sentence = one_sentence(generate(folder, "--load_in_4bit"))
    assert (
        "model.layers.0.mlp.gate_proj (80 x 128)" in sentence and "model.layers.0.mlp.down_proj (128 x 80)" in sentence
    )
    assert "q_proj" not in sentence


@pytest.mark.slow
def test_a_quantized_folder_is_written_by_a_command_and_takes_no_flag(quick_run: Path, tmp_path: Path) -> None:
    command = [
        fork_server.python(),
        "-m",
        "modeling_mini.quantize",
        str(quick_run),
        str(tmp_path / "int4"),
        "--load_in_4bit",
    ]
    written = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (written.returncode, written.stderr) == (0, ""), written.stderr
    assert re.fullmatch(r".*int4: 0\.1 MB of weights\n", written.stdout)
    arguments = ("--prompt", "the ", "--max_tokens", 20, "--temperature", 0)
    result = generate(tmp_path / "int4", *arguments)
    assert (result.returncode, result.stderr) == (0, "") and len(result.stdout) > 10
    model, tokenizer = load_model(str(quick_run), quantization="4bit")
    output = model.generate(**tokenizer("the ", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert result.stdout == tokenizer.decode(output[0], skip_special_tokens=True) + "\n"


@pytest.fixture(scope="module")
def adapter(quick_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that has learned to write z and nothing else, and says which model it belongs to."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    base = AutoModelForCausalLM.from_pretrained(quick_run / "best")
    # With a task_type, as every guide of peft gives it. Without one an adapter names the class of its base, which
    # AutoPeftModelForCausalLM imports only with `import_allowlist=["modeling_mini.modeling_mini"]`.
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4, lora_alpha=16)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config)
    tokenizer = AutoTokenizer.from_pretrained(quick_run / "best")
    ids = tokenizer("the " + 40 * "z", return_tensors="pt").input_ids
    labels = ids.masked_fill(ids != ids[0, -1], -100)
    optimizer = torch.optim.Adam([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.03)
    for _ in range(60):
        adapted(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # With room to spare, for INT4 too.
    best, second = adapted(ids).logits[0, 4:].topk(2).values.unbind(-1)
    assert (adapted(ids).logits[0, 4:].argmax(-1) == ids[0, -1]).all() and (best - second).min() > 0.1, best - second
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_adapter(quick_run: Path, adapter: Path) -> None:
    arguments = ("--prompt", "the ", "--max_tokens", 30, "--temperature", 0)
    learned = "the " + 30 * "z" + "\n"
    plain = generate(quick_run, *arguments)
    assert plain.returncode == 0 and plain.stdout != learned
    named = generate(quick_run, *arguments, "--adapter", adapter)
    assert (named.returncode, named.stdout, named.stderr) == (0, learned, "")
    assert generate(adapter, *arguments).stdout == learned
    quantized = generate(quick_run, *arguments, "--adapter", adapter, "--load_in_4bit")
    assert (quantized.returncode, quantized.stdout, quantized.stderr) == (0, learned, "")


@pytest.mark.slow
def test_adapter_that_does_not_fit(quick_run: Path, adapter: Path, broken, tmp_path: Path) -> None:
    other = broken(
        lambda folder: MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1)).save_pretrained(folder)
    )
    sentence = one_sentence(generate(other, "--adapter", adapter))
    assert f"which was trained on {str(quick_run / 'best')!r}, does not fit {str(other)!r}" in sentence
    for model, of, message in (
        (adapter, adapter, "is an adapter itself"),
        (quick_run, tmp_path, "holds no trained model"),
        (quick_run, tmp_path / "none", "No adapter could be loaded from"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(str(model), str(of))


class Terminal:
    """The interactive mode on a pseudo-terminal."""

    def __init__(self, run: Path, *arguments: object) -> None:
        command = [str(ROOT / "generate.py"), "--model", str(run), "--interactive", *map(str, arguments)]
        self.process = pexpect.spawn(
            fork_server.python(), command, encoding="utf-8", timeout=60, dimensions=(50, 200),
            # A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        self.process.expect("Ctrl-D ends")
        self.greeting = self.process.before
        self.prompt()

    def prompt(self) -> str:
        """Waits for the prompt and returns what came before it."""
        self.process.expect("\r\n> ")
        return self.process.before

    def say(self, line: str) -> str:
        self.process.sendline(line)
        return self.prompt()


@pytest.mark.slow
def test_interactive(quick_run: Path) -> None:
    terminal = Terminal(quick_run, "--max_new_tokens", 20, "--seed", 0)
    assert "continues what you write" in terminal.greeting
    assert len(terminal.say("the cat")) > len("the cat")
    help_text = terminal.say("/help")
    assert "/reset" in help_text and "Ctrl-C" in help_text
    assert "temperature = 0.7" in terminal.say("/set temperature 0.7")
    assert "top_p must be in (0, 1]" in terminal.say("/set top_p 7")
    assert "max_new_tokens must be a whole number, got 'many'" in terminal.say("/set max_new_tokens many")
    assert "did you mean '/reset'?" in terminal.say("/rest")
    assert "forgotten" in terminal.say("/reset")
    settings = terminal.say("/settings")
    assert "temperature = 0.7" in settings and "top_p = 0.95 (the model's)" in settings
    terminal.process.sendeof()
    terminal.process.expect(pexpect.EOF)
    terminal.process.close()
    assert terminal.process.exitstatus == 0


@pytest.mark.slow
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


@pytest.mark.slow
def test_lines_are_edited_and_remembered(quick_run: Path) -> None:
    """By the keys that every shell has."""
    up, left, home, backspace = "\x1b[A", "\x1b[D", "\x01", "\x7f"
    terminal = Terminal(quick_run, "--max_new_tokens", 5)
    assert "temperature = 0.7" in terminal.say("/set temperature 0.8" + backspace + "7")
    assert "top_k = 3" in terminal.say("set top_k 3" + home + "/")
    assert "min_p = 0.25" in terminal.say("/set min_p 0.5" + left + "2")
    assert "min_p = 0.25" in terminal.say(up)
    assert "top_k = 3" in terminal.say(up + up)
    assert "top_k = 50 (the model's)" in terminal.say("/set top_k default")
    terminal.process.close()


@pytest.mark.slow
def test_the_user_is_told_when_the_oldest_turns_leave(quick_run: Path) -> None:
    terminal = Terminal(quick_run, "--max_new_tokens", 10)
    answers = [terminal.say(f"turn {number} and more") for number in range(5)]
    assert not any("leave" in answer or "left." in answer for answer in answers[:2])
    assert "The oldest turn does not fit the context of 64 tokens, and left." in "".join(answers[2:])
    assert "The prompt has 101 tokens and the context 64" in terminal.say("x" * 100)
    terminal.process.close()


def test_a_chat_model_answers_in_turns(broken) -> None:
    def change(folder: Path) -> None:
        config = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))

    terminal = Terminal(broken(change), "--max_new_tokens", 10, "--stats")
    assert "answers in turns" in terminal.greeting
    assert "tokens/s, the first after" in terminal.say("hello")
    terminal.process.close()
