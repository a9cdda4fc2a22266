"""transformers' own server and chat on a checkpoint of Mini, over loopback."""

import asyncio
import contextlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import openai
import pexpect
import pytest
import torch
import transformers
from generation_mini import transformers_cli
from generation_mini.serving.models import ServedModels
from helpers import fork_server
from helpers.programs import ROOT, free_port
from modeling_mini import MiniForCausalLM, compiled_decoding
from modeling_mini.loading.checkpoints import load_model
from modeling_mini.native_code import compile_library
from tokenization.chat import encode_messages
from transformers.cli import transformers as stock_command

COMMAND = ["-m", "generation_mini.transformers_cli"]  # of Python
NAME = "model"  # as it is typed at the start of the server
MESSAGES = [{"role": "user", "content": "the cat"}]


def with_mini() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def checkpoint(quick_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that says it can chat, with plain text as the likeliest answer."""
    folder = tmp_path_factory.mktemp("chat") / NAME
    shutil.copytree(quick_run / "best", folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))
    return folder


@contextlib.contextmanager
def serving(name: str | None, place: Path, folder: Path, *flags: str) -> Iterator[str]:
    """The address of a server that was started in `place`, while it runs; its log goes to `folder`."""
    port = free_port()
    log = folder / "log"
    environment = {**with_mini(), "HF_HOME": str(folder)}
    with log.open("w") as file:
        process = subprocess.Popen(
            [fork_server.python(), *COMMAND, "serve", *([name] if name else []), "--port", str(port), *flags],
            cwd=place, env=environment, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while True:
            try:
                with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(NAME, checkpoint.parent, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("is_adapter", [False, True])
def test_it_writes_by_the_function_that_was_compiled_before(
    is_adapter: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    # As the command does. There are two modules of that name where a test has imported the server, which reloads it.
    for module in (transformers, sys.modules["transformers"]):
        monkeypatch.setattr(module, "MiniForCausalLM", MiniForCausalLM, raising=False)
    name = "box-chat" if is_adapter else str(checkpoint)
    used = []
    for _ in range(2):
        models = ServedModels(force_model=name)
        model = models._load_model(models.process_model_name(name))
        used.append(model.compiled_step is not None)
        compile_library(compiled_decoding.NAME, compiled_decoding.SOURCE)
    assert used == [False, True]


@pytest.mark.slow
def test_an_adapter_is_loaded_as_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    monkeypatch.setattr(
        "generation_mini.serving.models.load_model",
        lambda checkpoint, **settings: (asked.append(settings), load_model(checkpoint))[1],
    )
    ServedModels(force_model="box-chat", dtype="bfloat16", device="cpu", quantization="bnb-8bit")
    expected = {"dtype": torch.bfloat16, "device": "cpu", "quantization": "8bit", "trust_remote_code": False}
    assert asked and all(settings == expected for settings in asked)


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def continuation(checkpoint: Path | str, prompt: str | list[dict]) -> str:
    """What the model writes greedily, without a server."""
    model, tokenizer = load_model(str(checkpoint))
    if isinstance(prompt, str):
        ids = torch.tensor([tokenizer(prompt).input_ids])
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    output = model.generate(ids, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(text) > 5
    return text


@pytest.mark.slow
def test_completions(client: openai.OpenAI, checkpoint: Path) -> None:
    arguments = {"model": NAME, "prompt": "the ", "max_tokens": 20, "temperature": 0}
    expected = continuation(checkpoint, "the ")
    answer = client.completions.create(**arguments)
    assert answer.choices[0].text == expected and answer.usage.completion_tokens == 20
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**arguments, stream=True)]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 3


@pytest.mark.slow
def test_chat_completions(client: openai.OpenAI, checkpoint: Path) -> None:
    arguments = {"model": NAME, "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    expected = continuation(checkpoint, MESSAGES)
    answer = client.chat.completions.create(**arguments)
    assert answer.choices[0].message.content == expected
    chunks = client.chat.completions.create(**arguments, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 3


@pytest.mark.slow
def test_the_model_has_the_name_that_was_typed(client: openai.OpenAI, checkpoint: Path) -> None:
    (model,) = client.models.list()
    assert model.id == NAME
    for name in (NAME, str(checkpoint)):
        answer = client.completions.create(model=name, prompt="the ", max_tokens=2)
        assert answer.model == NAME
    with pytest.raises(openai.BadRequestError, match="pinned to 'model'; requested 'gpt-9'"):
        client.completions.create(model="gpt-9", prompt="the ")


@pytest.mark.slow
def test_stop_is_left_out_of_the_text(client: openai.OpenAI, checkpoint: Path) -> None:
    expected = continuation(checkpoint, "the ")
    stop = expected[4:7]
    before = expected[: expected.index(stop)]
    arguments = {"model": NAME, "max_tokens": 20, "temperature": 0, "stop": ["never", stop]}
    (choice,) = client.completions.create(prompt="the ", **arguments).choices
    assert (choice.text, choice.finish_reason) == (before, "stop")
    chunks = [chunk.choices[0] for chunk in client.completions.create(prompt="the ", stream=True, **arguments)]
    assert "".join(chunk.text for chunk in chunks) == before and chunks[-1].finish_reason == "stop"
    # Where the prompt ends is no part of the text.
    arguments |= {"stop": ["e " + expected[0], "never"]}
    assert client.completions.create(prompt="the ", **arguments).choices[0].text[:2] == expected[:2]
    of_chat = continuation(checkpoint, MESSAGES)
    arguments |= {"stop": of_chat[3:6], "messages": MESSAGES}
    before = of_chat[: of_chat.index(of_chat[3:6])]
    (choice,) = client.chat.completions.create(**arguments).choices
    assert (choice.message.content, choice.finish_reason) == (before, "stop")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **arguments)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == before
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.slow
def test_lists_of_prompts_and_several_choices(client: openai.OpenAI, checkpoint: Path) -> None:
    arguments = {"model": NAME, "max_tokens": 20, "prompt": ["the ", "a "]}
    answer = client.completions.create(**arguments, temperature=0)
    assert [choice.text for choice in answer.choices] == [continuation(checkpoint, text) for text in ("the ", "a ")]
    arguments |= {"n": 3, "seed": 1, "echo": True}
    answer = client.completions.create(**arguments)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6)) and len(set(texts)) == 6
    assert [text.startswith(prompt) for text, prompt in zip(texts, ["the "] * 3 + ["a "] * 3, strict=True)] == [
        True
    ] * 6
    assert answer.usage.completion_tokens == 6 * 20
    assert answer.usage.prompt_tokens == 5 + 3, "each prompt once"
    assert [choice.text for choice in client.completions.create(**arguments).choices] == texts


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI, checkpoint: Path) -> None:
    arguments = {"model": NAME, "prompt": "the ", "max_tokens": 3, "temperature": 0}
    (choice,) = client.completions.create(**arguments, echo=True, logprobs=2).choices
    model, tokenizer = load_model(str(checkpoint))
    ids = torch.tensor([tokenizer(choice.text).input_ids])  # bos, and the text
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].log_softmax(-1)
    expected = scores.gather(1, ids[0, 1:, None])[:, 0].tolist()
    found = choice.logprobs
    assert found.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert "".join(found.tokens) == choice.text and found.text_offset == list(range(7))
    for place, best in enumerate(found.top_logprobs):
        assert list(best.values()) == pytest.approx(scores[place].topk(2).values.tolist(), abs=1e-4)
    (new,) = client.completions.create(**arguments, logprobs=0).choices
    assert new.logprobs.tokens == found.tokens[4:] and new.logprobs.top_logprobs is None
    assert new.logprobs.token_logprobs == pytest.approx(expected[4:], abs=1e-4)
    (scored,) = client.completions.create(**{**arguments, "max_tokens": 0}, echo=True, logprobs=0).choices
    assert scored.text == "the " and scored.logprobs.token_logprobs == pytest.approx(expected[:4], abs=1e-4)


@pytest.mark.slow
def test_a_text_ends_where_the_context_is_full(client: openai.OpenAI) -> None:
    arguments = {"model": NAME, "prompt": "the ", "max_tokens": 500, "temperature": 0}
    answer = client.completions.create(**arguments)
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 64
    last = list(client.completions.create(**arguments, stream=True))[-1]
    assert last.choices[0].finish_reason == "length" and last.usage.total_tokens == 64
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0)
    assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 64
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="has 101 tokens, and the context of this model holds 64"):
            client.completions.create(model=NAME, prompt="a" * 100, stream=stream)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n": 0}, "n must be a whole number from 1 to 128, got 0."),
        ({"n": 2, "stream": True}, "n, echo, logprobs and a list of prompts do not work with stream."),
        ({"logprobs": 9}, "logprobs must be a whole number from 0 to 5, got 9."),
        ({"prompt": [1, 2]}, "prompt must be a text or a list of texts"),
        ({"best_of": 3}, "best_of does not work here, got 3: leave it out."),
        ({"presence_penalty": 0.5}, "presence_penalty does not work here"),
        ({"stop": [""]}, "stop must be a text or a list of texts that are not empty"),
        ({"max_tokens": -1}, "max_tokens must be a whole number from 0"),
        ({"temperature": -1}, "temperature must be a number that is not negative, got -1."),
        ({"top_p": 0}, "top_p must be a number above 0, and 1 at most, got 0."),
        ({"frequency_penalty": -2}, "frequency_penalty must be a number above -1, got -2."),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"temperature": 1e-300}, "No token can be drawn, because the probabilities are not numbers"),
        ({"temperature": 10**400}, "temperature must be finite, got 1000"),
        ({"logit_bias": {"5": 100}}, "logit_bias does not work here, got {'5': 100}: leave it out."),
        ({"suffix": ["a"]}, "suffix must be a text, got ['a']."),
        ({"extra_body": {"generation_config": "x"}}, "generation_config must be the text of a JSON object, got 'x'."),
        ({"extra_body": {"generation_config": {}}}, "generation_config must be the text of a JSON object, got {}."),
        ({"extra_body": {"generation_config": '{"temperature": -5}'}}, "`temperature` (=-5) has to be a strictly pos"),
        ({"extra_body": {"generation_config": '{"max_new_tokens": "a"}'}}, "generation_config has settings that do n"),
        ({"extra_body": {"generation_config": '{"do_sample": true, "min_p": "a"}'}}, "generation_config has settings"),
        ({"extra_body": {"generation_config": '{"stop_strings": 5}'}}, "stop must be a text or a list of texts"),
        ({"extra_body": {"generation_config": '{"num_return_sequences": 2}'}}, "num_return_sequences does not work"),
        ({"extra_body": {"generation_config": '{"return_dict_in_generate": true}'}}, "return_dict_in_generate does"),
        ({"extra_body": {"generation_config": '{"watermarking_config": 5}'}}, "generation_config has settings that d"),
        ({"extra_body": {"generation_config": '{"num_beams": -1}'}}, "generation_config has settings that do not fit"),
        ({"extra_body": {"generation_config": '{"assistant_early_exit": 1}'}}, "assistant_early_exit does not work"),
        ({"extra_body": {"generation_config": '{"num_beams": 2}'}, "stream": True}, "num_beams must be 1 with stream"),
        (
            {"stop": "a", "extra_body": {"generation_config": '{"num_beams": 2}'}},
            "num_beams must be 1 with stop",
        ),
        ({"extra_body": {"stream": "false"}}, "stream must be true or false, got 'false'."),
        ({"echo": "yes"}, "echo must be true or false, got 'yes'."),
        ({"max_tokens": 0, "stream": True}, "max_tokens must be a whole number from 1"),
    ],
)
def test_what_does_not_work_is_refused_with_a_reason(client: openai.OpenAI, settings: dict, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(reason)):
        client.completions.create(**{"model": NAME, "prompt": "the ", "max_tokens": 2, **settings})


@pytest.mark.slow
def test_a_stream_ends_as_the_text_does_that_is_none(client: openai.OpenAI, checkpoint: Path) -> None:
    """With the reason, where the last token that may be written ends it, and with what is no character."""
    expected = continuation(checkpoint, "the ")
    place = max(map(expected.index, expected))  # of a character that was not there before
    ends = {"do_sample": False, "eos_token_id": ord(expected[place]) + 8}
    halves = {"do_sample": False, "sequence_bias": [[[0xC3 + 8], 1000.0]]}
    for settings, length, text, reason in (
        (ends, place + 1, expected[: place + 1], "stop"), (halves, 3, "\ufffd" * 3, "length"),
    ):  # fmt: skip
        arguments = {"model": NAME, "prompt": "the ", "max_tokens": length, "temperature": 0}
        arguments["extra_body"] = {"generation_config": json.dumps(settings)}
        (choice,) = client.completions.create(**arguments).choices
        assert (choice.text, choice.finish_reason) == (text, reason)
        chunks = [chunk.choices[0] for chunk in client.completions.create(**arguments, stream=True)]
        assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (text, reason)


@pytest.mark.slow
def test_an_error_in_a_stream_is_a_sentence(client: openai.OpenAI) -> None:
    from generation_mini.serving.generating import StreamError  # above, it would load transformers twice

    with pytest.raises(openai.APIError) as failed:
        list(client.completions.create(model=NAME, prompt="the ", max_tokens=2, temperature=1e-300, stream=True))
    assert failed.value.body.startswith("No token can be drawn, because the probabilities are not numbers")
    assert json.loads(f'"{StreamError(chr(10).join(["no", chr(34), chr(92)])).msg}"') == "no ' /"


@pytest.mark.slow
def test_a_seed_is_that_of_its_request(client: openai.OpenAI) -> None:
    """Also while others write: their seeds are not its own."""
    arguments = {"model": NAME, "prompt": "the ", "max_tokens": 50, "temperature": 1}

    def text(seed: int) -> str:
        return client.completions.create(**arguments, seed=seed).choices[0].text

    def streamed(seed: int) -> str:
        chunks = client.completions.create(**arguments, seed=seed, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    alone = [text(seed) for seed in range(8)]
    assert len(set(alone)) == 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(text, range(8))) == alone
        assert list(pool.map(streamed, range(8))) == alone


def content(*parts: object) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n": 2}, "n does not work here, got 2: leave it out."),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs does not work here|top_logprobs does not work here"),
        ({"response_format": {"type": "json_object"}}, "response_format does not work here"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"messages": []}, "messages must be a list of objects with role and content, and not empty"),
        ({"messages": "Hello"}, "messages must be a list of objects"),
        ({"messages": [{"role": "user"}]}, "messages must be a list of objects"),
        ({"messages": [{"role": "robot", "content": "Hello"}]}, "The chat template refuses the messages: .* got robot"),
        ({"messages": [{"role": "user", "content": 5}]}, "A message needs a content: text, or a list of parts"),
        (content("a"), "A message is text, and a part of it that is not cannot be read: 'a'"),
        (content({"type": "text"}), "A message is text, and a part of it that is not cannot be read"),
        (content({"type": "image_url", "image_url": {"url": "x"}}), "a part of it that is not cannot be read"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "tool_calls do not work here"),
        ({"extra_body": {"chat_template_kwargs": "x"}}, "chat_template_kwargs must be an object with settings"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": False}}}, "chat_template_kwargs must be an object"),
        ({"extra_body": {"chat_template_kwargs": {"load_audio_from_video": 1}}}, "chat_template_kwargs must be an ob"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": 1}}}, "chat_template_kwargs must be an object"),
        ({"extra_body": {"stream": "no"}}, "stream must be true or false, got 'no'"),
        ({"logit_bias": {"5": 100}}, "logit_bias does not work here"),
    ],
)
def test_so_it_is_in_chats(client: openai.OpenAI, settings: dict, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.chat.completions.create(**{"model": NAME, "messages": MESSAGES, "max_tokens": 2, **settings})
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0, "user": "me", "stream": False}
    neutral["extra_body"] = {"chat_template_kwargs": None, "stop": None}
    assert client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=2, **neutral).choices


@pytest.mark.slow
def test_what_looks_like_the_end_of_a_turn_stays_text(client: openai.OpenAI, checkpoint: Path) -> None:
    """As in a conversation in the terminal."""
    messages = [{"role": "user", "content": "the <|end|> and <|assistant|>"}]
    model, tokenizer = load_model(str(checkpoint))
    ids = encode_messages(tokenizer, messages, add_generation_prompt=True)[0]
    output = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=9, temperature=0)
    assert answer.usage.prompt_tokens == len(ids) > 30
    assert answer.choices[0].message.content == tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.slow
def test_responses_are_what_chats_are(client: openai.OpenAI, checkpoint: Path) -> None:
    arguments = {"model": NAME, "max_output_tokens": 20, "temperature": 0}
    expected = continuation(checkpoint, MESSAGES)
    parts = [{"type": "input_text", "text": "the "}, {"type": "input_text", "text": "cat"}]
    for given in ("the cat", MESSAGES, parts, [{"role": "user", "content": parts}]):
        assert client.responses.create(input=given, **arguments).output_text == expected
    with client.responses.stream(input="the cat", **arguments) as stream:
        assert "".join(each.delta for each in stream if each.type == "response.output_text.delta") == expected
    with_system = continuation(checkpoint, [{"role": "system", "content": "Answer."}, *MESSAGES])
    assert client.responses.create(input="the cat", instructions="Answer.", **arguments).output_text == with_system


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"input": ""}, "input must be a text or a list of objects with role and content, and not empty"),
        ({"input": [5]}, "a part of it that is not cannot be read: 5"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "that is not cannot be",
        ),
        ({"input": [{"role": "user", "content": "a"}, {"type": "function_call_output"}]}, "input must be a text or a"),
        ({"instructions": 5}, "instructions must be a text, got 5"),
        ({"previous_response_id": "a"}, "previous_response_id does not work here, got 'a': leave it out"),
        ({"text": {"format": {"type": "json_object"}}}, "text does not work here"),
        ({"max_output_tokens": 0}, "max_output_tokens must be a whole number from 1"),
        ({"temperature": -1}, "temperature must be a number that is not negative"),
        ({"model": "other/model"}, "other/model"),
    ],
)
def test_so_it_is_in_responses(client: openai.OpenAI, settings: dict, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.responses.create(**{"model": NAME, "input": "a", **settings})


JSON = "application/json"
FORM = "multipart/form-data; boundary=x"
SPEECH = b"""--x\r
Content-Disposition: form-data; name="model"\r
\r
model\r
--x\r
Content-Disposition: form-data; name="file"; filename="a.wav"\r
\r
RIFF\r
--x--\r
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "reason"),
    [
        ("v1/audio/transcriptions", b"", FORM, 400, "This is a model of text: it cannot transcribe speech."),
        ("v1/audio/transcriptions", SPEECH, FORM, 400, "This is a model of text: it cannot transcribe speech."),
        ("load_model", b'{"model": 5}', JSON, 400, "model must be a text, got 5."),
        ("load_model", b'{"model": "other/model"}', JSON, 400, "This server has the model 'model', and not 'other/"),
        ("load_model", b"{}", JSON, 422, "Missing `model` field"),
        ("v1/systemone", b"{}", JSON, 422, "state: Field required; questions: Field required"),
        ("v1/completions", b"[1]", JSON, 400, "The request must be a JSON object."),
        ("v1/completions", b"{", JSON, 400, "The request must be a JSON object."),
        ("v1/embeddings", b"{}", JSON, 404, "There is no /v1/embeddings here"),
    ],
)
def test_other_addresses_answer_with_a_reason(
    server: str, path: str, body: bytes, kind: str, status: int, reason: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{server}/{path}", body, {"Content-Type": kind}))
    assert refused.value.code == status and json.load(refused.value)["error"]["message"].startswith(reason)


@pytest.mark.slow
def test_a_server_of_any_model_says_where_there_is_none(tmp_path: Path) -> None:
    """One that was started without a name loads what a request names."""
    with serving(None, tmp_path, tmp_path) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="There is no such model: "):
            client.completions.create(model="other/model", prompt="a")
        for name in (None, 5):
            with pytest.raises(openai.BadRequestError, match=f"model must be a text, got {name}"):
                client.completions.create(model=name, prompt="a")
            with pytest.raises(openai.BadRequestError, match=f"model must be a text, got {name}"):
                client.chat.completions.create(model=name, messages=MESSAGES)
        with pytest.raises(openai.NotFoundError, match="There is no such model: "):
            client.audio.transcriptions.create(model="other/model", file=("a.wav", b"RIFF"))
        with pytest.raises(openai.BadRequestError, match="The form must have the fields file and model: file is miss"):
            client.post(
                "/audio/transcriptions",
                cast_to=object,
                body={"model": "a"},
                options={"headers": {"Content-Type": "multipart/form-data"}},
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "request_body", "reason"),
    [
        ("completions", {"prompt": "the \ud800"}, "The prompt is not valid UTF-8 at character 4."),
        ("completions", {"prompt": "the ", "model": "\ud800"}, "Server is pinned to 'model'; requested '?'."),
        ("completions", {"prompt": "the \ud800", "stream": True}, "The prompt is not valid UTF-8 at character 4."),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "A message is not valid UTF-8 at"),
    ],
)
def test_half_of_a_character_is_refused(server: str, path: str, request_body: dict, reason: str) -> None:
    """Which the library `openai` does not send, and JSON can hold."""
    body, kind = json.dumps({"model": NAME, **request_body}).encode(), {"Content-Type": "application/json"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{server}/v1/{path}", body, kind))
    assert refused.value.code == 400 and json.load(refused.value)["error"]["message"].startswith(reason)


@pytest.mark.slow
def test_a_message_may_come_back_as_clients_send_it(client: openai.OpenAI) -> None:
    """With the parts that OpenAI's protocol has, and with keys that hold nothing."""
    arguments = {"model": NAME, "max_tokens": 9, "temperature": 0}
    answer = client.chat.completions.create(messages=MESSAGES, **arguments)
    message = {**MESSAGES[0], "content": [{"type": "text", "text": MESSAGES[0]["content"]}], "tool_calls": None}
    again = client.chat.completions.create(messages=[message], **arguments)
    assert again.choices[0].message.content == answer.choices[0].message.content


@pytest.mark.slow
def test_requests_that_share_batches(tmp_path: Path) -> None:
    """`--continuous-batching`, with the adapter that comes with Mini, by its name."""
    with serving("box-chat", tmp_path, tmp_path, "--continuous-batching") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        arguments = {"model": "box-chat", "max_tokens": 20, "temperature": 0}
        # Refused, and so not the first one by which all others are sampled.
        with pytest.raises(openai.BadRequestError, match="stop does not work with --continuous-batching"):
            client.completions.create(**{**arguments, "prompt": "a", "stop": "x", "temperature": 0.5})
        prompts = ["def read_lines(", "import ", "class Stack"]
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda prompt: client.completions.create(prompt=prompt, **arguments), prompts))
        assert [answer.choices[0].text for answer in answers] == [continuation("box-chat", text) for text in prompts]
        question = [{"role": "user", "content": "What does os.path.join do?"}]
        answer = client.chat.completions.create(messages=question, **arguments)
        assert answer.choices[0].message.content == continuation("box-chat", question)
        long = client.chat.completions.create(messages=question, **{**arguments, "max_tokens": 200})
        whole = long.usage.completion_tokens  # with the token that ends it
        assert long.choices[0].finish_reason == "stop" and whole < 200
        for most, reason in {whole: "stop", whole - 1: "length"}.items():
            short = {**arguments, "messages": question, "max_tokens": most}
            assert client.chat.completions.create(**short).choices[0].finish_reason == reason
            *_, last = client.chat.completions.create(stream=True, **short)
            assert last.choices[0].finish_reason == reason
        refused = {
            "stop does not work with --continuous-batching": {"stop": "x"},
            "logprobs do not work with --continuous-batching": {"logprobs": 1},
            "seed does not work with --continuous-batching": {"seed": 1, "temperature": 1},
            "do_sample is False on this server, and cannot be True": {"temperature": 1},
        }
        for reason, settings in refused.items():
            with pytest.raises(openai.BadRequestError, match=reason):
                client.completions.create(**{**arguments, "prompt": "a", **settings})


