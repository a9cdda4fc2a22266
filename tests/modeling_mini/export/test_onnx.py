"""ONNX: the graph in onnxruntime, the folder in Node by transformers.js, and the page in Chromium."""

import contextlib
import dataclasses
import functools
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cards_mini import CARD, Card, Facts, render
from configuration_mini import MiniConfig
from filelock import FileLock
from generation_mini.arguments import GenerationArguments
from generation_mini.text_generation import write_on
from helpers import browser
from helpers.browser import Opener
from helpers.exports import learned_merges, write_adapter
from modeling_mini import MiniForCausalLM
from modeling_mini.export import export, onnx
from modeling_mini.export.__main__ import run
from modeling_mini.export.onnx import TRANSFORMERS_JS, VENDORED, empty_cache, largest_difference
from modeling_mini.export.onnx_graph import ACTIVATIONS, build_graph
from modeling_mini.loading.checkpoints import load_model
from modeling_mini.web import sentences
from onnx_ir import to_proto
from tokenization import CHAT_TEMPLATE, ByteTokenizer, CharTokenizer, encode_messages
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2CLS

NODE, NPM = shutil.which("node"), shutil.which("npm")
FILES = ("model.onnx", "model_quantized.onnx")
CONTEXT = 48
GREEDY = GenerationArguments(max_new_tokens=200, temperature=0.0)
PROMPT, PROMPTS = "the ", ["héllo", "a", "import 日本\n"]


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


CONFIGS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head, layernorm, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "multi-query, rmsnorm": {"num_key_value_heads": 1, "norm_type": "rmsnorm"},
    "qk_norm, layernorm": {"qk_norm": True},
    "qk_norm, rmsnorm, biases": {"qk_norm": True, "norm_type": "rmsnorm", "attention_bias": True, "mlp_bias": True},
    "wide heads, large epsilon": {"head_dim": 32, "norm_eps": 0.1},
    "half of each head": rope("default", partial_rotary_factor=0.5),
    "linear": rope("linear", factor=2.0),
    "dynamic": rope("dynamic", factor=4.0),
    "proportional": rope("proportional", partial_rotary_factor=0.5),
    "yarn": rope("yarn", factor=2.0, original_max_position_embeddings=24),
    "llama3": rope(
        "llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24
    ),
    "longrope": rope(
        "longrope",
        factor=2.0,
        original_max_position_embeddings=24,
        short_factor=[1.0 + i / 10 for i in range(8)],
        long_factor=[2.0 + i for i in range(8)],
    ),
}


