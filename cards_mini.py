"""
Model cards: the facts of a model as data, and the one place that turns them into Markdown.

The facts stand in the front matter of `README.md`: what the Hub reads (`model-index`, `license`, ...), and Mini's own
under the key `mini`. The trainer, the exports and the push all read them from there, add what they know, and have the
card written anew; nobody looks for a fact in the Markdown.

What a person writes into a card stays. `mini.written` holds a checksum of each section as Mini wrote it: a section that
has another checksum, or is not in that list, is a person's. Cards from before `mini.written` are told apart by
`OLD_MARKS`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from entry_points_mini import dump_yaml
from files_mini import display_name, read_text
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

CARD = "README.md"
KEY = "mini"
# In the examples of a card that belongs to no repository yet.
PLACEHOLDER = "PATH_OR_REPOSITORY"
PROMPT = "The "  # where no fact says what kind of text the model continues
MARK = "<!-- Written by Mini. Sections that you add or change stay when the card is written again. -->"
# What programs left in a card before cards had `mini.written`: Mini's push, exports and trainer.
OLD_MARK_OF_EXPORTS = "<!-- Written by modeling_mini.export. -->"
OLD_MARKS = (
    "<!-- Written by push_to_hub.py of Mini. The next push keeps what stands under headings of your own. -->",
    OLD_MARK_OF_EXPORTS,
    PLACEHOLDER,
)
MARK_OF_PEFT = "# Model Card for Model ID"
# The sections in their order, by heading; TITLE is what stands before the first one. Those of people come before the
# limits.
TITLE, QUANTIZED, SAMPLE = "(title)", "Quantized", "A sample"
HEADINGS = (
    TITLE, "How to use", "Exactness", "Data and tokenizer", "Architecture", "Training", "Evaluation", QUANTIZED, SAMPLE,
    "Limits", "License", "How to reproduce",
)  # fmt: skip
BEFORE_LIMITS = HEADINGS[: HEADINGS.index("Limits")]
# Settings of a run that say something of one machine, and nothing of the model.
NOT_OF_THE_MODEL = ("cache_dir", "report_to", "peak_tflops", "on_save_error", "keep_last", "keep_every")
# The entries of a configuration that the table of the architecture shows: of a model, and of an adapter.
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "hidden_act", "norm_type", "qk_norm", "tie_word_embeddings",
)  # fmt: skip
ADAPTER = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules")


@strict
@dataclass
class Facts:
    """
    What is known of a model beyond its configuration. What is not known is `None` or empty, and left out of the card.

    Attributes:
        kind: "model", "adapter", or the format of an export.
        title: the heading of the card (default: the name of the repository).
        parameters: how many numbers the weights are.
        context: how many tokens the model reads at most.
        dataset: what it was trained on.
        base: the model that the training started from.
        adapter: the settings of the adapter that was trained, for people.
        is_merged: the adapter was added to the weights.
        is_chat: it was taught to answer in turns.
        step: the optimizer step after which the weights were saved.
        sequences: how many sequences it had learned from by then.
        optimizer: what people call the optimizer.
        tokens, epoch: how much the training had read by then, in tokens and in passes over the training part.
        prompts: beginnings for people to try, of the kind of text that it was trained on.
        compressors: bits per byte that a compressor needs for the held-out text, by name.
        settings: of the run, as its `config.yaml` has them, without what belongs to one machine.
        code: the commit of Mini whose code the folder carries.
        rows: further rows of the table of the architecture.
        written: the checksum of each section that Mini wrote, by heading.
    """

    kind: str = "model"
    title: str = ""
    parameters: int | None = None
    context: int | None = None
    dataset: str = ""
    base: str = ""
    adapter: str = ""
    is_merged: bool = False
    is_chat: bool = False
    step: int | None = None
    sequences: int | None = None
    optimizer: str = ""
    tokens: int | None = None
    epoch: float | int | None = None
    prompts: list[str] = field(default_factory=list)
    compressors: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    code: str | None = None
    rows: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> "Facts":
        """
        The facts of a front matter; names that this version does not know are left out.

        Raises:
            ValueError: if a value is of another type, naming it.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{KEY} must hold lines of the form 'name: value'")
        try:
            return cls(**{each.name: values[each.name] for each in dataclasses.fields(cls) if each.name in values})
        except StrictDataclassError as error:
            name = re.search(r"field '(\w+)'", str(error))
            raise ValueError(f"{KEY}.{name[1] if name else ''} has a value of another type than Mini writes") from None

    def as_dict(self) -> dict[str, Any]:
        """What is known, ready for YAML."""
        return {name: value for name, value in vars(self).items() if value not in (None, "", {}, [], False)}

    @property
    def is_export(self) -> bool:
        return self.kind not in ("model", "adapter")


