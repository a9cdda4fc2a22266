"""Puts an adapter into a model to generate with: checks that it is complete and fits, and merges it where possible."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from files_mini import read_json
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..integrations import check_dora, features_of, misfit_of_vocabulary, vocabulary_of_adapter

if TYPE_CHECKING:
    from peft import PeftConfig


def base_of_adapter(adapter: str, config: "PeftConfig | None" = None) -> str:
    """
    The model that an adapter says it was trained on.

    Args:
        config: that of the adapter, if it was read before.

    Raises:
        ValueError: if there is no adapter, if peft does not know its type, or if it names no model.
    """
    if not (base := (config or config_of_adapter(adapter)).base_model_name_or_path):
        raise ValueError(
            f"The adapter {adapter!r} does not say which model it belongs to: name that by --model, and the adapter by "
            f"--adapter."
        )
    return base


def config_of_adapter(adapter: str) -> "PeftConfig":
    """
    The configuration of an adapter.

    Raises:
        ValueError: if there is none, if peft does not know its type, or if its folder has no weights.
    """
    from peft import PeftConfig, PeftType
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    try:
        config = PeftConfig.from_pretrained(adapter)
    except KeyError as error:
        known = ", ".join(sorted(PeftType))
        raise ValueError(f"The adapter {adapter!r} is of the type {error}, and peft knows {known}.") from None
    except (OSError, ValueError, TypeError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"No adapter could be loaded from {adapter!r}: {detail}") from None
    folder = Path(adapter)
    if folder.is_dir() and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(f"The adapter {adapter!r} has no weights: {SAFETENSORS_WEIGHTS_NAME} is missing.")
    return config


def with_adapter(
    model: PreTrainedModel,
    adapter: str,
    merge_quantized: bool = False,
    vocabulary: int = 0,
    merge: bool = True,
    config: "PeftConfig | None" = None,
) -> PreTrainedModel:
    """
    A model with an adapter in it. The adapter is merged into the weights, so that generating is as fast as without it.
    It stays beside them (as a `PeftModel`) where merging is not possible or would give another model. If the adapter
    was trained with more tokens than the model has, the model is resized.

    Args:
        merge_quantized: merge into quantized weights too, which rounds what the adapter has learned.
        vocabulary: how many tokens the tokenizer of the adapter has, if it brings one.
        merge: whether to merge where that is possible.
        config: that of the adapter, if it was read before.

    Raises:
        ValueError: if the adapter cannot be read, or does not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    config = config or config_of_adapter(adapter)
    base = config.base_model_name_or_path
    trained_on = f", which was trained on {base!r}," if base else ""
    misfit = f"The adapter {adapter!r}{trained_on} does not fit {model.name_or_path!r}"
    if base and is_another_model(model, base):
        raise ValueError(f"{misfit}: the two models have other weights.")
    try:
        with warnings.catch_warnings():  # about deprecated names, and about keys, which are checked below
            warnings.simplefilter("ignore")
            weights = load_peft_weights(adapter, device="cpu")
            check_dora(model, config)
            before, of_weights = len(model.get_input_embeddings().weight), vocabulary_of_adapter(model, weights, config)
            wanted = max(vocabulary, of_weights or 0)
            if wanted > before:
                resize(model, wanted)
            if reason := misfit_of_vocabulary(model, of_weights):
                raise ValueError(reason)
            adapted = PeftModel.from_pretrained(model, adapter, config=config)
            # The file may also contain embedding and head: see `vocabulary_of_adapter`.
            least, most = (
                set(get_peft_model_state_dict(adapted, save_embedding_layers=each)) for each in (False, True)
            )
            differing = (least - weights.keys()) | (weights.keys() - most)
    except SafetensorError as error:
        raise ValueError(f"The weights of the adapter {adapter!r} are damaged or cut short ({error}).") from None
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"{misfit}: {detail}") from None
    if differing:
        first = min(differing).removeprefix("base_model.model.")
        raise ValueError(f"{misfit}: {len(differing)} weights are in one of the two alone, first {first}.")
    if wanted > before and not has_all_tokens(adapted, before, wanted):
        raise ValueError(
            f"{misfit}: it was trained with {wanted - before} tokens more, and their weights are not in its file; save "
            f"it with save_embedding_layers=True, or name the resized base by --model."
        )
    stays_beside = not merge or (getattr(model, "is_quantized", False) and not merge_quantized)
    if stays_beside or not hasattr(adapted.base_model, "merge_and_unload") or adapts_tied_embedding(model):
        return adapted.eval()
    with warnings.catch_warnings():
        if merge_quantized:
            warnings.simplefilter("ignore")  # about the rounding, which was asked for
        merged = adapted.merge_and_unload().eval()
    if type(head := merged.get_output_embeddings()) is torch.nn.Linear:
        head.out_features, head.in_features = features_of(head)  # for an adapter that comes on top
    return merged


def adapts_tied_embedding(model: PreTrainedModel) -> bool:
    """
    Whether an adapter changes only the embedding or only the head of a model in which both are one weight. Merging
    would then change both.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not model.config.tie_word_embeddings:
        return False
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(isinstance(end, BaseTunerLayer) for end in ends) or not torch.equal(ends[0].weight, ends[1].weight)


def resize(model: PreTrainedModel, vocabulary: int) -> None:
    """Adds tokens. Their weights are NaN, so that a later check shows if the adapter has none for them."""
    before = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight[before:] = torch.nan


def has_all_tokens(model: PreTrainedModel, before: int, vocabulary: int) -> bool:
    """Whether the tokens that `resize` has added (from `before` on) got weights in embedding and head."""
    with torch.no_grad():
        states = model.get_input_embeddings()(torch.arange(before, vocabulary, device=model.device))
        scores = model.get_output_embeddings()(torch.zeros_like(states[:1]))
    return bool(states.isfinite().all() and scores.isfinite().all())


def is_another_model(model: PreTrainedModel, base: str) -> bool:
    """
    Whether the base of an adapter has another embedding than the model. It is `False` if the base is not on this disk.
    A copy, a quantized copy, and a model to which tokens were added have the same embedding.
    """
    embedding = model.get_input_embeddings().weight
    name = next((name for name, weight in model.named_parameters() if weight is embedding), None)
    folder, file_name = Path(base), SAFE_WEIGHTS_NAME
    if not (folder / file_name).is_file() and (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        file_name = read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).get(name, SAFE_WEIGHTS_NAME)
    weights = folder / file_name
    if not weights.is_file() or Path(model.name_or_path).resolve() == folder.resolve():
        return False
    try:
        with safe_open(weights, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118 (no mapping)
                return False
            other = file.get_tensor(name)
    except SafetensorError:
        return False
    both = min(len(other), len(embedding))
    return other.shape[1:] != embedding.shape[1:] or not torch.equal(other[:both].to(embedding), embedding[:both])
