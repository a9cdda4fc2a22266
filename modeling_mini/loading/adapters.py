"""An adapter in a model, for writing: complete, of this base and no other, and merged where that changes nothing."""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..integrations import check_dora


def base_of_adapter(adapter: str) -> str:
    """
    The model that an adapter says it was trained on.

    Raises:
        ValueError: if there is no adapter that peft knows, or it does not say.
    """
    from peft import PeftConfig, PeftType

    try:
        config = PeftConfig.from_pretrained(adapter)
    except KeyError as error:
        known = ", ".join(sorted(PeftType))
        raise ValueError(f"The adapter {adapter!r} is of the type {error}, and peft knows {known}.") from None
    except (OSError, ValueError, TypeError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"No adapter could be loaded from {adapter!r}: {detail}") from None
    if not config.base_model_name_or_path:
        raise ValueError(f"The adapter {adapter!r} does not say which model it belongs to: name that by --model.")
    return config.base_model_name_or_path


def with_adapter(model: PreTrainedModel, adapter: str, merge_quantized: bool = False) -> PreTrainedModel:
    """
    A model with an adapter in it: merged into the weights, which costs nothing while writing, or beside them (as a
    `PeftModel`) where merging is not possible or would give another model.

    Args:
        merge_quantized: merge into quantized weights too, which rounds what the adapter has learned.

    Raises:
        ValueError: if the adapter cannot be read, or does not fit the model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

    base = base_of_adapter(adapter)
    misfit = f"The adapter {adapter!r}, which was trained on {base!r}, does not fit {model.name_or_path!r}"
    if is_another_model(model, base):
        raise ValueError(f"{misfit}: the two models have other weights.")
    try:
        with warnings.catch_warnings():  # of names of yesterday, and of keys, which are looked at below
            warnings.simplefilter("ignore")
            check_dora(model, PeftConfig.from_pretrained(adapter))
            adapted = PeftModel.from_pretrained(model, adapter)
            differing = set(get_peft_model_state_dict(adapted)) ^ set(load_peft_weights(adapter, device="cpu"))
    except SafetensorError as error:
        raise ValueError(f"The weights of the adapter {adapter!r} are damaged or cut short ({error}).") from None
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"{misfit}: {detail}") from None
    if differing:
        first = min(differing).removeprefix("base_model.model.")
        raise ValueError(f"{misfit}: {len(differing)} weights are in one of the two alone, first {first}.")
    stays_beside = getattr(model, "is_quantized", False) and not merge_quantized
    if stays_beside or not hasattr(adapted.base_model, "merge_and_unload") or adapts_tied_embedding(model):
        return adapted.eval()
    with warnings.catch_warnings():
        if merge_quantized:
            warnings.simplefilter("ignore")  # that merging into quantized weights rounds: it was asked for
        return adapted.merge_and_unload().eval()


def adapts_tied_embedding(model: PreTrainedModel) -> bool:
    """Whether an adapter changes the embedding or the head alone of a model where both are one: merged, it is both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return model.config.tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends)


def is_another_model(model: PreTrainedModel, base: str) -> bool:
    """
    Whether a base that is there to look at has another embedding than the model. A copy, and a quantized copy, has the
    same.
    """
    weights = Path(base) / "model.safetensors"
    if not weights.is_file() or Path(model.name_or_path).resolve() == weights.parent.resolve():
        return False
    embedding = model.get_input_embeddings().weight
    name = next((name for name, weight in model.named_parameters() if weight is embedding), None)
    try:
        with safe_open(weights, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118 (no mapping)
                return False
            other = file.get_tensor(name)
    except SafetensorError:
        return False
    return other.shape != embedding.shape or not torch.equal(other.to(embedding), embedding)