@dataclass
class Sample:
    """
    What a model wrote.

    Attributes:
        prompt: the beginning of `text`; or the message of a user, to which `text` is the answer.
        is_chat: which of the two it is.
    """

    prompt: str
    text: str
    seed: int
    is_chat: bool = False


@dataclass
class Card:
    """
    A card that was read.

    Attributes:
        metadata: the front matter without `mini`.
        text: the Markdown under it.
        words: the sections that a person wrote or changed, headings included, by heading.
        sections: the same, of those that a program wrote.
        is_own: whether the whole card is a person's, and not only a section of it.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    text: str = ""
    words: dict[str, str] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    is_own: bool = False


def read_card(path: Path) -> Card:
    """
    The card in a file; an empty one where there is no file.

    Raises:
        ValueError: if the file or its front matter cannot be read, naming it.
    """
    if not path.is_file():
        return Card()
    text = read_text(path)
    logger = logging.getLogger("huggingface_hub.repocard")
    was_disabled, logger.disabled = logger.disabled, True  # it warns where there is no front matter, which is no fault
    try:
        card = ModelCard(text)
        metadata = card.data.to_dict()
        facts = Facts.from_dict(metadata.pop(KEY, {}))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).split(". Pass `")[0]  # advice to a caller of the library
        raise ValueError(f"The metadata of {path} cannot be read: {reason}.") from None
    finally:
        logger.disabled = was_disabled
    return card_of(metadata, facts, card.text)


def parse_card(text: str) -> Card:
    """A card on the Hub, where nobody can set it right now: metadata that cannot be read are left out."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*?\n?", text, flags=re.DOTALL)
    try:
        metadata = (yaml.safe_load(match[1]) if match else None) or {}
        if not isinstance(metadata, dict):  # no metadata, but words of a person between two rules
            return card_of({}, Facts(), text)
        facts = Facts.from_dict(metadata.pop(KEY, {}))
    except (yaml.YAMLError, ValueError):
        metadata, facts = {}, Facts()
    return card_of(metadata, facts, text[match.end() :] if match else text)


def card_of(metadata: dict[str, Any], facts: Facts, text: str) -> Card:
    """Sorts the sections of a card into those of a person and those of a program."""
    card = Card(metadata, facts, text)
    if MARK_OF_PEFT in text:
        return card  # a form that nobody has filled in
    is_of_mini = any(mark in text for mark in OLD_MARKS)
    for heading, section in split_sections(text).items():
        if facts.written:
            is_program = facts.written.get(heading) == checksum(section)
        else:
            is_program = heading == QUANTIZED or (is_of_mini and heading in HEADINGS)
        (card.sections if is_program else card.words)[heading] = section
    lines = "\n".join(card.words.values()).splitlines()
    says_something = any(line.strip() and not line.startswith("#") for line in lines)  # a title alone does not
    card.is_own = says_something and not card.sections.keys() - {QUANTIZED}
    return card


def split_sections(text: str) -> dict[str, str]:
    """The sections of a text, headings included, by heading; what looks like a heading inside a fence is none."""
    sections: dict[str, list[str]] = {}
    heading, fence = TITLE, None
    for mark in (MARK, *OLD_MARKS[:2]):
        text = text.replace(mark, "")
    for line in text.splitlines():
        if ticks := re.match("`{3,}", line):
            fence = ticks[0] if fence is None else None if line.strip() == fence else fence
        if fence is None and line.startswith("## "):
            heading = line.removeprefix("## ").strip()
        sections.setdefault(heading, []).append(line)
    texts = {heading: "\n".join(lines).strip() for heading, lines in sections.items()}
    return {heading: section for heading, section in texts.items() if section}


