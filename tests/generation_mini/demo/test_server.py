"""The server of the page, without a browser."""

import errno
import json
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cards_mini import Facts, render
from generation_mini import demo
from generation_mini.demo import server
from generation_mini.demo.arguments import DemoArguments
from generation_mini.demo.server import LARGEST_BODY, MOST_TOKENS, make_app, public_link
from generation_mini.demo.writing import Author
from modeling_mini import compiled_decoding
from modeling_mini.native_code import compile_library
from starlette.testclient import TestClient
from tokenization import CHAT_TEMPLATE


def lines(response: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_page_and_its_files(author: Author) -> None:
    client = TestClient(make_app(author, "a <b> & co"))
    page = client.get("/")
    assert "<title>Mini: a &lt;b&gt; &amp; co</title>" in page.text and "A language model of" in page.text
    for name, kind in (("page.css", "text/css"), ("page.js", "javascript"), ("details.js", "javascript")):
        assert kind in client.get(f"/{name}").headers["content-type"]
    assert client.get("/writer.js").status_code == 200 and client.get("/server.py").status_code == 404


def test_the_page_of_an_adapter_says_what_the_adapter_learned(author: Author, tmp_path: Path) -> None:
    facts = Facts(kind="adapter", dataset="questions", base="prose", prompts=["Who wrote"])
    (tmp_path / "README.md").write_text(render(facts, {}, {}))
    page = TestClient(make_app(author, "name", str(tmp_path))).get("/").text
    assert "fine-tuned from prose on questions" in page and '"prompts": ["Who wrote"]' in page


def test_it_writes_and_looks(author: Author) -> None:
    client = TestClient(make_app(author, "name"))
    events = lines(client.post("/write", json={"prompt": "the ", "max_new_tokens": 5, "temperature": 0, "seed": 1}))
    assert "read" in events[0] and events[-1]["end"]["tokens"] == 5
    ids = events[0]["read"]["ids"]
    events = lines(client.post("/write", json={"ids": ids, "first": 12, "max_new_tokens": 5}))
    assert events[0]["pieces"][0]["tokens"][0]["id"] == 12 and events[-1]["end"]["tokens"] == 5
    assert client.post("/look", json={"ids": ids, "token": 12}).json()["lens"]


def test_a_conversation_is_read_in_turns_and_the_oldest_leave(author: Author) -> None:
    author.tokenizer.chat_template = CHAT_TEMPLATE
    author.model.generation_config.eos_token_id = [2, 7]
    client = TestClient(make_app(author, "name"))
    assert '"is_chat": true' in client.get("/").text
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    request = {"messages": [*turns, {"role": "user", "content": "go <a>"}], "max_new_tokens": 5}
    (read,) = (event["read"] for event in lines(client.post("/write", json=request)) if "read" in event)
    read = author.tokenizer.decode(read["ids"])
    assert "hi" in read and "yes" in read and read.endswith("<|assistant|>") and "go <a>" in read
    request["messages"] = turns * 8 + [{"role": "user", "content": "go"}]
    events = lines(client.post("/write", json=request))
    assert "The oldest" in events[0]["notice"] and "were not read" in events[0]["notice"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("write", "nothing", "Expecting value"),
        ("write", "[]", "must be a JSON object"),
        ("write", "[" * 100_000, "nested too deeply"),
        pytest.param("write", "a" * (LARGEST_BODY + 1), "A request must have 4,194,304 bytes at", id="too large"),
        ("write", "{}", "messages must be of the user and the assistant in turns"),
        ("write", '{"prompt": 1}', "The prompt must be text"),
        ("write", '{"prompt": "\\ud800"}', "not valid UTF-8 at character 0"),
        ("write", '{"prompt": "a", "temperature": "x"}', "temperature must be a number, got 'x'"),
        ("write", '{"prompt": "a", "top_k": 1.5}', "top_k must be a whole number, got 1.5"),
        ("write", '{"prompt": "a", "top_p": 7}', "top_p must be"),
        ("write", f'{{"prompt": "a", "max_new_tokens": {MOST_TOKENS + 1}}}', "max_new_tokens must be at most 2000"),
        ("write", '{"ids": []}', "at least one token"),
        ("write", '{"ids": [1, 9999], "first": 3}', "A token is a number from 0 to"),
        ("write", '{"ids": [1]}', "A token is a number from 0 to"),
        ("write", '{"messages": ["go"]}', "messages must be of the user and the assistant in turns"),
        ("write", '{"messages": [{"role": "user", "content": 1}]}', "content of a message must be text"),
        ("write", '{"messages": [{"role": "assistant", "content": "a"}]}', "and end with the user's"),
        ("look", '{"ids": [1], "token": true}', "A token is a number"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_in_a_sentence(author: Author, path: str, body: str, message: str) -> None:
    response = TestClient(make_app(author, "name")).post(f"/{path}", content=body)
    assert response.status_code == 400 and message in response.json()["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "port must be from 1 to 65535, got 0"),
        (["--model", "./none"], "There is no run or checkpoint folder './none'"),
        (["--modle", "a"], "did you mean 'model'?"),
        (["--model", "a/b", "--host", "300.0.0.1"], "The page cannot be at host '300.0.0.1' and port 7860"),
    ],
)
@pytest.mark.parametrize("module", ["generation_mini.demo", "modeling_mini.demo"])
def test_bad_input(
    module: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and message in errors and errors.count("\n") == 1


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Known before anything is loaded."""
    monkeypatch.setattr(server, "serve", lambda *arguments: pytest.fail("it began to load"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["demo", "--model", "user/name", "--port", str(port)])
        with pytest.raises(SystemExit) as stopped:
            demo.main()
    assert stopped.value.code == 2
    sentence = f"error: port {port} is taken by another program: choose another one by --port.\n"
    assert capsys.readouterr().err == sentence
    with demo.listen("127.0.0.1", port), pytest.raises(OSError) as refused:
        socket.create_server(("127.0.0.1", port)).close()
    assert refused.value.errno == errno.EADDRINUSE


@pytest.mark.slow
def test_it_writes_by_the_function_that_was_compiled_before(
    quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_CACHE", str(tmp_path))
    monkeypatch.setattr(uvicorn.Server, "run", lambda *arguments, **sockets: None)
    authors: list[Author] = []

    def keep(author: Author, *others: object) -> object:
        authors.append(author)
        return make_app(author, *others)

    monkeypatch.setattr(server, "make_app", keep)
    texts = []
    for _ in range(2):
        with demo.listen("127.0.0.1", 0) as held:
            server.serve(DemoArguments(model=str(quick_run)), held)
        body = {"prompt": "the ", "max_new_tokens": 100, "seed": 1}
        events = lines(TestClient(make_app(authors[-1], "name")).post("/write", json=body))
        texts.append([piece["text"] for event in events for piece in event.get("pieces", [])])
        compile_library(compiled_decoding.NAME, compiled_decoding.SOURCE)
    assert [author.model.compiled_step is not None for author in authors] == [False, True]
    assert texts[0] == texts[1] and len(texts[0]) > 20


def test_a_run_without_a_model_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    monkeypatch.setattr(sys, "argv", ["demo", "--model", str(run)])
    with pytest.raises(SystemExit):
        demo.main()
    assert "has no model yet: the first one is saved at the first evaluation" in capsys.readouterr().err


@pytest.mark.slow
def test_a_public_link_is_made_by_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio import networking

    asked = []
    monkeypatch.setattr(networking, "setup_tunnel", lambda *arguments: asked.append(arguments) or "https://a.example")
    assert public_link(demo.DemoArguments(port=7000)) == "https://a.example" and asked[0][:2] == ("127.0.0.1", 7000)

    def fail(*arguments: object) -> str:
        raise RuntimeError("no network")

    monkeypatch.setattr(networking, "setup_tunnel", fail)
    with pytest.raises(ValueError, match="Gradio gave no public link \\(no network\\): leave out --share"):
        public_link(demo.DemoArguments())
