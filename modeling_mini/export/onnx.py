"""
Writes a Mini for onnxruntime and transformers.js, with a web page that generates in the browser.

    OUT/onnx/model.onnx             prefill and decoding with a cache (onnx_graph.py)
    OUT/onnx/model_quantized.onnx   with --q8: its matrices as integers of 8 bits
    OUT/config.json, generation_config.json, tokenizer files
    OUT/index.html, page.css, *.js  the page (modeling_mini/web); any web server can serve the folder
    OUT/labels.json                 a readable name for each token, for the page
    OUT/vendor/                     with --node_modules: transformers.js itself, so that the page needs no network
"""

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from files_mini import display_name, writing
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.inputs import token_labels
from ..modeling_mini import MiniForCausalLM
from ..web import PAGE_FILES, describe, render_page
from .card import ExportCard
from .formats import VENDORED
from .native import SHARED_FIELDS
from .onnx_graph import build_graph

WEB = Path(__file__).parent / "web"
# The version that the tests run, and the files of it and of its onnxruntime-web that the page loads.
TRANSFORMERS_JS = "4.3.1"
CDN = f"https://cdn.jsdelivr.net/npm/@huggingface/transformers@{TRANSFORMERS_JS}/dist"
# An ONNX file has at most two gigabytes; the weights of a larger model are in a second file.
LARGEST_FILE = 2**31 - 2**24
# For the check of the result: two sequences, the second with padding, in two calls with a cache between them.
CHECKED_TOKENS, LARGEST_DIFFERENCE = 128, 1e-3


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    q8: bool = False,
    node_modules: str | None = None,
) -> ExportCard:
    """
    Writes the graph, the files that transformers.js needs, and the page into the folder `out`.

    Args:
        q8: whether to write the copy with matrices of 8 bits too.
        node_modules: the folder to copy transformers.js from. Without it the page loads transformers.js from a CDN.

    Raises:
        ValueError: if the graph does not compute the same as the model.
    """
    graph = build_graph(model)
    path = out / "onnx" / "model.onnx"
    is_large = 4 * model.num_parameters() > LARGEST_FILE
    with writing(out):
        path.parent.mkdir()
        ir.save(graph, path, external_data="model.onnx_data" if is_large else None)
        model.generation_config.save_pretrained(out)
        write_tokenizer(tokenizer, out)
        config = transformers_js_config(model, is_large)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_page(model, tokenizer, out, node_modules)
    difference = largest_difference(model, path)
    if not difference < LARGEST_DIFFERENCE:
        raise ValueError(f"onnxruntime gives other logits than the model (by {difference:.0e} of the largest).")
    exactness = (
        f"When this was written, the logits of onnxruntime on random tokens differed from Mini's by {difference:.0e} "
        f"of the largest, which is rounding."
    )
    if q8:
        exact_size = sum(file.stat().st_size for file in path.parent.iterdir())  # weights may be in a second file
        quantized = path.with_name("model_quantized.onnx")
        with writing(out):
            quantize(model, quantized)
        exactness += (
            f" Those of `model_quantized.onnx` ({quantized.stat().st_size / exact_size:.0%} of the size) "
            f"differed by {largest_difference(model, quantized):.0e}."
        )
    return ExportCard(
        title=f"Mini in ONNX, {model.num_parameters() / 1e6:.1f}M parameters",
        usage=USAGE,
        usage_of_chat=usage_of_chat(),
        exactness=exactness,
        facts={"operators": "ONNX, opset 23, without extensions"},
        library_name="transformers.js",
        tags=["onnx", "transformers.js"],
    )