def checksum(section: str) -> str:
    """Eight characters that stand for the text of a section; spaces at the ends of its lines do not count."""
    lines = "\n".join(line.rstrip() for line in section.strip().splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()[:8]


def render(
    facts: Facts,
    metadata: dict[str, Any],
    config: dict[str, Any],
    before: Card | None = None,
    texts: dict[str, str] | None = None,
    repository: str = "",
    revision: str | None = None,
    trust_remote_code: bool = False,
    sample: Sample | None = None,
    has_curves: bool = False,
) -> str:
    """
    The text of a card.

    Args:
        metadata: what the Hub reads.
        config: of the model or the adapter; empty where the folder has none.
        before: the card that this one replaces. A person's sections stay, and so do those of a program for which
            there is nothing new to say.
        texts: sections that the caller has written, by heading.
        repository: the name on the Hub, if it has one.
        revision: the branch that the examples load, if it is not the main one.
        trust_remote_code: whether loading it runs code of the repository.
        sample: what the model wrote; `None` where that is not known.
        has_curves: whether `curves.png` lies beside the card.
    """
    before = before or Card()
    made = {
        TITLE: preamble(facts, config, repository),
        "How to use": usage(facts, config, repository, revision, trust_remote_code),
        "Data and tokenizer": data_section(facts),
        "Architecture": architecture(facts, config),
        "Training": training(facts),
        "Evaluation": evaluation(facts, metadata, has_curves),
        QUANTIZED: quantized(config, metadata),
        SAMPLE: sample_section(sample),
        "Limits": limits(facts),
        "License": section_of("License", str(metadata.get("license") or "")),
        "How to reproduce": reproduction(facts),
        **(texts or {}),
    }
    made = {heading: text for heading, text in made.items() if text}
    if before.is_own and not texts:
        made = {heading: text for heading, text in made.items() if heading == QUANTIZED}
        own = before.text.strip() if not before.sections else "\n\n".join(before.words.values())
        body = [own, *made.values()]
    else:
        words = words_of_the_source(before.words, made) if texts else before.words
        made = {**kept_sections(before, repository), **made}
        made = {heading: text for heading, text in made.items() if heading not in words}
        body = [*in_order({**made, **words}).values(), MARK]
        made = in_order(made)
    facts = dataclasses.replace(facts, written={heading: checksum(text) for heading, text in made.items()})
    data = ModelCardData(**metadata, **{KEY: facts.as_dict()})
    text = "\n\n".join(part for part in body if part)
    return f"---\n{dump_yaml(data.to_dict()).strip()}\n---\n\n{text}\n"


def kept_sections(before: Card, repository: str) -> dict[str, str]:
    """
    The sections of a program, which stay where there is nothing new to say. But a sample is that of earlier weights,
    and a licence stands in the metadata.
    """
    kept = {heading: text for heading, text in before.sections.items() if heading not in (SAMPLE, "License")}
    return {heading: text.replace(PLACEHOLDER, repository or PLACEHOLDER) for heading, text in kept.items()}


def in_order(sections: dict[str, str]) -> dict[str, str]:
    """In the order of `HEADINGS`, with those of other headings before the limits."""
    others = (heading for heading in sections if heading not in HEADINGS)
    order = (*BEFORE_LIMITS, *others, *HEADINGS[len(BEFORE_LIMITS) :])
    return {heading: sections[heading] for heading in order if heading in sections}


def words_of_the_source(words: dict[str, str], made: dict[str, str]) -> dict[str, str]:
    """
    What a person wrote of a model, for the card of its export: under a heading that says so where the export has
    another text of its own.
    """
    moved = {}
    for heading, section in words.items():
        text = re.sub(r"\A##? [^\n]*", "", section)  # without title or heading
        name = "The model" if heading == TITLE else f"{heading} (the model)" if heading in made else heading
        if section := section_of(name, text):
            moved[name] = section
    return moved


def section_of(heading: str, text: str) -> str:
    """A section with its heading; nothing if there is nothing to say."""
    return f"## {heading}\n\n{text.strip()}" if text.strip() else ""


def table(rows: list[tuple[str, Any]]) -> str:
    """A table of two columns; nothing without rows."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) if rows else ""


def preamble(facts: Facts, config: dict[str, Any], repository: str) -> str:
    """The title, and one sentence on what it is."""
    if facts.is_export and not facts.title:
        return ""  # an export from before cards held facts: its own words say it
    size = f" of {facts.parameters:,} parameters" if facts.parameters is not None else ""
    on = f", trained on `{facts.dataset}`" if facts.dataset else ""
    quantization = quantization_name(config)
    rounded = f", quantized ({quantization})" if quantization else ""
    if facts.kind == "adapter":
        base = config.get("base_model_name_or_path")
        link = f"[{base}](https://huggingface.co/{base})" if base else f"`{facts.base}`"
        method = config.get("peft_type", "LORA")
        what = "A LoRA adapter" if method == "LORA" else f"An adapter ({method})"
        sentence = f"{what} for {link}{on}. It works together with that model only."
        title = f"Adapter for {facts.base}"
    else:
        title = f"Mini, {facts.parameters / 1e6:.1f}M parameters" if facts.parameters is not None else "Mini"
        kind = config.get("model_type", "mini")
        kind = "[Mini](#architecture)" if kind == "mini" else kind
        if facts.base:
            way = " through a LoRA adapter, which is merged into it" if facts.is_merged else ""
            tuned = f", fine-tuned on `{facts.dataset}`{way}" if facts.dataset else ""
            sentence = f"`{facts.base}`, a small decoder-only language model{tuned}{rounded}."
        else:
            does = "answers in turns" if facts.is_chat else "continues text"
            sentence = f"A small {kind} language model{size}{on}{rounded}. It {does}."
    return f"# {facts.title or repository.split('/')[-1] or title}\n\n{sentence}"


def quantization_name(config: dict[str, Any]) -> str:
    """How the weights are quantized, in a few words; nothing if they are not."""
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "")
    if quantization.get("load_in_4bit"):
        return f"{method} INT4, {quantization.get('bnb_4bit_quant_type', 'fp4')}".strip()
    return f"{method} INT8".strip() if quantization.get("load_in_8bit") else str(method)


def usage(
    facts: Facts, config: dict[str, Any], repository: str, revision: str | None, trust_remote_code: bool
) -> str:  # fmt: skip
    """Examples that run as they stand. An export brings its own."""
    if facts.is_export:
        return ""
    name, is_adapter = repository or PLACEHOLDER, facts.kind == "adapter"
    is_mini = config.get("model_type", "mini") == "mini"
    at = "" if revision is None else f', revision="{revision}"'
    trust = ", trust_remote_code=True" if trust_remote_code else ""
    beginning = first_prompt(facts)
    needs = ["torch", "transformers"]
    if trust_remote_code and not is_adapter and "transformers_version" in config:
        needs[1] = f'"transformers>={config["transformers_version"]}"'  # the code was not tried with older ones
    needs += ["peft"] * is_adapter + ["accelerate", "bitsandbytes"] * bool(config.get("quantization_config"))
    lines = [f"```text\npip install {' '.join(needs)}\n```"]
    base = config.get("base_model_name_or_path")
    write, write_by_pipeline = examples_of(beginning, facts.is_chat)
    imported = settings = ""
    if is_adapter and facts.is_chat:  # with those of the base, which peft leaves, an answer does not end
        imported = ", GenerationConfig"
        settings = f'\nmodel.generation_config = GenerationConfig.from_pretrained("{name}"{at})'
    if is_adapter and base:
        lines.append(f'''```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{imported}

tokenizer = AutoTokenizer.from_pretrained("{base}"{trust})
base = AutoModelForCausalLM.from_pretrained("{base}"{trust})
model = PeftModel.from_pretrained(base, "{name}"{at}){settings}
{write}
```

Merged into the model, which makes it as fast as before:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{imported}, pipeline

base = AutoModelForCausalLM.from_pretrained("{base}"{trust})
model = PeftModel.from_pretrained(base, "{name}"{at}).merge_and_unload(){settings}
tokenizer = AutoTokenizer.from_pretrained("{base}"{trust})
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
{write_by_pipeline}
```''')
    elif is_adapter:
        lines.append(f'''```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer{imported}

model = AutoPeftModelForCausalLM.from_pretrained("{name}"{trust}){settings}
tokenizer = AutoTokenizer.from_pretrained("{name}")
{write}
```''')
    else:
        lines.append(f'''```python
from transformers import pipeline

generator = pipeline("text-generation", model="{name}"{at}{trust})
{write_by_pipeline}
```

Step by step:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{at}{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{at}{trust})
{write}
```''')
    if is_adapter or revision is None:
        flag = "adapter" if is_adapter else "model"
        how = "--interactive" if facts.is_chat else f"--prompt {shlex.quote(beginning)} --max_new_tokens 40"
        run_code = " --trust_remote_code" if trust_remote_code and not is_mini and not is_adapter else ""
        lines.append(f"""With Mini installed, from the command line:

```bash
mini-generate --{flag} {name} {how}{run_code}
```""")
    if trust_remote_code and not is_adapter:
        lines.append(
            "`trust_remote_code=True` runs the Python files of this repository, which are the model's architecture"
            + ("; with Mini installed, `import modeling_mini` makes it unnecessary." if is_mini else ".")
        )
    return section_of("How to use", "\n\n".join(lines))


def first_prompt(facts: Facts) -> str:
    """What examples let the model continue, or answer."""
    return (facts.prompts or [PROMPT])[0].strip()


def examples_of(beginning: str, is_chat: bool) -> tuple[str, str]:
    """How `model` and `tokenizer`, and how `generator`, go on from a prompt, or answer it."""
    prompt = json.dumps(beginning, ensure_ascii=False)  # as Python writes it
    if not is_chat:
        return (
            f'output = model.generate(**tokenizer({prompt}, return_tensors="pt"), max_new_tokens=40)\n'
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
            f'print(generator({prompt}, max_new_tokens=40)[0]["generated_text"])',
        )
    messages = f'messages = [{{"role": "user", "content": {prompt}}}]'
    return (
        f"""{messages}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
        f'{messages}\nprint(generator(messages, max_new_tokens=100)[0]["generated_text"][-1]["content"])',
    )


