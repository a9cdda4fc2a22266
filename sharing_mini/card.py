"""
The model card, from facts: the configuration, the card that the trainer or exporter left in the folder, and the run.

Nothing is made up: a row, a section or a sentence whose fact is missing is left out.
"""

import importlib.metadata
import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from files_mini import read_text
from huggingface_hub import ModelCard, ModelCardData
from modeling_mini.export.card import MARK as OF_EXPORT
from modeling_mini.export.card import read_card, rows_of
from modeling_mini.remote_code import ROOT_FILES, remote_code_files

from .staging import CARD, CURVES, Source, Staged
from .verification import SEED, Proof

# Where the settings of a run name places on the disk of whoever trained, or what only that machine needs.
NOT_OF_THE_MODEL = ("cache_dir", "report_to", "peak_tflops", "on_save_error", "keep_last", "keep_every")
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "hidden_act", "norm_type", "qk_norm", "tie_word_embeddings",
)  # fmt: skip
ADAPTER = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules")
PROMPT = "The "
HEADINGS = (
    "How to use", "Data and tokenizer", "Architecture", "Training", "Evaluation", "A sample", "Limits", "License",
    "How to reproduce",
)  # fmt: skip
MARK = "<!-- Written by push_to_hub.py of Mini. The next push keeps what stands under headings of your own. -->"
# What is in cards that programs write: Mini's trainer, its exporters and quantizer, and peft.
PLACEHOLDER, OF_PEFT, QUANTIZED = "PATH_OR_REPOSITORY", "# Model Card for Model ID", "## Quantized"
# Metadata that say what is in the repository; all others are the user's to set, also on the Hub.
OF_THE_FILES = ("model-index", "library_name", "pipeline_tag", "base_model")


@dataclass
class Facts:
    """
    What is known of a model.

    Attributes:
        metadata, rows: of the card in the folder; what the user has set on the Hub goes along.
        own_text: a card that somebody wrote by hand, in the folder or on the Hub.
        kept: sections that somebody added to a card of Mini's.
        settings: of the run, without what belongs to one machine; empty where there is no run.
        metrics: the last line of training at or before the evaluation that the card speaks of.
        code: the commit of Mini whose code the folder carries.
    """

    repository: str
    metadata: dict[str, Any]
    rows: dict[str, str]
    settings: dict[str, Any]
    metrics: dict[str, float]
    code: str | None
    own_text: str | None = None
    kept: list[str] = field(default_factory=list)

    @property
    def dataset(self) -> str | None:
        return self.settings.get("dataset")


def gather(source: Source, staged: Staged, repository: str, there: str | None = None) -> Facts:
    """
    The facts that lie in the folder, in the run and in the repository of the code.

    Args:
        there: the card that is on the Hub now.

    Raises:
        ValueError: for a card or settings that cannot be read, naming them.
    """
    path = source.folder / CARD
    here = read_card(path) if path.is_file() else ModelCard("---\n{}\n---\n")
    metadata = here.data.to_dict()
    of_mini, kept = sections_of(here.text)
    own_text = here.text if is_own(here.text) else None
    if there is not None:
        on_the_hub, text = metadata_and_text(there)
        metadata |= {
            name: value for name, value in on_the_hub.items() if name not in metadata and name not in OF_THE_FILES
        }
        headings = [QUANTIZED.removeprefix("## "), *map(heading_of, kept)]  # the first is true of those files alone
        kept += [section for section in sections_of(text)[1] if heading_of(section) not in headings]
        if own_text is None and is_own(text):
            own_text = text
    settings, metrics = {}, {}
    if source.run is not None:
        settings = settings_of(source.run)
        metrics = metrics_of(source.run, metadata)
    return Facts(repository, metadata, rows_of(of_mini), settings, metrics, commit_of_code(staged), own_text, kept)


