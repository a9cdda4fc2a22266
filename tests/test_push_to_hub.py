"""push_to_hub.py as a user types it, and what strangers do with what is there then."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cards_mini import CARD, read_card
from entry_points_mini import one_sentence_errors
from helpers import fork_server
from helpers.hub_server import Fault, HubServer
from helpers.programs import ROOT, one_sentence, run_program
from modeling_mini.loading.checkpoints import load_checkpoint
from sharing_mini.arguments import SharingArguments, parse_arguments
from sharing_mini.pushing import Result
from sharing_mini.pushing import push as push_here
from sharing_mini.reporting import report
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

CLIENT = "@huggingface/hub@2.17.5"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer().running() as server:
        yield server


def push(server: HubServer, home: Path, *arguments: object) -> subprocess.CompletedProcess:
    return run_program("push_to_hub.py", *arguments, cwd=home, **server.environment(home / "hf"))


@pytest.fixture(scope="module")
def pushed(server: HubServer, quick_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the first command of the documentation prints: a run, proven before and after."""
    home = tmp_path_factory.mktemp("pusher")
    result = push(server, home, quick_run, "user/name", "--license", "apache-2.0", "--tag", "v1")
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def here(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """The same in this process, which saves the seconds of importing torch; the clean processes are forked."""
    server.use(monkeypatch, tmp_path / "hf")
    monkeypatch.setattr(sys, "executable", fork_server.python())

    def push(source: Path, name: str, **settings: object) -> Result:
        return push_here(str(source), name, SharingArguments(**{"license": "mit", **settings}), lambda sentence: None)

    return push


def stranger(server: HubServer, home: Path, command: list[str], **environment: str) -> str:
    """The output of a command that knows the Hub, and neither Mini nor a token."""
    settings = {**os.environ, **server.environment(home / "hf"), **environment}
    del settings["HF_TOKEN"]
    settings.pop("PYTHONPATH", None)
    result = subprocess.run(command, cwd=home, env=settings, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def greedy(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("The", return_tensors="pt")
    return model.generate(**inputs, do_sample=False, max_new_tokens=40)[0].tolist()


@pytest.mark.slow
def test_the_command(server: HubServer, pushed: str, quick_run: Path) -> None:
    repository = server.model("user/name")
    assert repository.history() == ["Upload model", "initial commit"]
    commit = repository.resolve("v1")
    assert f"Pushed: {server.url}/user/name  (commit {commit[:7]})" in pushed and "Tag: v1" in pushed
    assert "Loaded from the Hub in a clean process: it writes the same as the folder here." in pushed
    assert repository.files()["model.safetensors"] == (quick_run / "best" / "model.safetensors").read_bytes()
    assert server.token not in pushed
    read = [token for path, token in server.headers_seen if path.startswith((f"/user/name/resolve/{commit}", "/cdn/"))]
    assert len(read) > 10 and set(read) == {""}, "the last look was that of a stranger"
    card = repository.files()["README.md"].decode()
    prompt = read_card(quick_run / "best" / CARD).facts.prompts[0]
    sample = card.split(f"Written by these weights after {prompt!r}, with seed 42:\n\n```text\n")[1].split("\n```\n")[0]
    assert len(sample) > 20 and "of 66,496 parameters" in card


@pytest.mark.slow
def test_a_stranger_loads_and_generates(server: HubServer, pushed: str, quick_run: Path, tmp_path: Path) -> None:
    """What the model class, the pipeline and both Python snippets of the card give, in one process."""
    card = server.model("user/name").files()["README.md"].decode()
    snippets = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    program = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained("user/name", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("user/name", trust_remote_code=True)
ids = model.generate(**tokenizer("The", return_tensors="pt"), do_sample=False, max_new_tokens=40)[0].tolist()
generator = pipeline("text-generation", model="user/name", revision="v1", trust_remote_code=True)
text = generator("The", do_sample=False, max_new_tokens=40)[0]["generated_text"]
ours = [name for name in sys.modules if name.split(".")[0] == "modeling_mini"]
print(json.dumps([ids, text, type(model).__name__, ours]))
"""
    assert len(snippets) == 2
    output = stranger(server, tmp_path, [fork_server.python(), "-c", "\n".join([*snippets, program])])
    ids, text, name, ours = json.loads(output.splitlines()[-1])
    assert ids == greedy(quick_run / "best") and name == "MiniForCausalLM" and ours == []
    assert text == AutoTokenizer.from_pretrained(quick_run / "best").decode(ids, skip_special_tokens=True)
    assert output.count("The") >= 3


@pytest.mark.slow
def test_the_command_line_of_the_card(server: HubServer, pushed: str, tmp_path: Path) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", server.model("user/name").files()["README.md"].decode(), re.DOTALL)
    installed = tmp_path / "bin" / "mini-generate"  # as `pip install` writes it
    installed.parent.mkdir()
    installed.write_text(f'#!/bin/sh\nexec {fork_server.python()} {ROOT}/generate.py "$@"\n')
    installed.chmod(0o755)
    path = f"{installed.parent}:{os.environ['PATH']}"
    output = stranger(server, tmp_path, ["bash", "-euc", block], PATH=path)
    assert output.startswith("The ") and len(output) > 10


@pytest.mark.slow
def test_hf_download(server: HubServer, pushed: str, tmp_path: Path) -> None:
    hf = Path(sys.executable).with_name("hf")
    stranger(server, tmp_path, [str(hf), "download", "user/name", "--revision", "v1", "--local-dir", "copy"])
    files = server.model("user/name").files()
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in files} == files


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the JavaScript client, where there is npm and its registry."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("there is no Node.js here")
    folder = tmp_path_factory.mktemp("npm")
    command = [npm, "install", "--no-fund", "--no-audit", "--ignore-scripts", CLIENT]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    if result.returncode != 0:
        pytest.skip(f"npm cannot install {CLIENT} here: {result.stderr.splitlines()[-1:]}")
    return folder


@pytest.mark.slow
def test_javascript_client(server: HubServer, pushed: str, node_modules: Path, tmp_path: Path) -> None:
    program = """
import { createHash } from "node:crypto";
import { downloadFile, listFiles, modelInfo, parseSafetensorsMetadata } from "@huggingface/hub";
const [hubUrl, repo] = process.argv.slice(2);
const files = {};
for await (const file of listFiles({ repo, hubUrl, recursive: true })) {
  const content = Buffer.from(await (await downloadFile({ repo, path: file.path, hubUrl })).arrayBuffer());
  files[file.path] = createHash("sha256").update(content).digest("hex");
}
const { parameterCount } = await parseSafetensorsMetadata({ repo, hubUrl, computeParametersCount: true });
console.log(JSON.stringify({ files, parameterCount, id: (await modelInfo({ name: repo, hubUrl })).name }));
"""
    import hashlib

    (node_modules / "read.mjs").write_text(program)
    output = stranger(server, tmp_path, ["node", str(node_modules / "read.mjs"), server.url, "user/name"])
    answer = json.loads(output)
    files = server.model("user/name").files()
    assert answer["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert answer["id"] == "user/name" and answer["parameterCount"] == {"F32": 66_496}


@pytest.mark.slow
def test_dry_run_touches_nothing(
    server: HubServer, quick_run: Path, capsys: pytest.CaptureFixture, here: Callable[..., Result]
) -> None:
    before, requests = sorted(os.walk(quick_run)), len(server.requests)
    report(here(quick_run, "user/none", dry_run=True, space=True, no_verify=True, license=None))
    output = capsys.readouterr().out
    assert len(server.requests) == requests and sorted(os.walk(quick_run)) == before
    weights = (quick_run / "best" / "model.safetensors").stat().st_size
    assert re.search(rf"model\.safetensors +│ +{weights:,} ", output) and "space: app.py" in output
    assert "# none" in output and "model-index:" in output and "A dry run" in output
    assert "It has no licence" in output
    sizes = [int(size.replace(",", "")) for size in re.findall(r"│ +([\d,]+) │", output)]
    assert sizes[-1] == sum(sizes[:-1]) > weights
    order = [output.index(words) for words in ("model.safetensors", "It has no licence", "A dry run", "# none")]
    assert order == sorted(order), "what is decided stands before the card, which is long"


@pytest.mark.slow
def test_mistakes_are_one_sentence(server: HubServer, quick_run: Path, tmp_path: Path) -> None:
    token = "hf_" + "z" * 34
    sentence = one_sentence(push(server, tmp_path, quick_run, "user/other", "--token", token, "--no_verify"))
    assert "does not accept the token (401)" in sentence and token not in sentence
    for argv, words in (
        ([], "arguments are required: RUN_OR_CHECKPOINT, user/name"),
        (["run", "name"], "'name' is no name on the Hub"),
        (["run", "user/na--me"], "is no name on the Hub"),
        (["run", "user/name."], "is no name on the Hub"),
        (["run", f"user/{'a' * 97}"], "of 96 characters at most"),
        (["run", "user/name", "--revision", "refs/pr/1"], "revision must be the name of a branch"),
        (["run", "user/name", "--revision", "0" * 40], "revision must be the name of a branch"),
        (["run", "user/name", "--tag", "a b"], "tag must be the name of a version, such as v1, got 'a b'"),
        (["run", "user/name", "--tag="], "tag must be the name of a version"),
        (["run", "user/name", "--max_shard_size", "0MB"], "max_shard_size must be a size such as 5GB"),
        (["run", "user/name", "--privat"], "There is no flag '--privat'"),
        (["run", "user/name", "--create_pr", "--tag", "v1"], "tag names a version that is there"),
        (["run", "user/name", "--create_pr", "--revision", "x"], "give it without --revision"),
        (["run", "user/name", "--space", "--create_pr"], "give it without --create_pr"),
        (["run", "user/name", "--space", "--revision", "x"], "give it without --revision"),
        (["run", "user/name", "--space", "--format", "gguf"], "and not as gguf"),
        (["run", "user/name", "--base_model", "folder"], "base_model must be a name on the Hub"),
        (["run", "user/name", "--max_shard_size", "5"], "max_shard_size must be a size such as 5GB"),
        (["run", "user/name", "--commit_message", " "], "commit_message must not be empty"),
        (["run", "user/name", "--license", "foo bar"], "license must be a name that the Hub knows, such as apache-2.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            parse_arguments(argv)


def test_output_that_is_read_no_further(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """As by `| head -1`: no sentence, for nothing is wrong, also where the end of the output was the end of reading."""
    for output in ("x" * 100_000, "x"):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as stream, monkeypatch.context() as context:
            context.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as ended, one_sentence_errors():
                print(output)
            assert ended.value.code == 141
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_model_that_does_not_load_is_not_pushed(
    server: HubServer, quick_run: Path, tmp_path: Path, here: Callable[..., Result]
) -> None:
    """Its configuration names a layer more than there are weights for."""
    folder = Path(shutil.copytree(quick_run / "best", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"does not load: .*the weights do not fit the configuration"):
        here(folder, "user/broken")
    assert ("model", "user/broken") not in server.repositories


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while a file is sent", "while the Hub commits"])
def test_killed_and_given_again(
    server: HubServer, quick_run: Path, tmp_path: Path, here: Callable[..., Result], moment: str
) -> None:
    """kill -9, by the Hub itself, at that very moment."""
    name = f"user/{'sent' if 'file' in moment else 'committed'}"
    command = [
        fork_server.python(), str(ROOT / "push_to_hub.py"), str(quick_run), name, "--no_verify",
        "--max_shard_size", "100KB",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **server.environment(tmp_path / "hf")}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def kill(path: str) -> None:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    server.objects.clear()
    if "file" in moment:
        server.faults[:] = [Fault("PUT", "/lfs-", "none", times=2), Fault("PUT", "/lfs-", "middle", call=kill)]
    else:
        server.faults[:] = [Fault("POST", f"{name}/commit/", "after", call=kill)]
    assert process.wait(timeout=100) == -signal.SIGKILL
    server.faults.clear()
    repository = server.model(name)
    if "file" in moment:
        assert repository.history() == ["initial commit"], "nothing of it is to be seen"
    there = set(server.objects)
    requests = len(server.requests)
    result = here(quick_run, name, license=None, no_verify=True, max_shard_size="100KB")
    sent = {path.split("/")[2].split("?")[0] for method, path in server.requests[requests:] if method == "PUT"}
    assert there and not sent & there and bool(sent) == ("file" in moment)
    assert result.pushed.was_there == ("Hub" in moment)
    assert repository.history() == ["Upload model", "initial commit"]
    shards = [file for file in repository.files() if re.fullmatch(r"model-\d+-of-\d+\.safetensors", file)]
    assert len(shards) == 3


@pytest.mark.slow
def test_adapter(server: HubServer, pushed: str, quick_run: Path, tmp_path: Path, here: Callable[..., Result]) -> None:
    """The folder that peft writes names its base by a place on this disk; a stranger gets it by its name."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(quick_run / "best")
    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(base, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(50)  # else it writes what its base writes
    adapted.save_pretrained(tmp_path / "adapter")
    # As the trainer writes it for a model that answers in turns; here, any token ends one.
    GenerationConfig(eos_token_id=list(range(264))).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="which is a folder here: push that first, and name it by --base_model user/na"
    ):
        here(tmp_path / "adapter", "user/adapter")
    assert here(tmp_path / "adapter", "user/adapter", base_model="user/name").verified
    files = server.model("user/adapter").files()
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json", ".gitattributes",
    }  # fmt: skip
    assert str(quick_run.parent).encode() not in b"".join(files.values())
    card = files["README.md"].decode()
    assert "base_model: user/name" in card and "library_name: peft" in card and "| r | 4 |" in card
    snippets = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    program = (
        "\nimport json\ninputs = tokenizer('The', return_tensors='pt')\n"
        "print(json.dumps(model.generate(**inputs, do_sample=False, max_new_tokens=40)[0].tolist()))"
    )
    assert len(snippets) == 2
    output = stranger(server, tmp_path, [fork_server.python(), "-c", "\n".join(snippets) + program])
    inputs = AutoTokenizer.from_pretrained(quick_run / "best")("The", return_tensors="pt")
    expected = adapted.eval().generate(**inputs, do_sample=False, max_new_tokens=40)[0].tolist()
    assert json.loads(output.splitlines()[-1]) == expected != greedy(quick_run / "best")
    assert isinstance(adapted, PeftModel)
    command = ("generate.py", "--adapter", "user/adapter", "--trust_remote_code", "--prompt", "The", "--temperature", 0)
    written = run_program(*command, cwd=tmp_path, **server.environment(tmp_path / "hf"))
    assert (written.returncode, written.stdout.rstrip("\n")) == (0, "The"), written.stderr  # and not 40 tokens more


@pytest.mark.slow
def test_quantized_folder(server: HubServer, quick_run: Path, tmp_path: Path, here: Callable[..., Result]) -> None:
    model, tokenizer = load_checkpoint(str(quick_run / "best"), quantization="4bit")
    model.save_pretrained(tmp_path / "int4")
    tokenizer.save_pretrained(tmp_path / "int4")
    assert here(tmp_path / "int4", "user/int4").verified
    card = server.model("user/int4").files()["README.md"].decode()
    assert "quantized (bitsandbytes INT4, nf4)" in card and " accelerate bitsandbytes\n" in card
    assert f'pip install torch "transformers>={model.config.transformers_version}"' in card


@pytest.mark.slow
def test_the_settings_of_the_card_train_the_same_model(server: HubServer, pushed: str, tmp_path: Path) -> None:
    card = server.model("user/name").files()["README.md"].decode()
    (tmp_path / "config.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
    result = run_program("train_accelerate.py", "--config", "config.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    weights = (tmp_path / "runs" / "tiny-sample" / "best" / "model.safetensors").read_bytes()
    assert weights == server.model("user/name").files()["model.safetensors"]


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    output = capsys.readouterr().out
    assert ended.value.code == 0 and "RUN_OR_CHECKPOINT user/name" in " ".join(output.split())
    for flag in (
        "dry_run",
        "private",
        "revision",
        "tag",
        "create_pr",
        "commit_message",
        "license",
        "token",
        "no_verify",
    ):
        assert f"--{flag}" in output
