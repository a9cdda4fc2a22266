"""Checkpoint folders to use and share: self-contained, with a card of facts."""

import shutil
from pathlib import Path

from files_mini import replace_folder, writing
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import Arguments
from .checkpoints import TrainerState
from .evaluation import Evaluation

OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}


def save_checkpoint_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Writes a folder that `from_pretrained` and the Hub take: weights, configurations, code, tokenizer and card."""
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder):
        shutil.rmtree(partial, ignore_errors=True)
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
    """The card of a checkpoint, from facts of the run alone."""
    config = model.config
    dataset = arguments.data.dataset
    optimization = arguments.optimization
    optimizer = OPTIMIZERS[optimization.optimizer]
    name = Path(dataset).name or dataset
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mini"],
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
    content = f"""---
{data.to_yaml()}
---

# Mini, {model.num_parameters() / 1e6:.1f}M parameters

A small decoder-only language model, trained from scratch on `{name}`.

```python
from transformers import pipeline

generator = pipeline("text-generation", model="PATH_OR_REPOSITORY", trust_remote_code=True)
print(generator("The", max_new_tokens=100)[0]["generated_text"])
```

| | |
|---|---|
| architecture | {layers}, {heads}, SwiGLU {config.intermediate_size} |
| context | {config.max_position_embeddings} tokens |
| vocabulary | {config.vocab_size} ({arguments.data.tokenizer} tokenizer) |
| training | {state.step} steps of {optimization.train_batch_size} x {config.max_position_embeddings} tokens, \
{optimizer}, peak learning rate {optimization.learning_rate:g}, seed {arguments.run.seed} |
| validation loss | {evaluation.loss:.4f} nats per token |
| bits per byte | {evaluation.bits_per_byte:.4f} ({baselines}, on the same held-out bytes) |
"""
    return str(ModelCard(content))
