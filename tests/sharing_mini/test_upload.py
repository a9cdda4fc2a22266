"""The real client against a Hub on loopback: protocol, faults at each step, and the sentences they end in."""

import json
import logging
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.hub_server import Fault, HubServer, Repository
from huggingface_hub import CommitOperationAdd, HfApi, constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sharing_mini.arguments import SharingArguments
from sharing_mini.pushing import Result, push
from transformers import AutoModelForCausalLM

NAME = "user/name"
STEPS = [
    ("GET", "/api/whoami"),
    ("GET", "/api/models/user/name$"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/api/repos/create"),
    ("GET", "/tree/"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs-storage/"),
    ("POST", "/objects/verify"),
    ("POST", "/commit/"),
    ("GET", "/refs"),
    ("POST", "/tag/"),
]
STEP_NAMES = [path.strip("/$").replace("/", "-") for _, path in STEPS]


def share(folder: Path, name: str = NAME, notices: list[str] | None = None, **settings: object) -> Result:
    """A push that does not load the model: that is tested elsewhere, and takes seconds."""
    arguments = SharingArguments(**{"license": "mit", "no_verify": True, **settings})
    return push(str(folder), name, arguments, (notices if notices is not None else []).append)


def refused(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and "hf_aaa" not in sentence
    return sentence


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_commit_holds_all_files(hub: HubServer, model: Path) -> None:
    result = share(model, tag="v1", commit_message="First")
    repository = hub.model(NAME)
    assert repository.history() == ["First", "initial commit"]
    pushed = repository.files()
    assert pushed.pop("README.md") == result.card.encode()
    assert set(pushed) - set(files_of(model)) == {".gitattributes"}
    assert {name: pushed[name] for name in files_of(model)} == files_of(model)
    assert repository.tags == {"v1": repository.resolve("main")} == {"v1": result.pushed.commit}
    assert result.pushed.url == f"{hub.url}/{NAME}" and not repository.private


@pytest.mark.slow
def test_the_same_again_sends_nothing(hub: HubServer, model: Path) -> None:
    share(model, tag="v1")
    received, commits = hub.received, hub.count("POST", "/commit/")
    result = share(model, tag="v1")
    assert result.pushed.was_there and result.pushed.commit == hub.model(NAME).resolve("main")
    assert (hub.received, hub.count("POST", "/commit/")) == (received, commits)


@pytest.mark.slow
def test_a_change_sends_what_changed(hub: HubServer, model: Path) -> None:
    share(model)
    received = hub.received
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    share(model, commit_message="Cooler")
    assert hub.model(NAME).history() == ["Cooler", "Upload model", "initial commit"]
    assert hub.received == received
    assert hub.model(NAME).files()["generation_config.json"] == b'{"temperature": 0.5}'


@pytest.mark.slow
def test_private_and_organization(hub: HubServer, model: Path) -> None:
    share(model, "team/name", private=True)
    assert hub.model("team/name").private
    share(model, "team/name")  # what is private stays so
    assert hub.model("team/name").private and hub.model("team/name").history()[0] == "Upload model"


@pytest.mark.slow
def test_what_is_public_is_not_pushed_to_as_private(hub: HubServer, model: Path) -> None:
    share(model)
    (model / "generation_config.json").write_text("{}")
    assert "exists and is public: push without --private" in refused(lambda: share(model, private=True))
    assert len(hub.model(NAME).history()) == 2


@pytest.mark.slow
def test_branch(hub: HubServer, model: Path) -> None:
    share(model)
    (model / "generation_config.json").write_text("{}")
    result = share(model, revision="try/two", commit_message="Two")
    repository = hub.model(NAME)
    assert repository.history("try/two") == ["Two", "Upload model", "initial commit"]
    assert repository.history() == ["Upload model", "initial commit"]
    assert 'revision="try/two"' in result.card and repository.resolve("try/two") == result.pushed.commit


@pytest.mark.slow
def test_pull_request(hub: HubServer, model: Path) -> None:
    share(model)
    (model / "generation_config.json").write_text("{}")
    result = share(model, create_pr=True, commit_message="Please")
    repository = hub.model(NAME)
    assert repository.history() == ["Upload model", "initial commit"]
    assert repository.files("refs/pr/1")["generation_config.json"] == b"{}"
    assert result.pushed.url.endswith("/discussions/1") and "revision=" not in result.card
    again = share(model, create_pr=True, commit_message="Please")
    assert again.pushed.was_there and len(repository.pull_requests) == 1


@pytest.mark.slow
def test_pull_request_to_others(hub: HubServer, model: Path) -> None:
    hub.users["hf_" + "b" * 34] = "other"
    share(model)
    (model / "generation_config.json").write_text("{}")
    other = {"token": "hf_" + "b" * 34}
    sentence = refused(lambda: share(model, **other))
    assert "may not write to 'user/name' (403" in sentence and "push to other/name" in sentence
    assert "--create_pr" in sentence
    share(model, create_pr=True, **other)
    assert hub.model(NAME).pull_requests[1]["author"] == "other"
    assert "There is no repository 'user/none'" in refused(lambda: share(model, "user/none", create_pr=True))


@pytest.mark.slow
def test_pull_request_whose_answer_is_lost(hub: HubServer, model: Path, waits: list[float]) -> None:
    share(model)
    (model / "generation_config.json").write_text("{}")
    hub.faults.append(Fault("POST", "/commit/", "after"))
    result = share(model, create_pr=True)
    assert len(hub.model(NAME).pull_requests) == 1 and result.pushed.url.endswith("/discussions/1")


@pytest.mark.slow
def test_shards(hub: HubServer, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    share(model, max_shard_size="100KB")
    files = hub.model(NAME).files()
    index = json.loads(files["model.safetensors.index.json"])
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) >= 3 and "model.safetensors" not in files and set(index["weight_map"]) == set(tensors)
    share(model, commit_message="Whole")
    files = hub.model(NAME).files()
    assert "model.safetensors" in files and not any("-of-" in name or "index" in name for name in files)
    assert hub.model(NAME).history()[0] == "Whole"


@pytest.mark.slow
def test_other_files_of_the_repository_stay(hub: HubServer, model: Path) -> None:
    share(model)
    api = HfApi(token=hub.token)
    api.create_commit(NAME, [CommitOperationAdd("notes.txt", b"mine")], commit_message="Notes")
    (model / "generation_config.json").write_text("{}")
    share(model)
    assert hub.model(NAME).files()["notes.txt"] == b"mine"


def test_large_files_go_up_in_parts(hub: HubServer, model: Path) -> None:
    hub.part_size = 50_000
    share(model)
    assert hub.count("PUT", "/lfs-parts/") == -(-(model / "model.safetensors").stat().st_size // 50_000)
    assert hub.model(NAME).files()["model.safetensors"] == (model / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["status", "page", "429", "before", "middle", "after"])
@pytest.mark.parametrize("step", STEPS, ids=STEP_NAMES)
def test_one_fault_at_any_step_does_no_harm(
    hub: HubServer, model: Path, waits: list[float], step: tuple[str, str], kind: str
) -> None:
    fault = Fault(*step, kind=kind)
    if kind == "page":  # of a proxy in front of the Hub
        fault = Fault(*step, status=502, html=True)
    elif kind == "429":
        fault = Fault(*step, status=429, headers={"Retry-After": "7"}, message="Too many requests")
    hub.faults.append(fault)
    notices: list[str] = []
    share(model, tag="v1", notices=notices)
    repository = hub.model(NAME)
    assert fault.happened == 1
    assert repository.history() == ["Upload model", "initial commit"]
    assert repository.files()["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert repository.tags == {"v1": repository.resolve("main")}
    assert waits and (kind != "429" or max(waits) >= 7)
    assert any("The Hub" in notice for notice in notices) and hub.token not in " ".join(notices)
    assert "secret" not in " ".join(notices)  # the signed part of an address


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS, ids=STEP_NAMES)
def test_a_fault_that_stays_ends_in_a_sentence_and_the_next_push_goes_on(
    hub: HubServer, model: Path, waits: list[float], step: tuple[str, str]
) -> None:
    fault = Fault(*step, status=503, times=1000, message="Service Unavailable")
    hub.faults.append(fault)
    sentence = refused(lambda: share(model, tag="v1", max_shard_size="100KB"), ConnectionError)
    assert re.match(r"Could not .*: the Hub has trouble of its own \(503: Service Unavailable\)\.", sentence)
    assert "Give the same command again later; what is uploaded is not sent twice." in sentence
    assert 4 <= fault.happened <= 6 * (3 if step[0] == "PUT" or "verify" in step[1] else 1)  # each of three shards
    if ("model", NAME) in hub.repositories and step[1] not in ("/refs", "/tag/"):
        assert hub.model(NAME).history() == ["initial commit"]  # nothing, rather than half of it
    hub.faults.clear()
    result = share(model, tag="v1", max_shard_size="100KB")
    assert hub.model(NAME).history() == ["Upload model", "initial commit"]
    assert hub.model(NAME).tags == {"v1": result.pushed.commit}
    if step[0] != "PUT":  # however many of the shards were there when the first push gave up
        assert hub.received == sum(map(len, hub.objects.values())) > 0


def test_an_upload_that_broke_off_sends_only_what_is_missing(hub: HubServer, model: Path, waits: list[float]) -> None:
    hub.faults.append(Fault("PUT", "/lfs-storage/", "middle", times=1000))
    hub.faults.insert(0, Fault("PUT", "/lfs-storage/", "none", times=2))
    assert "cannot be reached" in refused(lambda: share(model, max_shard_size="100KB"), ConnectionError)
    there = set(hub.objects)
    assert len(there) == 2 and hub.model(NAME).history() == ["initial commit"]
    hub.faults.clear()
    hub.requests.clear()
    share(model, max_shard_size="100KB")
    sent = {path.split("/")[2].split("?")[0] for method, path in hub.requests if method == "PUT"}
    assert sent and not sent & there


def test_rate_limit_that_lasts_longer_than_anyone_waits(hub: HubServer, model: Path, waits: list[float]) -> None:
    headers = {"RateLimit": '"api";r=0;t=2000', "RateLimit-Policy": '"fixed window";"api";q=100;w=3000'}
    hub.faults.append(Fault("POST", "/repos/create", status=429, headers=headers, times=9))
    sentence = refused(lambda: share(model), ConnectionError)
    assert "too many requests from you (429). Give the same command again in 2000 s" in sentence and waits == []


def test_no_network(hub: HubServer, model: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    sentence = refused(lambda: share(model), ConnectionError)
    assert f"{address} cannot be reached (" in sentence and "Look at the network" in sentence
    assert waits == [1, 2, 4, 8]


@pytest.mark.slow
def test_upload_that_fails_in_xet(hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf_xet, which carries large files to the Hub itself, knows no kinds of errors."""

    def fail(*arguments: object, **settings: object) -> None:
        raise RuntimeError(f"Data processing error: CAS service error for {hub.token}\n")

    with monkeypatch.context() as context:
        context.setattr(HfApi, "preupload_lfs_files", fail)
        sentence = refused(lambda: share(model), ConnectionError)
    assert sentence.startswith(
        "Could not upload to 'user/name': Data processing error: CAS service error for ***. Give"
    )
    assert share(model).pushed.commit == hub.model(NAME).resolve("main")


def test_offline_and_no_token(hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in refused(lambda: share(model))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(model / "none"))
    assert "There is no token for the Hub" in refused(lambda: share(model))
    assert "`hf auth login`" in refused(lambda: share(model))
    for token in ("hf_aaa bbb", f"{hub.token}\n", " ", "hf_é", "hf_a\0"):
        assert "has characters that no token has" in refused(lambda token=token: share(model, token=token))
    assert hub.requests == []


@pytest.mark.slow
def test_a_token_that_is_wrong_or_may_not_write(hub: HubServer, model: Path) -> None:
    sentence = refused(lambda: share(model, token="hf_" + "x" * 34))
    assert "the Hub does not accept the token (401)" in sentence and "hf_xxx" not in sentence
    hub.read_only.add(hub.token)
    sentence = refused(lambda: share(model))
    assert "Could not create 'user/name': the token may not write to 'user/name' (403" in sentence
    hub.read_only.clear()
    assert "push to user/name" in refused(lambda: share(model, "stranger/name"))
    assert hub.repositories == {}


@pytest.mark.slow
def test_repository_that_vanishes_or_changes_meanwhile(hub: HubServer, model: Path) -> None:
    share(model)
    (model / "generation_config.json").write_text("{}")

    def push_too(path: str) -> None:
        repository = hub.model(NAME)
        tree = {**repository.commits[repository.branches["main"]]["tree"], "notes.txt": (b"theirs", False)}
        repository.branches["main"] = repository.commit(tree, repository.branches["main"], "Theirs")

    hub.faults.append(Fault("POST", "/preupload/", "none", call=push_too))
    sentence = refused(lambda: share(model))
    assert "was changed by someone else meanwhile (412" in sentence
    assert hub.model(NAME).history() == ["Theirs", "Upload model", "initial commit"]
    share(model)
    assert hub.model(NAME).history()[0] == "Upload model" and "notes.txt" in hub.model(NAME).files()
    (model / "generation_config.json").write_text('{"top_k": 3}')
    hub.faults[:] = [Fault("POST", "/preupload/", "none", call=lambda path: hub.repositories.clear())]
    assert "does not find it (404: Repository not found)" in refused(lambda: share(model))


@pytest.mark.slow
def test_tag_that_is_taken(hub: HubServer, model: Path) -> None:
    first = share(model, tag="v1").pushed.commit
    (model / "generation_config.json").write_text("{}")
    sentence = refused(lambda: share(model, tag="v1"))
    assert f"has a tag 'v1' already, for other files (commit {first[:7]})" in sentence
    assert hub.model(NAME).resolve("main") == first


@pytest.mark.slow
def test_another_architecture_is_refused_unless_told(hub: HubServer, model: Path) -> None:
    share(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    sentence = refused(lambda: share(model))
    assert "holds another model (num_hidden_layers is 2 there and 3 here)" in sentence and "--replace" in sentence
    assert len(hub.model(NAME).history()) == 2
    share(model, replace=True)
    assert json.loads(hub.model(NAME).files()["config.json"])["num_hidden_layers"] == 3


@pytest.mark.slow
def test_other_kinds_of_files_are_refused_unless_told(hub: HubServer, model: Path, tmp_path: Path) -> None:
    """Their card would take the place of the one there; those in ONNX bring a config.json, which would too."""
    pytest.importorskip("gguf")
    share(model)
    sentence = refused(lambda: share(model, format="gguf"))
    assert "'user/name' holds a model for transformers, and this is GGUF files, whose card" in sentence
    share(model, "user/gguf", format="gguf")
    share(model, "user/gguf", format="gguf")
    assert "holds GGUF files, and this is a model for transf" in refused(lambda: share(model, "user/gguf"))
    card = hub.model("user/gguf").files()["README.md"]
    share(model, "user/gguf", replace=True)
    assert hub.model("user/gguf").files()["README.md"] != card


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_configuration_on_the_hub_that_is_broken(hub: HubServer, model: Path, content: bytes) -> None:
    share(model)
    api = HfApi(token=hub.token)
    api.create_commit(NAME, [CommitOperationAdd("config.json", content)], commit_message="Broken")
    assert "config.json in 'user/name' on the Hub is broken" in refused(lambda: share(model))
    share(model, replace=True)
    assert hub.model(NAME).files()["config.json"] == (model / "config.json").read_bytes()


def write_there(hub: HubServer, card: str) -> None:
    operation = CommitOperationAdd("README.md", card.encode())
    HfApi(token=hub.token).create_commit(NAME, [operation], commit_message="On the page of the Hub")


@pytest.mark.slow
def test_what_was_written_on_the_page_of_the_hub_stays(hub: HubServer, model: Path) -> None:
    card = share(model).card
    edited = card.replace("---\nlibrary", "---\nlanguage: en\nlibrary")
    write_there(hub, edited.replace("## Limits", "## News\n\nV2!\n\n## Limits"))
    for _ in range(2):
        (model / "generation_config.json").write_text('{"top_k": 3}')
        card = share(model).card
        assert "language: en" in card and card.count("## News\n\nV2!") == 1 and card.count("## Limits") == 1
    assert share(model).pushed.was_there
    write_there(hub, "---\nlicense: mit\nlibrary_name: other\n---\nMine.\n\n## How to use\n\nAsk me.\n")
    result = share(model)
    assert result.card.endswith("---\n\nMine.\n\n## How to use\n\nAsk me.\n") and "own" in result.notices[0]
    assert "library_name: transformers\n" in result.card and "Ask me" not in share(model, replace=True).card


def test_revision_that_is_a_tag(hub: HubServer, model: Path) -> None:
    share(model, tag="v1")
    assert "revision names a branch, and 'v1' is a tag" in refused(lambda: share(model, revision="v1"))
    assert set(hub.model(NAME).branches) == {"main"}


def test_proposal_of_what_is_there(hub: HubServer, model: Path) -> None:
    share(model)
    result = share(model, create_pr=True)
    assert result.pushed.was_there and result.pushed.url == f"{hub.url}/{NAME}"
    assert hub.model(NAME).pull_requests == {}


def test_base_that_is_not_on_the_hub(hub: HubServer, model: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = {"name": "user/adapter", "base_model": "user/none"}
    assert "There is no model 'user/none' on the Hub" in refused(lambda: share(tmp_path / "adapter", **settings))
    assert hub.repositories == {}


def test_address_that_is_none(hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "huggingface.co")
    assert "HF_ENDPOINT is 'huggingface.co', which is no address" in refused(lambda: share(model))


def test_card_that_the_hub_does_not_take(hub: HubServer, model: Path) -> None:
    sentence = refused(lambda: share(model, license="do-what-you-like"))
    assert 'The Hub does not take the card: "license" must be one of [' in sentence
    assert hub.repositories == {}


@pytest.mark.slow
def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub: HubServer, model: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture, waits: list[float]
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.faults += [
        Fault("POST", "/commit/", status=500, message=f"what is {hub.token}?"), Fault("PUT", "/lfs-", "middle"),
    ]  # fmt: skip
    notices: list[str] = []
    share(model, notices=notices)
    hub.faults.append(Fault("POST", "/preupload/", status=400, message=f"Bearer {hub.token} is odd"))
    (model / "generation_config.json").write_text("{}")
    sentence = refused(lambda: share(model))
    assert "Bearer *** is odd" in sentence
    out = capfd.readouterr()
    # httpcore's own log has what the server said, word for word, in which this one repeats the token.
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("httpcore")]
    assert logged and hub.token not in "".join([*notices, *logged, out.out, out.err, sentence])
    assert all(header == "" for path, header in hub.headers_seen if path.startswith(("/lfs-storage/", "/cdn/")))
    assert not any(hub.token in content.decode("latin-1") for content in hub.model(NAME).files().values())


def test_what_arrives_is_compared_with_what_was_sent(hub: HubServer, model: Path) -> None:
    def break_it(path: str) -> None:
        repository = hub.model(NAME)
        tree = repository.commits[repository.branches["main"]]["tree"]
        tree["config.json"] = (tree["config.json"][0] + b" ", False)

    hub.faults.append(Fault("POST", "/commit/", "none", after=break_it))
    sentence = refused(lambda: share(model, tag="v1"))
    assert "config.json in 'user/name' on the Hub is not the file that was sent" in sentence
    assert hub.model(NAME).tags == {}, "a tag names one set of files for good"


@pytest.mark.slow
def test_weights_may_be_empty_of_change_and_tags_move_on(hub: HubServer, model: Path) -> None:
    """New weights of the same shape: a second version, each under its tag."""
    share(model, tag="v1")
    tensors = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    share(model, tag="v2")
    repository = hub.model(NAME)
    assert repository.files("v1")["model.safetensors"] != repository.files("v2")["model.safetensors"]
    assert isinstance(repository, Repository) and repository.history() == ["Upload model"] * 2 + ["initial commit"]