def make_model(**fields: Any) -> MiniForCausalLM:
    """A model far from its initial state, so that what it writes varies: large matrices, norms and biases at random."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MiniConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, **fields})
    model = MiniForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    # Without an end, every text is as long as it was asked for.
    model.generation_config.eos_token_id = None
    return model


def session_of(model: MiniForCausalLM) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(to_proto(build_graph(model)).SerializeToString(), options)


def greedy(session: onnxruntime.InferenceSession, input_ids: np.ndarray, mask: np.ndarray, tokens: int) -> np.ndarray:
    """The tokens (batch, tokens) that onnxruntime writes, with a cache."""
    feeds = {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clip(min=0)}
    cache, written = empty_cache(session, len(input_ids)), []
    for _ in range(tokens):
        logits, *present = session.run(None, {**feeds, **cache})
        cache = dict(zip(cache, present, strict=True))
        feeds["input_ids"] = logits[:, -1:].argmax(-1)
        feeds["attention_mask"] = np.pad(feeds["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
        feeds["position_ids"] = feeds["position_ids"][:, -1:] + 1
        written.append(feeds["input_ids"])
    return np.concatenate(written, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_greedy_output_equals_minis(fields: dict[str, Any]) -> None:
    """Three rows with different padding, and one without: from the prompt far beyond the context."""
    model = make_model(**fields)
    session = session_of(model)
    input_ids = torch.randint(8, 264, (3, 10))
    mask = torch.ones_like(input_ids)
    mask[1, :4] = mask[2, :9] = 0
    input_ids[mask == 0] = 0
    for rows in (slice(0, 1), slice(0, 3)):
        ids, seen = input_ids[rows], mask[rows]
        expected = model.generate(ids, attention_mask=seen, max_new_tokens=2 * CONTEXT, do_sample=False)[:, 10:]
        assert len(set(expected.flatten().tolist())) > 10, "a text that varies"
        assert greedy(session, ids.numpy(), seen.numpy(), 2 * CONTEXT).tolist() == expected.tolist()


@pytest.mark.slow
def test_trained_weights(tmp_path: Path) -> None:
    """The model that comes with Mini, also with matrices of 8 bits."""
    folder = export("onnx", "box", tmp_path / "box", q8=True)
    model, tokenizer = load_model("box")
    prompt = tokenizer("def read_lines(path):", return_tensors="pt").input_ids
    expected = model.generate(prompt, max_new_tokens=60, do_sample=False)[:, prompt.shape[1] :]
    exact, quantized = (onnxruntime.InferenceSession(folder / "onnx" / name) for name in FILES)
    assert greedy(exact, prompt.numpy(), np.ones_like(prompt), 60).tolist() == expected.tolist()
    ids = torch.cat([prompt, expected], dim=1).numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    first, second = (
        session.run(["logits"], {**feeds, **empty_cache(session, 1)})[0].argmax(-1) for session in (exact, quantized)
    )
    assert (first == second).mean() > 0.9


def test_names_and_shapes() -> None:
    """Those that transformers.js looks for; it takes `batch_size` from the prompt and 0 for other names."""
    session = session_of(make_model())
    shapes = {value.name: value.shape for value in session.get_inputs()}
    past = ["batch_size", 2, "past_sequence_length", 16]
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{layer}.{kind}": past for layer in range(2) for kind in ("key", "value")},
    }
    assert [value.name for value in session.get_outputs()] == [
        "logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value"
    ]  # fmt: skip
    assert session.get_outputs()[0].shape == ["batch_size", "sequence_length", 264]


@pytest.mark.slow
@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_activations(hidden_act: str) -> None:
    model = make_model(num_hidden_layers=1, hidden_act=hidden_act)
    ids = torch.arange(8, 28).view(2, 10)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(10).expand(2, -1)}
    with torch.no_grad():
        expected = model(ids).logits
    session = session_of(model)
    logits = session.run(None, {**{name: array.numpy() for name, array in feeds.items()}, **empty_cache(session, 2)})[0]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-4)


def test_every_activation_is_written_or_refused() -> None:
    refused = sorted(set(ACT2CLS) - set(ACTIVATIONS))
    assert set(ACTIVATIONS) <= set(ACT2CLS) and len(refused) <= 5
    for name in refused:
        with pytest.raises(ValueError, match=f"There is no ONNX for hidden_act '{name}'; there is for gelu, "):
            build_graph(MiniForCausalLM(MiniConfig.preset("tiny", hidden_act=name)))


def test_what_is_not_a_plain_mini_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="this model is a LlamaForCausalLM: make it a Mini first"):
        build_graph(LlamaForCausalLM(LlamaConfig(vocab_size=264, **sizes)))
    model = make_model()
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj' is a Sequential that it does not know"):
        build_graph(model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("onnx") / "checkpoint"
    make_model().save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    return export("onnx", checkpoint, checkpoint.with_name("exported"), q8=True)


@functools.cache
def written_by_mini(checkpoint: Path, prompt: str, tokens: int) -> str:
    model, tokenizer = MiniForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def snippet(folder: Path, language: str, card: str = "") -> str:
    card = card or (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)[1]
    return code.replace('"PATH_OR_REPOSITORY"', json.dumps(str(folder)))


@pytest.mark.slow
def test_the_card_in_python(checkpoint: Path, exported: Path, capsys: pytest.CaptureFixture) -> None:
    exec(snippet(exported, "python"), {})
    texts = [written_by_mini(checkpoint, prompt, 100) for prompt in ("The", "Once upon")]
    assert capsys.readouterr().out == "".join(
        f"{text.removeprefix(prompt)}\n" for prompt, text in zip(("The", "Once upon"), texts, strict=True)
    )
    card = (exported / "README.md").read_text(encoding="utf-8")
    difference = float(re.search(r"differed from Mini's by (\S+) of", card)[1])
    assert 0 < difference < 1e-5 and "library_name: transformers.js" in card


def test_the_page_of_a_merged_adapter_describes_the_adapter(checkpoint: Path, tmp_path: Path) -> None:
    adapter = write_adapter(checkpoint, tmp_path / "of-recipes")
    facts = Facts(kind="adapter", dataset="recipes", base="Base", prompts=["Take two eggs"])
    (adapter / CARD).write_text(render(facts, {"library_name": "peft"}, {}), encoding="utf-8")
    page = (export("onnx", adapter, tmp_path / "out") / "index.html").read_text(encoding="utf-8")
    assert "<title>Mini: of-recipes</title>" in page and "fine-tuned from Base on recipes" in page
    assert '"Take two eggs"' in page


def test_a_page_goes_without_figures_that_are_written_in_another_form() -> None:
    for figures in (None, "0.9", [{"name": "a model"}], [{"results": [{"metrics": [{"type": "accuracy"}]}]}]):
        lines = sentences(Card({"model-index": figures}, Facts(), ""), make_model(), is_chat=False)
        assert lines[1:] == ["It continues what you write, and sees at most 48 tokens at once."]


def test_eight_bits(checkpoint: Path, exported: Path) -> None:
    exact, quantized = exported / "onnx" / "model.onnx", exported / "onnx" / "model_quantized.onnx"
    model = MiniForCausalLM.from_pretrained(checkpoint)
    types = {tensor.data_type for tensor in onnx_initializers(quantized) if tensor.dims == [64, 96]}
    assert types == {2}, "the matrices are UINT8"
    assert 1e-3 < largest_difference(model, quantized) < 0.3
    assert quantized.stat().st_size < 0.6 * exact.stat().st_size
    # The logits are wide apart here, so rounding seldom changes which is the largest.
    ids = np.random.default_rng(1).integers(8, 264, (1, 40))
    first, second = (
        onnxruntime.InferenceSession(path).run(["logits"], {
            "input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(40)[None],
            **empty_cache(onnxruntime.InferenceSession(path), 1),
        })[0].argmax(-1)
        for path in (exact, quantized)
    )  # fmt: skip
    assert (first == second).mean() > 0.8


def onnx_initializers(path: Path) -> list:
    import onnx

    return onnx.load(path).graph.initializer


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """With weights in a second file, as beyond two gigabytes, and in bfloat16, which becomes float32."""
    model = MiniForCausalLM.from_pretrained(checkpoint).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint")
    shutil.copy(checkpoint / "tokenizer.json", tmp_path / "checkpoint")
    shutil.copy(checkpoint / "tokenizer_config.json", tmp_path / "checkpoint")
    monkeypatch.setattr(onnx, "LARGEST_FILE", 100_000)
    run(["onnx", str(tmp_path / "checkpoint"), str(tmp_path / "out")])
    out = tmp_path / "out"
    assert f"{out / 'onnx' / 'model.onnx_data'} (" in capsys.readouterr().out
    assert (out / "onnx" / "model.onnx").stat().st_size < 20_000
    assert largest_difference(model.float(), out / "onnx" / "model.onnx") < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": True}
    assert not (out / "onnx" / "model_quantized.onnx").exists() and not (out / "vendor").exists()
    assert (
        f"npm/@huggingface/transformers@{TRANSFORMERS_JS}/dist/transformers.min.js" in (out / "worker.js").read_text()
    )


def test_a_model_whose_frequencies_change_with_the_text_is_compared_call_by_call(tmp_path: Path) -> None:
    model = make_model(**CONFIGS["longrope"])
    (tmp_path / "model.onnx").write_bytes(to_proto(build_graph(model)).SerializeToString())
    assert largest_difference(model, tmp_path / "model.onnx") < 1e-5


def test_the_size_of_eight_bits_is_a_share_of_all_files(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(onnx, "LARGEST_FILE", 100_000)
    out = export("onnx", checkpoint, tmp_path / "out", q8=True)
    share = int(re.search(r"`model_quantized\.onnx` \((\d+)% of the size\)", (out / "README.md").read_text())[1])
    quantized, *exact = (out / "onnx" / f"model{rest}" for rest in ("_quantized.onnx", ".onnx", ".onnx_data"))
    assert share == round(100 * quantized.stat().st_size / sum(file.stat().st_size for file in exact))


def test_bad_input(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"node_modules must be a folder into which npm .* is missing\.$"):
        run(["onnx", str(checkpoint), str(tmp_path / "out"), "--node_modules", str(tmp_path)])
    # A graph that computes something else is not left behind.
    other = make_model(norm_eps=0.1)
    monkeypatch.setattr(onnx, "build_graph", lambda model, **_: build_graph(other))
    with pytest.raises(ValueError, match=r"^onnxruntime gives other logits than the model \(by \de.\d\d of"):
        export("onnx", checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """Where npm installed transformers.js, once for all runs of the tests on a machine."""
    if NODE is None or NPM is None:
        pytest.skip("there is no Node.js here")
    folder = Path(tempfile.gettempdir(), f"mini-transformers-js-{TRANSFORMERS_JS}")
    with FileLock(f"{folder}.lock"):
        if not all((folder / "node_modules" / name).is_file() for name in VENDORED):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            # The scripts of packages would fetch what a GPU needs.
            command = [NPM, "install", "--ignore-scripts", "--no-audit", "--no-fund"]
            command.append(f"@huggingface/transformers@{TRANSFORMERS_JS}")
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
            if result.returncode:
                pytest.skip(f"npm could not install transformers.js: {result.stderr.strip()[-300:]}")
    return folder / "node_modules"


IN_NODE = """
import { AutoTokenizer, pipeline } from "@huggingface/transformers";