def data_section(facts: Facts) -> str:
    if not facts.dataset:
        return ""
    settings = facts.settings
    trained = f"Trained on `{facts.dataset}`"
    if settings.get("dataset_config"):
        trained += f", configuration `{settings['dataset_config']}`"
    evaluated = settings.get("max_eval_tokens")
    if settings.get("streaming") and evaluated:
        trained += f"; its first documents, of {evaluated:,} tokens together, were held out for the evaluation below"
    elif "validation_ratio" in settings:
        trained += f"; a share of {settings['validation_ratio']:g} of it was held out for the evaluation below"
        trained += f", which reads at most the first {evaluated:,} tokens of that" if evaluated else ""
    lines = [f"{trained}."]
    if facts.tokens is not None:
        times = f", which is {facts.epoch:.2f} times the training part" if facts.epoch is not None else ""
        lines.append(f"It has read {facts.tokens:,} tokens{times}.")
    tokenizer = settings.get("tokenizer")
    if tokenizer:
        described = {
            "byte": "Its tokens are bytes, so it takes any text in any script.",
            "char": "Its tokens are the characters of the training text; others are read as `<|unk|>`.",
            "bpe": "Its tokens are bytes, and merges of them that were learned from the training text, so it takes any "
            "text in any script.",
        }
        lines.append(described.get(tokenizer, f"Its tokenizer is that of `{tokenizer}`."))
    return section_of("Data and tokenizer", " ".join(lines))


