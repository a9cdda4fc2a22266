"""Checkpoint folders to use and share: self-contained, with a card of facts."""

import shutil
from pathlib import Path

from files_mini import CHECKPOINTS_OF_A_RUN, replace_folder, writing
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import AdapterArguments, Arguments
from .checkpoints import TrainerState
from .evaluation import Evaluation
from .lora import is_adapted, lora_alpha
from .optimizers import OPTIMIZERS

USAGE = """\
from transformers import pipeline

generator = pipeline("text-generation", model="PATH_OR_REPOSITORY", trust_remote_code=True)
print(generator("The", max_new_tokens=100)[0]["generated_text"])"""
ADAPTER_USAGE = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY")
output = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def save_checkpoint_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """
    Writes a folder that `from_pretrained` and the Hub take: weights, configurations, code, tokenizer and card. Of an
    adapted model the weights are those of the adapter, and there is no code.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
        if is_adapted(model):
            # An adapter does not change the embedding, and peft would write it all the same.
            model.save_pretrained(partial, save_embedding_layers=False)
            model.generation_config.save_pretrained(partial)
        else:
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        replace_folder(partial, folder)


def model_card(
    model: PreTrainedModel,
    arguments: Arguments,
    state: TrainerState,
    evaluation: Evaluation,
    compressors: dict[str, float],
) -> str:
    """The card of a checkpoint or an adapter, from facts of the run alone."""
    config, adapter = model.config, arguments.adapter
    dataset = arguments.data.dataset
    optimization = arguments.optimization
    optimizer = OPTIMIZERS[optimization.optimizer].display_name
    name = Path(dataset).name or dataset
    base = arguments.model.model
    has_adapter = is_adapted(model)
    data = ModelCardData(
        library_name="peft" if has_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["mini", "lora"] if has_adapter else ["mini"],
        # The Hub takes names of its own there, and no folder of somebody's disk.
        base_model=base if base is not None and not Path(base).exists() else None,
        model_name="Mini",
        eval_results=[
            EvalResult("text-generation", name, f"{name}, held out", metric, value, metric_name=description)
            for metric, value, description in (
                ("bits_per_byte", evaluation.bits_per_byte, "Bits per byte"),
                ("perplexity", evaluation.perplexity, "Perplexity per token"),
                ("loss", evaluation.loss, "Cross-entropy in nats per token"),
            )
        ],
    )
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
    layers = f"{config.num_hidden_layers} layers, {config.hidden_size} wide"
    baselines = ", ".join(f"{name} -9 needs {bits:.3f}" for name, bits in compressors.items())
    tokenizer = f" ({arguments.data.tokenizer} tokenizer)" if base is None else ""
    if has_adapter:
        title = f"Adapter for {base_name(base)}"
        origin = f"A LoRA adapter for `{base_name(base)}`, trained on `{name}`. It needs that model to lie on."
        usage = ADAPTER_USAGE
    else:
        title = f"Mini, {model.num_parameters() / 1e6:.1f}M parameters"
        origin = f"A small decoder-only language model, trained from scratch on `{name}`."
        if base is not None:
            way = " through a LoRA adapter, which is merged into it" if adapter.lora_r else ""
            origin = f"`{base_name(base)}`, a small decoder-only language model, fine-tuned on `{name}`{way}."
        usage = USAGE
    batch = f"{optimization.train_batch_size} x {config.max_position_embeddings} tokens"
    steps = f"{state.step} steps of {batch}"
    if state.sequences != state.step * optimization.train_batch_size:  # it changed on the way
        tokens = (state.sequences or 0) * config.max_position_embeddings
        steps = f"{state.step} steps with {tokens:,} tokens in all, the last of {batch}"
    based_on = f"| base | {base_name(base)} |\n" if base is not None else ""
    adaptation = f"| adapter | {adapter_facts(adapter)} |\n" if adapter.lora_r else ""
    content = f"""---
{data.to_yaml()}
---

# {title}

{origin}

```python
{usage}
```

| | |
|---|---|
{based_on}| architecture | {layers}, {heads}, SwiGLU {config.intermediate_size} |
| context | {config.max_position_embeddings} tokens |
| vocabulary | {config.vocab_size}{tokenizer} |
{adaptation}| training | {steps}, {optimizer}, \
peak learning rate {optimization.learning_rate:g}, seed {arguments.run.seed} |
| validation loss | {evaluation.loss:.4f} nats per token |
| bits per byte | {evaluation.bits_per_byte:.4f} ({baselines}, on the same held-out bytes) |
"""
    return str(ModelCard(content))


def base_name(base: str) -> str:
    """What a card calls the model that a run started from: a name of the Hub, or the last part of a path."""
    path = Path(base)
    if not path.exists():
        return base
    return f"{path.parent.name}/{path.name}" if path.name in CHECKPOINTS_OF_A_RUN and path.parent.name else path.name


def adapter_facts(adapter: AdapterArguments) -> str:
    """The settings of an adapter, for people."""
    kind = "DoRA" if adapter.use_dora else "LoRA"
    layers = ", ".join(adapter.lora_target_modules) or "all linear layers of the blocks"
    in_full = f", {', '.join(adapter.lora_modules_to_save)} in full" if adapter.lora_modules_to_save else ""
    scale = f", alpha {lora_alpha(adapter):g}{' by the root of the rank' if adapter.use_rslora else ''}"
    rounded = f", the base in {adapter.quantization}" if adapter.quantization is not None else ""
    return f"{kind} of rank {adapter.lora_r}{scale}, on {layers}{in_full}{rounded}"