const { folder, tokenizers, prompts, texts, tokens, messages } = JSON.parse(process.argv[1]);
const tokenized = [];
for (const place of tokenizers) {
  const tokenizer = await AutoTokenizer.from_pretrained(place);
  const ids = texts.map((text) => tokenizer(text).input_ids.tolist()[0].map(Number));
  const decoded = ids.map((each) => tokenizer.decode(each, { skip_special_tokens: true }));
  const chat = tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true });
  tokenized.push({ ids, decoded, chat });
}
const written = {};
for (const dtype of ["fp32", "q8"]) {
  const generator = await pipeline("text-generation", folder, { dtype });
  const outputs = await generator(prompts, { max_new_tokens: tokens, do_sample: false });
  written[dtype] = outputs.map(([{ generated_text }]) => generated_text);
}
console.log(JSON.stringify({ tokenized, written }));
"""


def in_node(node_modules: Path, code: str, *arguments: str) -> str:
    result = subprocess.run(
        [NODE, "--input-type=module", "--eval", code, *arguments], cwd=node_modules.parent,
        capture_output=True, text=True, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_in_node(node_modules: Path, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    """transformers.js: the same ids, the same chat, the same text as Mini; a padded batch, and the cards' snippets."""
    texts = ["", "héllo 日本\n 🎉\t x", "<|eos|> is text <|user|>", "\x00\x7f\u2028 é", "unknown: ß"]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    characters = CharTokenizer.from_text("".join(texts[:4]))
    merges = learned_merges()
    folders = [exported, tmp_path / "characters", tmp_path / "merges"]
    for tokenizer, folder in zip((characters, merges), folders[1:], strict=True):
        folder.mkdir()
        onnx.write_tokenizer(tokenizer, folder)
    request = {"folder": str(exported), "tokenizers": list(map(str, folders)), "tokens": 60}
    request |= {"prompts": PROMPTS, "texts": texts, "messages": messages}
    answer = json.loads(in_node(node_modules, IN_NODE, json.dumps(request)))
    for tokenizer, theirs in zip((ByteTokenizer(), characters, merges), answer["tokenized"], strict=True):
        ids = [tokenizer(text).input_ids for text in texts]
        assert theirs["ids"] == ids
        assert theirs["decoded"] == [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
        assert theirs["chat"] == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The prompts have different lengths, so two of them are padded.
    assert answer["written"]["fp32"] == [written_by_mini(checkpoint, prompt, 60) for prompt in PROMPTS]
    assert [text[:6] for text in answer["written"]["q8"]] == [text[:6] for text in answer["written"]["fp32"]]
    assert in_node(node_modules, snippet(exported, "js")) == written_by_mini(checkpoint, "The", 100) + "\n"
    model, tokenizer = load_model(str(checkpoint))
    ids, _ = encode_messages(tokenizer, messages[:1], add_generation_prompt=True)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=100, do_sample=False)[0, len(ids) :]
    of_a_chat = snippet(exported, "js", onnx.usage_of_chat().replace("QUESTION", '"hi"'))
    assert in_node(node_modules, of_a_chat) == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