def transformers_js_config(model: MiniForCausalLM, is_large: bool) -> dict[str, Any]:
    """
    The `config.json` for transformers.js. It knows a fixed list of model types without Mini, so the model is called a
    Llama. transformers.js takes the names of inputs and the number of layers from there, and all else from the graph,
    so this is right for every kind of Mini.
    """
    names = [name for name in (*SHARED_FIELDS, "head_dim") if not name.endswith("_token_id")]
    # If `generation_config.json` has no such id, transformers means that there is none. transformers.js would look
    # here.
    ids = {name: getattr(model.generation_config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    # In a browser, transformers.js looks for the quantized file by default.
    own = {"dtype": "fp32", **({"use_external_data_format": True} if is_large else {})}
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **{name: getattr(model.config, name) for name in names},
        **{name: token_id for name, token_id in ids.items() if token_id is not None},
        "transformers.js_config": own,
    }


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes the files of the tokenizer, with the entries of `tokenizer_config.json` that transformers.js needs."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # facts about this machine
        config.pop(name, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Without this entry, the text-generation pipeline of transformers.js does not add bos.
    config["add_bos_token"] = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template  # transformers.js does not read chat_template.jinja
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_page(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, node_modules: str | None) -> None:
    """Writes the page. It loads transformers.js from the folder `vendor/` beside it, or from a CDN."""
    description = describe(model, tokenizer, display_name(model.name_or_path))
    description["sentences"].append("It runs in this page, on your device: what you write here stays here.")
    (out / "index.html").write_text(render_page(description), encoding="utf-8")
    labels = token_labels(tokenizer, list(range(len(tokenizer))))
    names = {"labels": labels, "special": tokenizer.all_special_ids}
    (out / "labels.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    library = CDN if node_modules is None else "./vendor"
    for source in (*PAGE_FILES, *WEB.iterdir()):
        text = source.read_text(encoding="utf-8").replace("LIBRARY", library)
        (out / source.name).write_text(text, encoding="utf-8")
    if node_modules is not None:
        (out / "vendor").mkdir()
        for name in VENDORED:
            shutil.copyfile(Path(node_modules, name), out / "vendor" / Path(name).name)


def quantize(model: MiniForCausalLM, path: Path) -> None:
    """
    Writes a graph with matrices of 8 bits, with one scale for each output. Activations are quantized as it runs.

    The weights are UINT8, as the activations are. For INT8 weights, onnxruntime adds pairs of products in 16 bits on
    processors without VNNI, where they overflow.
    """
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)  # it recommends a step that changes nothing here
    try:
        quantize_dynamic(
            ir.to_proto(build_graph(model, share_embedding=False)),
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logger.setLevel(before)


def largest_difference(model: MiniForCausalLM, path: Path) -> float:
    """
    The largest difference between the logits of the model and of a file, as a share of the largest logit. Both read in
    two calls: with `longrope`, the frequencies of a call depend on how far the text has come.
    """
    length = max(4, min(CHECKED_TOKENS, model.config.max_position_embeddings) // 4 * 4)
    random = np.random.default_rng(0)
    input_ids = random.integers(model.config.vocab_size, size=(2, length))
    attention_mask = np.ones_like(input_ids)
    attention_mask[1, : length // 4] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clip(min=0)
    feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    cache, mini, past = empty_cache(session, batch_size=2), copy.deepcopy(model).float().eval(), None
    logits: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    for part in (slice(0, length // 2), slice(length // 2, length)):
        now = {name: array[:, part] for name, array in feeds.items()}
        now["attention_mask"] = attention_mask[:, : part.stop]
        first, *present = session.run(None, {**now, **cache})
        cache = dict(zip(cache, present, strict=True))
        logits["theirs"].append(first)
        with torch.no_grad():
            output = mini(
                **{name: torch.tensor(array) for name, array in now.items()}, past_key_values=past, use_cache=True
            )
        past = output.past_key_values
        logits["ours"].append(output.logits.numpy())
    is_token = attention_mask.astype(bool)
    ours, theirs = (np.concatenate(parts, axis=1)[is_token] for parts in logits.values())
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def empty_cache(session: onnxruntime.InferenceSession, batch_size: int) -> Mapping[str, np.ndarray]:
    """The cache before the first token: the name of each input, with an empty array."""
    return {
        value.name: np.zeros((batch_size, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }


USAGE = """
In Python, with `pip install onnxruntime transformers`:

```python
from pathlib import Path

import numpy as np
import onnxruntime
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

folder = "PATH_OR_REPOSITORY"
if not Path(folder).is_dir():
    folder = snapshot_download(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx")

inputs = dict(tokenizer(["The", "Once upon"], padding=True, return_tensors="np"))
inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clip(min=0)
cache = {
    value.name: np.zeros((len(inputs["input_ids"]), value.shape[1], 0, value.shape[3]), np.float32)
    for value in session.get_inputs()
    if value.name.startswith("past_key_values.")
}
written = []
for _ in range(100):
    logits, *present = session.run(None, {**inputs, **cache})
    cache = dict(zip(cache, present))
    inputs["input_ids"] = logits[:, -1:].argmax(-1)
    inputs["attention_mask"] = np.pad(inputs["attention_mask"], ((0, 0), (0, 1)), constant_values=1)
    inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
    written.append(inputs["input_ids"])
for ids in np.concatenate(written, axis=1):
    print(tokenizer.decode(ids, skip_special_tokens=True))
```

In JavaScript, with `npm install @huggingface/transformers`:

```js
import { pipeline } from "@huggingface/transformers";

const generator = await pipeline("text-generation", "PATH_OR_REPOSITORY");
const [{ generated_text }] = await generator("The", { max_new_tokens: 100, do_sample: false });
console.log(generated_text);
```

In a browser: the folder holds a page that writes. Any web server of files will do, for example
`python -m http.server --directory FOLDER`.
"""


def usage_of_chat() -> str:
    """`USAGE` with one message in the place of two prompts, up to the end of the answer."""
    usage = USAGE
    for before, after in {
        "import AutoTokenizer": "import AutoTokenizer, GenerationConfig",
        'inputs = dict(tokenizer(["The", "Once upon"], padding=True, return_tensors="np"))\n': """
ends = np.atleast_1d(GenerationConfig.from_pretrained(folder).eos_token_id)
messages = [{"role": "user", "content": QUESTION}]
inputs = dict(
    tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="np")
)
""".lstrip(),
        '    written.append(inputs["input_ids"])\n': """
    written.append(inputs["input_ids"])
    if inputs["input_ids"].item() in ends:
        break
""".lstrip("\n"),
        'const [{ generated_text }] = await generator("The", {': """
const messages = [{ role: "user", content: QUESTION }];
const [{ generated_text }] = await generator(messages, {
""".strip(),
        "console.log(generated_text);": "console.log(generated_text.at(-1).content);",
    }.items():
        usage = usage.replace(before, after)
    return usage