def architecture(facts: Facts, config: dict[str, Any]) -> str:
    if not config:
        return ""
    rows = [(name, config[name]) for name in SHAPE if config.get(name) is not None]
    if config.get("rope_parameters"):
        rope = sorted(config["rope_parameters"].items())
        rows.append(("rope", ", ".join(f"{name} {value}" for name, value in rope)))
    if facts.kind == "adapter":
        rows = [(name, config[name]) for name in ADAPTER if config.get(name) is not None]
        rows = [(name, ", ".join(sorted(value)) if isinstance(value, list) else value) for name, value in rows]
    elif facts.parameters is not None:
        rows.insert(0, ("parameters", f"{facts.parameters:,}"))
    return section_of("Architecture", table([*rows, *facts.rows.items()]))


def training(facts: Facts) -> str:
    rows = [("base", facts.base), ("adapter", facts.adapter)]
    settings = facts.settings
    if facts.step is not None and {"train_batch_size", "learning_rate", "seed"} <= settings.keys():
        sequences = settings["train_batch_size"]
        batch = f"{sequences} x {facts.context} tokens" if facts.context is not None else f"{sequences} sequences"
        steps = f"{facts.step} steps of {batch}"
        if facts.sequences is not None and facts.context and facts.sequences != facts.step * sequences:
            tokens = facts.sequences * facts.context  # the batch was changed on the way
            steps = f"{facts.step} steps with {tokens:,} tokens in all, the last of {batch}"
        optimizer = facts.optimizer or settings.get("optimizer", "AdamW")
        rate = f"peak learning rate {settings['learning_rate']:g}"
        rows.append(("training", f"{steps}, {optimizer}, {rate}, seed {settings['seed']}"))
    return section_of("Training", table([row for row in rows if row[1]]))