@pytest.fixture(scope="module")
def page_folder(node_modules: Path, checkpoint: Path) -> Path:
    """The page of a model that says what it is, and answers in turns where the test asks for a chat."""
    card = "---\nmini:\n  dataset: fairy tales\n  prompts: ['the ', 'once']\n---\n"
    (checkpoint / "README.md").write_text(card, encoding="utf-8")
    return export("onnx", checkpoint, checkpoint.with_name("page"), node_modules=str(node_modules))


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


in_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here")
# A phone that has no WebGPU, and remembers what the page said while it loaded.
PHONE = """
delete Navigator.prototype.gpu;
addEventListener("DOMContentLoaded", () => {
  const status = document.getElementById("status");
  window.said = [status.textContent];
  new MutationObserver(() => said.push(status.textContent)).observe(status, { childList: true });
});
"""


@pytest.mark.slow
@in_chromium
def test_in_a_browser(opened: Opener, page_folder: Path, checkpoint: Path) -> None:
    """The page writes what generate.py writes, far beyond the context, and asks nobody but the server of its folder."""
    model, tokenizer = load_model(str(checkpoint))
    with served(page_folder) as url, opened(url, script=PHONE) as found:
        page = found.page
        assert page.title() == "Mini: checkpoint" and page.inner_text("h1") == "checkpoint"
        about = page.inner_text("#about")
        assert "parameters, trained on fairy tales." in about and "what you write here stays here" in about
        assert page.input_value("#prompt") == "the "
        assert page.locator("#examples button").all_text_contents() == ["the ", "once"]
        page.wait_for_selector("#write:enabled")
        said = page.evaluate("said")
        assert said[0] == "Loading" and said[-1] == "Ready." and "Loading the model: 100 %" in said
        for prompt in (PROMPT, "a long prompt, which is longer than the context " * 2):
            ids = tokenizer(prompt).input_ids
            (expected,) = write_on(model, tokenizer, [ids], GREEDY, lambda notice: None)
            assert browser.write(page, prompt, temperature=0, max_new_tokens=GREEDY.max_new_tokens) == (
                prompt + expected.text
            )
        assert "The prompt has 97 tokens and the context 48: only the last 23 tokens" in page.inner_text("#notice")
        first = browser.write(page, PROMPT, temperature=0.9, top_p=0.9, top_k=50, seed=4, max_new_tokens=60)
        assert browser.write(page, PROMPT) == first, "the same seed, the same text"
        assert browser.write(page, PROMPT, seed=5) != first
        browser.check_colours(page)
        browser.check_other_character(page, 3)
        assert page.is_hidden("#inside")
        browser.check_stop(page)
        assert found.elsewhere == [] and found.wrong == []


