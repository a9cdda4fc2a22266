"""Prompts from a file: every one once, in order, the same after any interruption."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_mini import batch_file
from generation_mini.__main__ import main
from generation_mini.arguments import GenerationArguments
from generation_mini.batch_file import BatchFile, read_finished, read_prompts
from generation_mini.text_generation import Continuation, write_on
from helpers.exports import random_model
from helpers.programs import one_sentence, run_program, start_program
from tokenization import BpeTokenizer, ByteTokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = [
    "the " * (1 + index % 7) + str(index) + random.Random(index).choice(["", " é漢", "\t", "  "]) for index in range(40)
]
SAMPLING = ("--max_new_tokens", 12, "--batch_size", 4, "--seed", 5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return tmp_path


def batch(run: Path, folder: Path, *arguments: object, prompts: str = "prompts.txt"):
    return run_program(
        "generate.py", "--model", run, "--batch_file", prompts, "--output", "out.jsonl", *arguments, cwd=folder
    )


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_prompt_once_and_in_order(quick_run: Path, folder: Path) -> None:
    result = batch(quick_run, folder, "--temperature", 0, "--max_new_tokens", 12, "--batch_size", 7, "--stats")
    assert result.returncode == 0, result.stderr
    lines = lines_of(folder)
    assert [line["index"] for line in lines] == list(range(40))
    assert [line["prompt"] for line in lines] == PROMPTS
    assert result.stdout == "" and "tokens/s, the first after" in result.stderr
    for line in lines[::13]:
        alone = run_program(
            *("generate.py", "--model", quick_run, "--prompt", line["prompt"], "--temperature", 0),
            *("--max_new_tokens", 12), cwd=folder,
        )  # fmt: skip
        (text,) = line["texts"]
        assert alone.stdout == line["prompt"] + text["text"] + "\n"
        assert text["finish_reason"] in ("length", "end") and 0 <= text["tokens"] <= 12


@pytest.mark.slow
def test_jsonl_prompts_in_several_ways_and_stop(quick_run: Path, folder: Path) -> None:
    prompts = ["one\ntwo ", "", "three"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each, "id": 1}) + "\n" for each in prompts))
    result = batch(quick_run, folder, *SAMPLING, "--num_return_sequences", 3, "--stop", "e", prompts="prompts.jsonl")
    assert result.returncode == 0, result.stderr
    lines = lines_of(folder)
    assert [line["prompt"] for line in lines] == prompts
    texts = [text for line in lines for text in line["texts"]]
    assert len(texts) == 9 and len({text["text"] for text in texts}) > 3
    assert not any("e" in text["text"] for text in texts) and any(text["finish_reason"] == "stop" for text in texts)


@pytest.mark.slow
def test_interrupted_work_goes_on_and_ends_with_the_same_file(quick_run: Path, folder: Path) -> None:
    assert batch(quick_run, folder, *SAMPLING).returncode == 0
    whole = (folder / "out.jsonl").read_bytes()
    again = batch(quick_run, folder, *SAMPLING)
    assert "40 of 40 prompts are done already" in again.stderr
    assert (folder / "out.jsonl").read_bytes() == whole, "a call that has nothing to do changes nothing"

    # As an interruption leaves it: whole batches in the order of the work, one batch cut short, half a line.
    lines = whole.splitlines(keepends=True)
    by_length = sorted(range(40), key=lambda index: (len(PROMPTS[index].encode()), index))
    written = b"".join(lines[index] for index in by_length[:14])
    (folder / "out.jsonl").write_bytes(written + lines[by_length[14]][:25])
    result = batch(quick_run, folder, *SAMPLING)
    assert result.returncode == 0 and "14 of 40 prompts are done already" in result.stderr
    assert (folder / "out.jsonl").read_bytes() == whole


@pytest.fixture(scope="module")
def model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    return random_model(vocab_size=len(tokenizer)), tokenizer


def write_here(model: tuple, folder: Path, prompts: list[str], **settings: object) -> list[str]:
    """One call in this process; gives its notices."""
    (folder / "prompts.txt").write_text("".join(f"{each}\n" for each in prompts), encoding="utf-8")
    arguments = GenerationArguments(**{
        "batch_file": str(folder / "prompts.txt"), "output": str(folder / "out.jsonl"), "max_new_tokens": 8,
        "batch_size": 4, **settings,
    })  # fmt: skip
    notices: list[str] = []
    BatchFile(arguments).write(*model, notices.append)
    return notices


def test_prompts_that_end_in_a_space_of_the_next_word(model: tuple, tmp_path: Path) -> None:
    merges = BpeTokenizer.train(["def a(x): return a\n" * 50], 274)
    random = random_model(vocab_size=len(merges))
    prompts = ["def ", "def", "return "]
    advice = "in a space, which the model knows as a part of the next word: leave it"
    assert f"2 prompts end {advice} out." in write_here((random, merges), tmp_path, prompts)
    (tmp_path / "out.jsonl").unlink()
    assert f"1 prompt ends {advice} out." in write_here((random, merges), tmp_path, prompts[:2])
    (tmp_path / "out.jsonl").unlink()
    assert not [notice for notice in write_here(model, tmp_path, prompts) if "space" in notice]


@pytest.mark.parametrize("seed", [5, None])
def test_prompts_that_were_added_are_written_and_all_else_stays(model: tuple, tmp_path: Path, seed: int | None) -> None:
    """Also a second and third time, duplicates among them, and shorter than all others."""
    write_here(model, tmp_path, PROMPTS[:10], seed=seed)
    before = (tmp_path / "out.jsonl").read_bytes()
    for added in (["a"], ["", PROMPTS[3], PROMPTS[3]], PROMPTS[10:16]):
        prompts = [*(line["prompt"] for line in lines_of(tmp_path)), *added]
        notices = write_here(model, tmp_path, prompts, seed=seed)
        assert f"{len(prompts) - len(added)} of {len(prompts)} prompts are done already." in notices
        after = (tmp_path / "out.jsonl").read_bytes()
        assert after.startswith(before) and [line["prompt"] for line in lines_of(tmp_path)] == prompts
        assert [line["index"] for line in lines_of(tmp_path)] == list(range(len(prompts)))
        before = after


def test_a_file_of_an_earlier_version_stays_byte_by_byte(model: tuple, tmp_path: Path) -> None:
    """Its lines say `ended_by`, and name no batch."""
    write_here(model, tmp_path, PROMPTS[:6], seed=1)
    old = []
    for line in lines_of(tmp_path):
        del line["batch"]
        line["texts"] = [{"text": t["text"], "tokens": t["tokens"], "ended_by": "length"} for t in line["texts"]]
        old.append(f"{json.dumps(line)}\n")
    (tmp_path / "out.jsonl").write_text("".join(old))
    write_here(model, tmp_path, PROMPTS[:7], seed=1)
    assert (tmp_path / "out.jsonl").read_text().startswith("".join(old)) and len(lines_of(tmp_path)) == 7


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1, 4, 6, 12, 13])
def test_cut_short_anywhere_with_prompts_added_since(model: tuple, tmp_path: Path, kept: int) -> None:
    """What is written stays, and every prompt has one text; without more prompts, the file is that of one call."""
    write_here(model, tmp_path, PROMPTS[:13], seed=5)
    whole = (tmp_path / "out.jsonl").read_bytes()
    lines = {json.loads(line)["index"]: line for line in whole.splitlines(keepends=True)}
    written = [lines[index] for index in sorted(lines, key=lambda index: (len(PROMPTS[index].encode()), index))][:kept]
    for prompts in (PROMPTS[:13], PROMPTS[:15]):
        (tmp_path / "out.jsonl").write_bytes(b"".join(written) + b'{"index": 3, "pro')
        write_here(model, tmp_path, prompts, seed=5)
        assert [line["prompt"] for line in lines_of(tmp_path)] == prompts
        assert set(written) <= set((tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True))
        if len(prompts) == 13:
            assert (tmp_path / "out.jsonl").read_bytes() == whole
    write_here(model, tmp_path, PROMPTS[:15], seed=5)


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        (["one", "two"], {}, "holds a text for prompt 3, and .* has 2 prompts: name another output"),
        (
            ["one", "2", "three"],
            {},
            r"\(prompt 2 is the first that differs\): add prompts at the end only, or",
        ),
        (["one", "three", "two"], {}, "prompt 2 is the first that differs"),
        (["zero", "one", "two", "three"], {}, "prompt 1 is the first that differs"),
        (["one", "two", "three", "one"], {"seed": 2}, "by another model or with other settings: name another output"),
        (["one", "two", "three"], {"batch_size": 2}, "by another model or with other settings"),
        (["one", "two", "three"], {"max_new_tokens": 9}, "by another model or with other settings"),
        (["one", "two", "three"], {"stop": ["a"]}, "by another model or with other settings"),
    ],
)
def test_other_changes_are_refused(
    model: tuple, tmp_path: Path, prompts: list[str], settings: dict, words: str
) -> None:  # fmt: skip
    write_here(model, tmp_path, ["one", "two", "three"], seed=1)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=words):
        write_here(model, tmp_path, prompts, **{"seed": 1, **settings})
    assert (tmp_path / "out.jsonl").read_bytes() == before


def written_lines(*changed: dict) -> bytes:
    line = {"index": 0, "prompt": "a", "texts": [], "settings": "x"}
    return "".join(json.dumps({**line, **each}) + "\n" for each in changed).encode()


@pytest.mark.parametrize(
    "content",
    [b"my diary", b"my diary\n", b"[1]\n", b"\xff\n", written_lines({"index": -1}), written_lines({"index": "0"})],
)
def test_files_of_others_are_not_taken_for_texts(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="holds something else than texts"):
        read_finished(tmp_path / "out.jsonl")


def test_a_prompt_that_two_calls_have_written_counts_once(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_bytes(written_lines({}, {"index": 1}, {"settings": "y"}))
    finished = read_finished(tmp_path / "out.jsonl")
    assert {index: line.settings for index, line in finished.items()} == {0: "y", 1: "x"}


def test_prompts_as_other_systems_write_them(tmp_path: Path) -> None:
    """With a byte order mark and two characters for the end of a line; one of them alone belongs to a prompt."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\r\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "", "two\rthree"]
    (tmp_path / "prompts.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n')
    assert read_prompts(tmp_path / "prompts.jsonl") == ["one"]


@pytest.mark.slow
def test_what_a_prompt_loses_is_said_and_a_link_stays(quick_run: Path, folder: Path) -> None:
    (folder / "prompts.txt").write_text("x" * 100 + "\na\n")
    (folder / "out.jsonl").symlink_to("elsewhere.jsonl")
    result = batch(quick_run, folder, *SAMPLING)
    assert "(1 prompt is longer than the context of 64 tokens: only the end is used.)" in result.stderr
    assert (folder / "out.jsonl").is_symlink() and len(lines_of(folder)) == 2
    for output in (".", "/dev/null"):
        arguments = GenerationArguments(batch_file=str(folder / "prompts.txt"), output=output)
        with pytest.raises(ValueError, match="output must be a file"):
            BatchFile(arguments)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(
    quick_run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pressed in the third batch; the rest is written by the same call."""
    monkeypatch.chdir(folder)
    arguments = ["--model", str(quick_run), "--batch_file", "prompts.txt", "--output", "out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, *map(str, SAMPLING)])
    main()
    whole = (folder / "out.jsonl").read_bytes()
    os.remove(folder / "out.jsonl")
    calls: list[int] = []

    def write_twice(*args: Any, **kwargs: Any) -> list[Continuation]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_on(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(batch_file, "write_on", write_twice)
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code == 130
    assert "(8 of 40 prompts are done; the same call again goes on with the rest.)" in capsys.readouterr().err
    main()
    assert (folder / "out.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_killed_at_any_instant(quick_run: Path, folder: Path) -> None:
    arguments = ["--model", quick_run, "--batch_file", "prompts.txt", "--output", "out.jsonl", "--batch_size", 1]
    arguments += ["--max_new_tokens", 60, "--min_new_tokens", 60, "--seed", 1]
    seen = 0
    for _ in range(3):
        process = start_program("generate.py", *arguments, cwd=folder)
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            output = folder / "out.jsonl"
            if output.exists() and output.read_bytes().count(b"\n") > seen:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = (folder / "out.jsonl").read_bytes().count(b"\n")
        assert seen > 0
    assert run_program("generate.py", *arguments, cwd=folder).returncode == 0
    killed = (folder / "out.jsonl").read_bytes()
    os.remove(folder / "out.jsonl")
    assert run_program("generate.py", *arguments, cwd=folder).returncode == 0
    assert (folder / "out.jsonl").read_bytes() == killed
    assert sorted(path.name for path in folder.iterdir()) == ["out.jsonl", "prompts.txt"]


@pytest.mark.slow
def test_what_does_not_belong_together(quick_run: Path, folder: Path) -> None:
    assert batch(quick_run, folder, *SAMPLING).returncode == 0
    whole = (folder / "out.jsonl").read_bytes()
    assert "was written by another model or with other settings" in one_sentence(
        batch(quick_run, folder, *SAMPLING, "--temperature", 0.5)
    )
    (folder / "other.txt").write_text("\n".join([*PROMPTS[:5], "new", *PROMPTS[6:]]), encoding="utf-8")
    assert "prompt 6 is the first that differs" in one_sentence(
        batch(quick_run, folder, *SAMPLING, prompts="other.txt")
    )
    assert (folder / "out.jsonl").read_bytes() == whole
    (folder / "out.jsonl").write_text("my diary")
    assert "holds something else than texts of generate.py" in one_sentence(batch(quick_run, folder, *SAMPLING))
    assert (folder / "out.jsonl").read_text() == "my diary"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "There is no file 'none.txt' of prompts."),
        ("empty.txt", b"", "empty.txt holds no prompts."),
        ("latin.txt", b"a\nM\xfcnchen\n", "latin.txt is not valid UTF-8 at byte 3."),
        ("bad.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'bad.jsonl, line 2: it must have the form {"prompt"'),
        ("half.jsonl", b'{"prompt": "\\ud83c"}\n', 'half.jsonl, line 1: it must have the form {"prompt"'),
        ("out.jsonl", b'{"prompt": "a"}\n', "output must be another file than batch_file"),
    ],
)
def test_bad_prompts(quick_run: Path, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in one_sentence(batch(quick_run, tmp_path, prompts=name))