def evaluation(facts: Facts, metadata: dict[str, Any], has_curves: bool) -> str:
    rows = [
        (f"{metric.get('name') or metric['type']}, {result['dataset']['name']}", f"{metric['value']:.4f}")
        for model in metadata.get("model-index", []) for result in model["results"]
        for metric in result["metrics"] if isinstance(metric["value"], int | float)
    ]  # fmt: skip
    if rows:
        rows += [(f"{name} -9, bits per byte of the same text", f"{v:.4f}") for name, v in facts.compressors.items()]
    curves = "![Bits per byte over the steps of training](curves.png)" if has_curves else ""
    return section_of("Evaluation", f"{table(rows)}\n\n{curves}")


def quantized(config: dict[str, Any], metadata: dict[str, Any]) -> str:
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "bitsandbytes":
        return ""
    double = ", double quantization" if quantization.get("bnb_4bit_use_double_quant") else ""
    kind = "INT8 (LLM.int8)"
    if quantization.get("load_in_4bit"):
        kind = f"INT4 ({quantization.get('bnb_4bit_quant_type', 'fp4')}{double})"
    figures = " Figures above are those of the model before." if metadata.get("model-index") else ""
    return section_of(
        QUANTIZED,
        f"The weights of the layers are quantized to {kind} by bitsandbytes, which loading them needs; embedding, head "
        f"and norms are as they were.{figures}",
    )


def sample_section(sample: Sample | None) -> str:
    if sample is None:
        return ""
    text, how = sample.text, f"Written by these weights after {sample.prompt!r}"
    if sample.is_chat:
        text, how = f"user: {sample.prompt}\nassistant: {text}", "A user's message, and the answer of these weights"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    text = text.replace("\r", "")
    return f"## {SAMPLE}\n\n{how}, with seed {sample.seed}:\n\n{fence}text\n{text}\n{fence}"


def limits(facts: Facts) -> str:
    sentences = []
    if facts.context is not None:
        sentences.append(f"It sees at most {facts.context} tokens at once.")
    if facts.dataset:
        sentences.append(
            f"It knows what is in `{facts.dataset}` and nothing else, with whatever is wrong or unfair in it."
        )
    sentences.append("What it writes is likely text and no statement of fact; nobody has tuned it to be harmless.")
    return section_of("Limits", " ".join(sentences))


def reproduction(facts: Facts) -> str:
    """The settings as a file that the trainer reads back."""
    if not facts.settings:
        return ""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    settings = dump_yaml(facts.settings).strip()
    code = f" The code is that of Mini at commit `{facts.code}`." if facts.code else ""
    return section_of(
        "How to reproduce",
        f"""\
Save these settings as `config.yaml`, beside the data where that is a file, and give the command under them.{code} This
card was written with {versions}.

```yaml
{settings}
```

```text
python train_accelerate.py --config config.yaml
```""",
    )


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as anybody may read them: of a path the last part, and nothing of one machine alone."""
    public = {name: without_folders(value) for name, value in settings.items() if name not in NOT_OF_THE_MODEL}
    if (model := settings.get("model")) and Path(model).exists():
        public["model"] = display_name(model)  # of a run its name: each has a folder that is called best
    return public


def without_folders(value: Any) -> Any:
    """A setting without the folders that it names."""
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    # Not Path.exists, which fails for what is too long for a name, such as a prompt.
    is_path = isinstance(value, str) and (value.startswith((".", "~", "/")) or os.path.exists(value))
    return Path(value).name if is_path else value
