"""Small models with weights that make every part matter, their folders, and a tokenizer of another kind."""

import copy
from pathlib import Path
from typing import Any

import torch
from configuration_mini import MiniConfig
from helpers.random_models import SHAPE
from modeling_mini import MiniForCausalLM
from peft import LoraConfig, get_peft_model
from tokenization import BpeTokenizer, ByteTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import TokenizersBackend

HALF_TURNED = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


def write(model: MiniForCausalLM, folder: Path, tokenizer: Any = None) -> Path:
    """A checkpoint folder."""
    model.save_pretrained(folder)
    (tokenizer or ByteTokenizer()).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """The folder of a LoRA adapter of that base, with weights that are not small."""
    model = MiniForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    adapted.save_pretrained(folder)
    return folder


def bpe_tokenizer() -> TokenizersBackend:
    """GPT-2's kind of tokenizer, small."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©"), ("1", "2"), ("Ġ", "Ġ")]
    tokens = ["<|endoftext|>", *alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TokenizersBackend(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def learned_merges() -> BpeTokenizer:
    """Merges of the text of this file, and of some that is not English."""
    return BpeTokenizer.train(
        [Path(__file__).read_text(encoding="utf-8"), "héllo 日本語, 日本。 über größe\n" * 9], 320
    )


def random_model(**fields: Any) -> MiniForCausalLM:
    """Norms and biases are random too: at their start of 1 and 0, a mistake with them would not show."""
    model = MiniForCausalLM(MiniConfig(**{**SHAPE, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def same_parameters(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def without_dtype(config: MiniConfig) -> dict[str, Any]:
    """The fields of a configuration, without how and where it was saved."""
    fields = copy.deepcopy(config.to_dict())
    for name in ("dtype", "auto_map", "architectures", "_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return fields