@pytest.mark.slow
@in_chromium
@pytest.mark.parametrize("screen", browser.SCREENS, ids=str)
def test_on_every_screen(opened: Opener, page_folder: Path, screen: tuple[int, int, str], tmp_path: Path) -> None:
    with served(page_folder) as url, opened(url, *screen) as found:
        browser.write(found.page, PROMPT, max_new_tokens=40, seed=1)
        found.page.locator("#text .piece").nth(4).click()
        browser.check_layout(found.page)
        assert browser.share_of_red(found.page, tmp_path / "text.png") > 0.01
        assert found.wrong == []


@pytest.mark.slow
@in_chromium
def test_a_chat_in_a_browser(opened: Opener, node_modules: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The ids that are read are those of `encode_messages`, so the first answer is Mini's."""
    shutil.copytree(checkpoint, tmp_path / "chat")
    model, tokenizer = load_model(str(tmp_path / "chat"))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.save_pretrained(tmp_path / "chat")
    folder = export("onnx", tmp_path / "chat", tmp_path / "page", node_modules=str(node_modules))
    ids, _ = encode_messages(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
    (expected,) = write_on(model, tokenizer, [ids], dataclasses.replace(GREEDY, max_new_tokens=15), lambda notice: None)
    with served(folder) as url, opened(url) as found:
        assert browser.write(found.page, "hi", temperature=0, max_new_tokens=15) == expected.text
        found.page.evaluate("document.querySelector('#status').textContent = ''")
        browser.write(found.page, "a message that takes the room of the first", max_new_tokens=15)
        assert "The oldest 1 of the turns did not fit" in found.page.inner_text("#notice")
        assert found.page.locator(".said").count() == 2 and found.wrong == []


@pytest.mark.slow
@in_chromium
def test_what_cannot_be_loaded_is_said_in_a_sentence(
    opened: Opener, exported: Path, page_folder: Path, tmp_path: Path
) -> None:
    """A page from a file, one whose library is not to be had, and one whose model is still being written."""
    with opened((exported / "index.html").as_uri()) as found:
        assert "opened from a file" in found.page.inner_text("#problem")
        assert "python -m http.server" in found.page.inner_text("#problem") and found.page.is_disabled("#write")
    folder = tmp_path / "page"
    shutil.copytree(page_folder, folder, ignore=shutil.ignore_patterns("model.onnx"))
    for missing, sentence in (
        ("", "could not be loaded: if it is still being written, load the page again when that is done ("),
        ("vendor/transformers.min.js", "The page could not load transformers.js, which runs the model ("),
    ):
        (folder / missing).unlink() if missing else None
        with served(folder) as url, opened(url) as found:
            found.page.wait_for_function("document.querySelector('#problem').textContent !== ''")
            assert sentence in found.page.inner_text("#problem") and found.page.is_disabled("#write")
    with served(page_folder) as url, opened(url, script="delete window.WebAssembly") as found:
        found.page.wait_for_function("document.querySelector('#problem').textContent !== ''")
        assert found.page.inner_text("#problem").startswith("This browser runs no WebAssembly")