@pytest.mark.parametrize("name", ["OneByOne", "InBatches"])
def test_a_request_ends_with_its_client(name: str) -> None:
    # Not above: to import the server reloads transformers.
    from generation_mini.serving import generating
    from generation_mini.serving.server import build_server, stock_build_server

    manager, in_batches = getattr(generating, name)(), name == "InBatches"
    begun, ended = threading.Event(), threading.Event()

    def generate(input_ids: torch.Tensor, stopping_criteria: list[Callable], **settings: object) -> torch.Tensor:
        begun.set()
        while not all(criterion(input_ids, None).all() for criterion in stopping_criteria):
            time.sleep(0.001)
        ended.set()
        return input_ids

    model = SimpleNamespace(generate=generate, config=None)
    config = transformers.GenerationConfig(do_sample=False)
    config.seed_of_request = None
    inputs = {"input_ids": [1] if in_batches else torch.ones(1, 1, dtype=torch.long)}
    if in_batches:
        manager.first = config
        manager._cb = SimpleNamespace(
            background_thread_status=SimpleNamespace(fatal_error=None),
            register_result_handler=lambda request_id, handler: None,
            add_request=lambda *ids, **settings: begun.set(),
            cancel_request=lambda request_id: ended.set(),
        )

    async def handle_request(body: dict, request_id: str) -> None:
        await manager.generate_non_streaming(model, None, inputs, config, request_id=request_id)

    async def receive() -> dict:
        if not begun.is_set() and not body:
            body.append(True)
            return {"type": "http.request", "body": b"{}"}
        while not begun.is_set():
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    async def ask() -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        await asyncio.wait_for(app(scope, receive, send), timeout=10)
        assert await asyncio.to_thread(ended.wait, 10)
        if not in_batches:
            await manager.async_submit(bool)  # when its thread has come back

    body: list[bool] = []
    sent: list[dict] = []
    handlers = dict.fromkeys(inspect.signature(stock_build_server).parameters)
    handlers |= {"completion_handler": SimpleNamespace(handle_request=handle_request), "enable_cors": False}
    app = build_server(**handlers)
    asyncio.run(ask())
    assert not sent


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_request_that_is_too_large_is_refused_before_it_is_read(
    is_announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from generation_mini.serving import server  # as above

    monkeypatch.setattr(server, "LARGEST_BODY", 1000)
    handlers = dict.fromkeys(inspect.signature(server.stock_build_server).parameters) | {"enable_cors": False}
    pieces: list[bytes] = []
    sent: list[dict] = []

    async def receive() -> dict:
        if len(pieces) == 9:
            await asyncio.Event().wait()  # for a client that stays
        pieces.append(bytes(400))
        return {"type": "http.request", "body": pieces[-1], "more_body": len(pieces) < 9}

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), *[(b"content-length", b"1001")] * is_announced]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    asyncio.run(server.build_server(**handlers)(scope, receive, send))
    assert sent[0]["status"] == 413 and len(pieces) == (0 if is_announced else 3)
    error = json.loads(sent[1]["body"])["error"]
    assert error == {
        "message": "A request must have 1,000 bytes at most.", "type": "invalid_request_error", "param": None,
        "code": None,
    }  # fmt: skip