def metadata_and_text(card: str) -> tuple[dict[str, Any], str]:
    """Of a card that is on the Hub, where nothing can be set right now: what cannot be read is text."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*?\n?", card, flags=re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        metadata = {}
    return metadata if isinstance(metadata, dict) else {}, card[match.end() :] if match else card


def is_own(text: str) -> bool:
    """Whether a person wrote the text of a card: no program of those whose cards Mini replaces did."""
    if any(words in text for words in (MARK, OF_EXPORT, PLACEHOLDER, OF_PEFT)):
        return False
    # A title alone says nothing of a person's, nor what quantizing adds under it.
    return any(line.strip() and not line.startswith("#") for line in text.split(QUANTIZED)[0].splitlines())


def sections_of(text: str) -> tuple[str, list[str]]:
    """The text without the sections that Mini did not write, and those; a heading within a fence is none."""
    sections, fence = [[]], None
    for line in text.replace(MARK, "").splitlines():
        if ticks := re.match("`{3,}", line):
            fence = ticks[0] if fence is None else None if line.strip() == fence else fence
        if fence is None and line.startswith("## "):
            sections.append([])
        sections[-1].append(line)
    texts = ["\n".join(lines).strip() for lines in sections]
    kept = [] if OF_PEFT in text else [section for section in texts[1:] if heading_of(section) not in HEADINGS]
    return "\n\n".join(section for section in texts if section not in kept), kept


def heading_of(section: str) -> str:
    return section.splitlines()[0].removeprefix("## ").strip()


def settings_of(run: Path) -> dict[str, Any]:
    """The settings of a run as anybody may read them: a place on a disk becomes its last part."""
    path = run / "config.yaml"
    try:
        settings = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold lines of the form 'name: value'.")
    return {name: without_place(value) for name, value in settings.items() if name not in NOT_OF_THE_MODEL}


def without_place(value: Any) -> Any:
    """A setting without the folders that it names."""
    if isinstance(value, list):
        return [without_place(each) for each in value]
    is_place = isinstance(value, str) and (value.startswith((".", "~", "/")) or (value != "" and Path(value).exists()))
    return Path(value).name if is_place else value


def metrics_of(run: Path, metadata: dict[str, Any]) -> dict[str, float]:
    """The metrics of training at the step whose evaluation the card has; found by the figure itself."""
    path = run / "metrics.jsonl"
    losses = {
        metric["value"]
        for model in metadata.get("model-index", []) for result in model["results"] for metric in result["metrics"]
        if metric["type"] == "loss"
    }  # fmt: skip
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # cut short by a crash
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    step = next((line["step"] for line in lines if line.get("eval_loss") in losses), None)
    if step is None:
        return {}
    return next((line for line in reversed(lines) if line["step"] <= step and "tokens" in line), {})


def commit_of_code(staged: Staged) -> str | None:
    """The commit of Mini's repository, if the code that the folder carries is what that commit has."""
    if not staged.has_code:
        return None
    carried = {name: path.read_text(encoding="utf-8") for name, path in staged.files.items() if path.suffix == ".py"}
    if carried != remote_code_files():
        return None
    root = Path(__file__).parent.parent
    paths = [name if name in ROOT_FILES else f"modeling_mini/{name}" for name in carried]
    try:
        changed, head, top = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["status", "--porcelain", "--", *paths],
                ["rev-parse", "HEAD"],
                ["rev-parse", "--show-toplevel"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # there is no git, or Mini is installed and not cloned
    return head if Path(top) == root and not changed else None


def write_card(facts: Facts, staged: Staged, license: str | None, proof: Proof | None, revision: str | None) -> None:
    """Writes `README.md` into the staged folder."""
    data = card_data(facts, staged, license)
    if facts.own_text is not None:
        sections = [facts.own_text.strip()]
    elif is_export(staged):
        # The exporter wrote how to run it, and what equals Mini; only what it could not know is added.
        text, _ = sections_of(read_card(staged.folder / CARD).text)
        for heading in HEADINGS:  # of an earlier push
            text = re.sub(rf"^## {heading}\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
        text = text.strip().replace(PLACEHOLDER, facts.repository)
        sections = [
            text, evaluation(facts, staged), sample(proof), *facts.kept, licence(license), reproduction(facts), MARK,
        ]  # fmt: skip
    else:
        sections = [
            introduction(facts, staged, proof),
            usage(facts, staged, revision),
            data_section(facts),
            architecture(staged),
            training(facts),
            evaluation(facts, staged),
            sample(proof),
            *facts.kept,
            limits(facts, staged),
            licence(license),
            reproduction(facts),
            MARK,
        ]
    body = "\n\n".join(section for section in sections if section)
    (staged.folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{body}\n", encoding="utf-8")


def is_export(staged: Staged) -> bool:
    """Whether the folder is one of `modeling_mini.export`, with its card: a Mini that brings no code of Mini."""
    path = staged.folder / CARD
    return not staged.has_code and path.is_file() and OF_EXPORT in read_text(path)


def card_data(facts: Facts, staged: Staged, license: str | None) -> ModelCardData:
    """The metadata: that of the card in the folder, and what the push adds."""
    metadata = dict(facts.metadata)
    metadata.setdefault("pipeline_tag", "text-generation")
    if staged.kind in ("model", "adapter"):
        metadata["library_name"] = "peft" if staged.kind == "adapter" else "transformers"
    # peft names the base among the tags too, by the place on the disk where it lay.
    tags = metadata.pop("tags", None) or []
    tags = [tag for tag in ([tags] if isinstance(tags, str) else tags) if not str(tag).startswith("base_model:")]
    if staged.config.get("model_type") == "mini":
        tags.insert(0, "mini")
    if staged.kind == "adapter":
        metadata["base_model"] = staged.config["base_model_name_or_path"]
    if tags:
        metadata["tags"] = list(dict.fromkeys(tags))
    if license is not None:
        metadata["license"] = license
    for model in metadata.get("model-index", []):
        model["name"] = facts.repository.split("/")[-1]
    return ModelCardData(**metadata)


def introduction(facts: Facts, staged: Staged, proof: Proof | None) -> str:
    name = facts.repository.split("/")[-1]
    size = f" of {proof.parameters:,} parameters" if proof is not None else ""
    on = f", trained on `{facts.dataset}`" if facts.dataset else ""
    if staged.kind == "adapter":
        base = staged.config["base_model_name_or_path"]
        return f"# {name}\n\nAn adapter ({staged.config.get('peft_type', 'PEFT')}) for [{base}](https://huggingface.co/{base}){on}."
    kind = staged.config.get("model_type", "")
    kind = "[Mini](#architecture)" if kind == "mini" else kind
    quantization = staged.config.get("quantization_config")
    how = f", quantized ({quantization_name(quantization)})" if quantization else ""
    return f"# {name}\n\nA small {kind} language model{size}{on}{how}. It continues text."


def quantization_name(quantization: dict[str, Any]) -> str:
    method = quantization.get("quant_method", "")
    if quantization.get("load_in_4bit"):
        return f"{method} INT4, {quantization.get('bnb_4bit_quant_type', 'fp4')}".strip()
    return f"{method} INT8".strip() if quantization.get("load_in_8bit") else method


def usage(facts: Facts, staged: Staged, revision: str | None) -> str:
    """Three snippets that run as they stand."""
    name = facts.repository
    at = "" if revision is None else f', revision="{revision}"'
    trust = ", trust_remote_code=True" if staged.has_code or staged.kind == "adapter" else ""
    prompt = PROMPT.strip()
    needs = ["torch", "transformers"]
    if staged.has_code and "transformers_version" in staged.config:
        needs[1] = f'"transformers>={staged.config["transformers_version"]}"'  # the code was not tried with older ones
    if staged.kind == "adapter":
        needs.append("peft")
    if staged.config.get("quantization_config"):
        needs += ["accelerate", "bitsandbytes"]
    lines = [f"## How to use\n\n```text\npip install {' '.join(needs)}\n```"]
    if staged.kind == "adapter":
        base = staged.config["base_model_name_or_path"]
        lines.append(f'''```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}"{trust})
base = AutoModelForCausalLM.from_pretrained("{base}"{trust})
model = PeftModel.from_pretrained(base, "{name}"{at})
output = model.generate(**tokenizer("{prompt}", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

Merged into the model, which makes it as fast as before:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

base = AutoModelForCausalLM.from_pretrained("{base}"{trust})
model = PeftModel.from_pretrained(base, "{name}"{at}).merge_and_unload()
tokenizer = AutoTokenizer.from_pretrained("{base}"{trust})
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generator("{prompt}", max_new_tokens=40)[0]["generated_text"])
```

With Mini installed, from the command line:

```bash
mini-generate --adapter {name} --prompt "{prompt} " --max_new_tokens 40
```''')
        return "\n\n".join(lines)
    lines.append(f'''```python
from transformers import pipeline

generator = pipeline("text-generation", model="{name}"{at}{trust})
print(generator("{prompt}", max_new_tokens=40)[0]["generated_text"])
```

Step by step:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{at}{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{at}{trust})
output = model.generate(**tokenizer("{prompt}", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```''')
    if revision is None:
        lines.append(f'''With Mini installed, from the command line:

```bash
mini-generate --model {name} --prompt "{prompt} " --max_new_tokens 40
```''')
    if staged.has_code:
        lines.append(
            "`trust_remote_code=True` runs the Python files of this repository, which are the model's architecture; "
            "with Mini installed, `import modeling_mini` makes it unnecessary."
        )
    return "\n\n".join(lines)


def data_section(facts: Facts) -> str:
    if not facts.dataset:
        return ""
    settings = facts.settings
    lines = [f"Trained on `{facts.dataset}`"]
    if settings.get("dataset_config"):
        lines[0] += f", configuration `{settings['dataset_config']}`"
    evaluated = settings.get("max_eval_tokens")
    if settings.get("streaming") and evaluated:
        lines[0] += f"; its first documents, of {evaluated:,} tokens together, were held out for the evaluation below"
    elif "validation_ratio" in settings:
        lines[0] += f"; a share of {settings['validation_ratio']:g} of it was held out for the evaluation below"
        lines[0] += f", which reads at most the first {evaluated:,} tokens of that" if evaluated else ""
    lines[0] += "."
    if "tokens" in facts.metrics:
        epoch = facts.metrics.get("epoch")
        times = f", which is {epoch:.2f} times the training part" if epoch is not None else ""
        lines.append(f"It has read {facts.metrics['tokens']:,} tokens{times}.")
    tokenizer = settings.get("tokenizer")
    if tokenizer:
        described = {
            "byte": "Its tokens are bytes, so it takes any text in any script.",
            "char": "Its tokens are the characters of the training text; others are read as `<|unk|>`.",
        }
        lines.append(described.get(tokenizer, f"Its tokenizer is that of `{tokenizer}`."))
    return "## Data and tokenizer\n\n" + " ".join(lines)


def architecture(staged: Staged) -> str:
    rows = [(name, staged.config[name]) for name in SHAPE if staged.config.get(name) is not None]
    rope = staged.config.get("rope_parameters")
    if rope:
        rows.append(("rope", ", ".join(f"{name} {value}" for name, value in sorted(rope.items()))))
    if staged.kind == "adapter":
        rows = [(name, staged.config[name]) for name in ADAPTER if staged.config.get(name) is not None]
        rows = [(name, ", ".join(sorted(value)) if isinstance(value, list) else value) for name, value in rows]
    return f"## Architecture\n\n{table(rows)}" if rows else ""


def table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def training(facts: Facts) -> str:
    """What the trainer wrote of itself, as it wrote it; a card of ours, pushed again, has the other rows in it too."""
    others = {*SHAPE, *ADAPTER, "rope", *(name for name, _ in evaluation_rows(facts))}
    rows = [(name, value) for name, value in facts.rows.items() if name not in others]
    return f"## Training\n\n{table(rows)}" if rows else ""


def evaluation_rows(facts: Facts) -> list[tuple[str, str]]:
    return [
        (f"{metric.get('name') or metric['type']}, {result['dataset']['name']}", f"{metric['value']:.4f}")
        for model in facts.metadata.get("model-index", []) for result in model["results"]
        for metric in result["metrics"] if isinstance(metric["value"], int | float)
    ]  # fmt: skip


def evaluation(facts: Facts, staged: Staged) -> str:
    rows = evaluation_rows(facts)
    parts = [table(rows)] if rows else []
    if (staged.folder / CURVES).is_file():
        parts.append(f"![Bits per byte over the steps of training]({CURVES})")
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def sample(proof: Proof | None) -> str:
    if proof is None:
        return ""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", proof.sample)), default=0))
    text = proof.sample.replace("\r", "")
    how = f"Written by these weights after {proof.prompt!r}, with seed {SEED}:"
    return f"## A sample\n\n{how}\n\n{fence}text\n{text}\n{fence}"


def limits(facts: Facts, staged: Staged) -> str:
    sentences = []
    length = staged.config.get("max_position_embeddings")
    if length:
        sentences.append(f"It sees at most {length} tokens at once.")
    if facts.dataset:
        sentences.append(
            f"It knows what is in `{facts.dataset}` and nothing else, with whatever is wrong or unfair in it."
        )
    sentences.append("What it writes is likely text and no statement of fact; nobody has tuned it to be harmless.")
    return "## Limits\n\n" + " ".join(sentences)


def licence(license: str | None) -> str:
    return f"## License\n\n{license}" if license is not None else ""


def reproduction(facts: Facts) -> str:
    """The settings as a file that the trainer reads back."""
    if not facts.settings:
        return ""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    settings = yaml.safe_dump(facts.settings, sort_keys=False, allow_unicode=True).strip()
    code = f" The code is that of Mini at commit `{facts.code}`." if facts.code else ""
    return f"""## How to reproduce

Save these settings as `config.yaml`, beside the data where that is a file, and give the command under them.{code} This
card was written with {versions}.

```yaml
{settings}
```

```text
python train_accelerate.py --config config.yaml
```"""