@pytest.mark.slow
def test_the_example_of_the_page(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "SERVING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert "http://localhost:8000" in block and '"runs/tiny-python-stdlib"' in block
    exec(block.replace("http://localhost:8000", server).replace("runs/tiny-python-stdlib", NAME), {})
    output = capsys.readouterr().out
    assert output.startswith(f"{NAME}\n") and output.count("def ") == 2 and output.count("bits per token") == 1


@pytest.mark.slow
def test_chat_in_the_terminal(server: str, checkpoint: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "chat", str(checkpoint), server, "max_new_tokens=8", "--user", "me"]
    # Offline, huggingface_hub refuses every request, also this one to our own machine.
    environment = {**with_mini(), "HF_HUB_OFFLINE": "0"}
    chat = pexpect.spawn(
        fork_server.python(), command, env=environment, encoding="utf-8", timeout=60, dimensions=(50, 200), cwd=tmp_path
    )
    chat.expect("was already loaded")
    chat.expect("me")
    chat.sendline("hello")
    chat.expect("tokens in")
    chat.expect("Continue generating")  # eight tokens are few
    chat.sendline("n")
    chat.expect("me")
    chat.sendline("!exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


def test_chat_before_the_server_is_there() -> None:
    port = free_port()
    for place in ([], [f"http://localhost:{port}"]):
        command = [fork_server.python(), *COMMAND, "chat", "runs/mine", *place, "--user", "me"]
        done = subprocess.run(command, env=with_mini(), capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: No server answers at {place[0] if place else 'http://localhost:8000'}: ")
        assert "`mini-transformers serve runs/mine`" in done.stderr


@pytest.mark.parametrize("address", ["http://localhost:port", "http://[x"])
def test_chat_with_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{re.escape(address)}' is no address of a server: Invalid .*\.$"):
        transformers_cli.check(["chat", "runs/mine", address])


def test_what_is_no_model(tmp_path: Path) -> None:
    result = subprocess.run(
        [fork_server.python(), *COMMAND, "serve", str(tmp_path)],
        env=with_mini(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "holds no trained model" in result.stderr


def test_a_package_that_only_a_server_needs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.cli import serve

    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    monkeypatch.setattr(transformers, "MiniForCausalLM", None, raising=False)  # put back as it was
    monkeypatch.setattr(sys, "argv", ["mini-transformers", "serve", str(checkpoint)])
    with pytest.raises(SystemExit) as ended:
        transformers_cli.main()
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*pip install .*\n", capsys.readouterr().err)


def test_the_list_of_commands_is_that_of_transformers() -> None:
    assert set(transformers_cli.COMMANDS) == set(stock_command.app.commands)


def test_help_of_a_command_is_that_of_transformers_and_loads_no_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers_cli, "add_mini", lambda: pytest.fail("help needs no model"))
    monkeypatch.setattr("sys.argv", ["mini-transformers", "serve", "--help"])
    with pytest.raises(SystemExit) as stop:
        transformers_cli.main()
    assert stop.value.code == 0 and "--port" in capsys.readouterr().out
