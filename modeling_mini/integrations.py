"""
Saving and loading of Mini models, with checks where bitsandbytes or peft would give a wrong model without an error.

A copy of this file is in each checkpoint folder, so the checks run wherever a folder is loaded. It does not import peft
and bitsandbytes at the top: transformers would then refuse to load a folder where they are not installed.
"""

import contextlib
import importlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from .remote_code import AUTO_MAP, MODEL_MODULE, write_remote_code

# bitsandbytes stores 4-bit weights in blocks of 64 along a row, and its CPU kernel takes 32 rows at once. With other
# shapes a model loads, and then fails in its first call, or is saved wrongly (docs/LOG.md).
BLOCK_COLUMNS, BLOCK_ROWS = 64, 32
# What bitsandbytes does to weights, by the ending of its flags (load_in_8bit), and how it is called.
QUANTIZATIONS = {"8bit": "INT8", "4bit": "INT4"}
QUANTIZED_LAYERS = ("Linear4bit", "Linear8bitLt")
# Arguments of `save_pretrained` that are for `push_to_hub`.
HUB_ARGUMENTS = ("repo_id", "commit_message", "private", "revision", "create_pr", "commit_description", "tags")
WEIGHTS = re.compile(r"model(\.[\w-]+)?\.safetensors")
SHARD = re.compile(r"model(?P<variant>\.[\w-]+?)?-\d{5}-of-\d{5}\.safetensors")
INDEX = re.compile(r"model\.safetensors\.index(?P<variant>\.[\w-]+)?\.json")


class CheckpointMixin:
    """Saving and loading of every Mini model. It must come before `PreTrainedModel` among the bases of a class."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_pre_hook(refuse_part_of_adapter)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Saves like every transformers model, and adds the code, so that the folder loads with `trust_remote_code=True`
        where Mini is not installed. Weights that an earlier save left in the folder are removed. For a class that is
        defined elsewhere (in an experiment), use transformers' own `register_for_auto_class`.
        """
        if getattr(self, "is_quantized", False):
            # By default transformers undoes what loading did, which it cannot do for quantized weights.
            kwargs.setdefault("save_original_format", False)
        is_minis = type(self).__module__ == MODEL_MODULE
        if is_minis:
            self.config.auto_map = dict(AUTO_MAP)
        elif any(name in AUTO_MAP.values() for name in (getattr(self.config, "auto_map", None) or {}).values()):
            # A class loaded from a checkpoint of Mini has its map, which names files that are not written here.
            del self.config.auto_map
        hub_arguments = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            remove_older_weights(Path(save_directory))
            if is_minis:
                write_remote_code(save_directory)
        if push_to_hub:
            repo_id = hub_arguments.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, token=kwargs.get("token"), **hub_arguments)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "CheckpointMixin":
        """Loads like every transformers model, and refuses to quantize layers that bitsandbytes computes wrongly."""
        loaded = super().from_pretrained(*args, **kwargs)
        check_quantized_layers(loaded[0] if isinstance(loaded, tuple) else loaded, kwargs.get("quantization_config"))
        return loaded

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Loads like every transformers model, with the differences that `load_whole_adapter` names."""
        return load_whole_adapter(self, super().load_adapter, *args, **kwargs)


def remove_older_weights(folder: Path) -> None:
    """
    Removes weights of an earlier save, and keeps those that `save_pretrained` has just written. transformers removes
    old shards. But it leaves an old single file, which it would then load in place of the new shards, and an old index.
    """
    names = [path.name for path in folder.iterdir()]
    sharded = {match["variant"] or "" for match in map(SHARD.fullmatch, names) if match}
    for name in names:
        if match := INDEX.fullmatch(name):
            is_older = (match["variant"] or "") not in sharded
        else:
            match = WEIGHTS.fullmatch(name)
            is_older = match is not None and (match[1] or "") in sharded
        if is_older:
            (folder / name).unlink()


def check_quantized_layers(model: PreTrainedModel, asked_for: Any = None) -> None:
    """
    Checks that bitsandbytes computes the layers correctly that `from_pretrained` has quantized, and that a folder that
    was quantized before has the kind that was asked for.

    Args:
        asked_for: the `quantization_config` of the call, if it had one.

    Raises:
        ValueError: naming the wrong layers and how to leave them out, or the two kinds of quantization.
    """
    if not getattr(model, "is_quantized", False):
        return
    found, wanted = kind_of_quantization(model.config.quantization_config), kind_of_quantization(asked_for)
    if wanted is not None and wanted != found:
        raise ValueError(
            f"{model.name_or_path!r} is in {QUANTIZATIONS.get(found)} already and was asked for in "
            f"{QUANTIZATIONS[wanted]}: load it without a quantization_config, or quantize the model that it was made "
            f"of."
        )
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    quantized = {name: model.get_submodule(name) for name, kind in kinds.items() if kind in QUANTIZED_LAYERS}
    embedding = model.get_input_embeddings().weight
    if (name := next((name for name, module in quantized.items() if module.weight is embedding), None)) is not None:
        raise ValueError(
            f"{name} is the embedding too, which cannot be quantized: a list of your own in llm_int8_skip_modules has "
            f"to name {name!r}."
        )
    shapes: dict[tuple[str, int, int], str] = {}  # one example for each name and shape
    for name, module in quantized.items():
        rows, columns = module.out_features, module.in_features
        if kinds[name] == "Linear4bit" and (rows % BLOCK_ROWS or columns % BLOCK_COLUMNS):
            shapes.setdefault((name.rsplit(".")[-1], rows, columns), name)
    if shapes:
        layers = ", ".join(f"{name} ({rows} x {columns})" for (_, rows, columns), name in shapes.items())
        skipped = {"lm_head"} | {kind for kind, _, _ in shapes}
        raise ValueError(
            f"INT4 needs widths that are multiples of {BLOCK_COLUMNS} in and {BLOCK_ROWS} out; these layers have "
            f"others: {layers}. Load in INT8 instead, or leave them out by llm_int8_skip_modules={sorted(skipped)}."
        )


def kind_of_quantization(config: Any) -> str | None:
    """A key of `QUANTIZATIONS`, by the configuration of bitsandbytes; `None` without one, or for another method."""
    return next((kind for kind in QUANTIZATIONS if getattr(config, f"load_in_{kind}", False)), None)


def check_dora(model: PreTrainedModel, peft_config: Any) -> None:
    """
    Refuses DoRA over INT8 on a CPU. In each forward pass, peft makes the weight of such a layer again without its
    scales, so the second pass fails.

    Raises:
        ValueError: for DoRA on a CPU over a model in INT8.
    """
    if not getattr(peft_config, "use_dora", False) or model.device.type != "cpu":
        return
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        raise ValueError("peft has no DoRA over weights in INT8 on a CPU: take INT4, or an adapter without DoRA.")


def load_whole_adapter(
    model: PreTrainedModel,
    load_adapter: Callable[..., Any],
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: dict[str, torch.Tensor] | None = None,
    adapter_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """
    transformers' `load_adapter` with three differences:

    - The magnitudes of DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) are loaded. transformers warns, and
      keeps those of the base.
    - Embedding and head that were tied stay tied. transformers unties them if the adapter has one of the two, for
      tokens that were added.
    - An adapter that does not fit, or is not complete, is refused and removed again.

    Args:
        load_adapter: transformers' own method, bound to the model. The other arguments are its own.

    Raises:
        ValueError: if the adapter is damaged or does not fit, naming it and the model.
    """
    peft = importlib.import_module("peft")
    load_config = kwargs.get("load_config")
    peft_model_id = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    download_kwargs = {**(getattr(load_config, "download_kwargs", None) or {}), **(adapter_kwargs or {})}
    names_before = set(getattr(model, "peft_config", {}))
    weights_before = [module.weight for module in embedding_and_head(model)]
    detail = None
    try:
        if peft_config is None and peft_model_id is not None:
            peft_config = peft.PeftConfig.from_pretrained(peft_model_id, **download_kwargs)
        check_dora(model, peft_config)
        if getattr(peft_config, "use_dora", False):
            if adapter_state_dict is None:
                adapter_state_dict = peft.load_peft_weights(peft_model_id, device="cpu", **download_kwargs)
            # transformers expects an ending that is not in the file.
            adapter_state_dict = {
                f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: value
                for key, value in adapter_state_dict.items()
            }
        info = load_adapter(
            peft_model_id, adapter_name, peft_config, adapter_state_dict, adapter_kwargs=adapter_kwargs, **kwargs
        )
        tie_again(model, weights_before)
        weights = dict(model.named_parameters(remove_duplicate=False))
        loaded = {id(weight) for key, weight in weights.items() if key not in info.missing_keys}
        # Not missing: the second name of a tied weight, and the weights of other adapters.
        missing = {
            key
            for key in info.missing_keys
            if (adapter_name or "default") in key.split(".") and (key not in weights or id(weights[key]) not in loaded)
        }
        unexpected = set(info.unexpected_keys) - copies_of(key for key in weights if id(weights[key]) in loaded)
        if wrong := sorted({*missing, *unexpected, *(key for key, *_ in info.mismatched_keys)}):
            detail = f"{len(wrong)} of its weights are in the file alone or in the model alone, first {wrong[0]}."
    except SafetensorError as error:
        detail = f"its weights are damaged or cut short ({error})."
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        detail = " ".join(str(error).split())[:300]
    if detail is not None:
        with contextlib.suppress(Exception):  # if the weights cannot be read, `detail` says so already
            given = adapter_state_dict or peft.load_peft_weights(peft_model_id, device="cpu", **download_kwargs)
            detail = misfit_of_vocabulary(model, vocabulary_of_adapter(model, given, peft_config)) or detail
        if added := sorted(set(getattr(model, "peft_config", {})) - names_before):
            model.delete_adapter(added)
        called = f"The adapter {str(peft_model_id)!r}" if peft_model_id else "The adapter"
        if base := getattr(peft_config, "base_model_name_or_path", None):
            called += f", which was trained on {base!r},"
        raise ValueError(f"{called} does not fit {model.name_or_path!r}: {detail}")
    return info


def embedding_and_head(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The embedding and, if there is one, the head, without peft's wrappers."""
    modules = [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    return [getattr(module, "base_layer", getattr(module, "original_module", module)) for module in modules]


def features_of(layer: torch.nn.Module) -> tuple[int, int]:
    """
    Outputs and inputs of a linear layer. Of a plain one by its weight: where an adapter that learned the embedding is
    merged, peft makes a tied head anew, with `in_features` and `out_features` exchanged. Quantized weights are packed.
    """
    return tuple(layer.weight.shape) if type(layer) is torch.nn.Linear else (layer.out_features, layer.in_features)


def tie_again(model: PreTrainedModel, before: list[torch.nn.Parameter]) -> None:
    """Uses the new weight for both, if embedding and head were one weight `before` and one of the two was replaced."""
    modules = embedding_and_head(model)
    if len(before) < 2 or before[0] is not before[1]:
        return
    replaced = [module for module in modules if module.weight is not before[0]]
    if len(replaced) == 1:
        for module in modules:
            module.weight = replaced[0].weight


def refuse_part_of_adapter(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor], prefix: str, *unused: Any
) -> None:
    """
    A hook that torch calls before it loads a state dict. peft loads an adapter by `load_state_dict(strict=False)`. If
    the adapter was made for more or fewer layers, peft loads only a part of it, with at most a warning.

    Raises:
        ValueError: if an adapter would be loaded only in part.
    """
    layers = [name for name, part in model.named_modules() if hasattr(part, "base_layer") or is_trained_in_full(part)]
    if not layers:
        return
    weights = model.state_dict(keep_vars=True)
    keys_of_kind: dict[str, list[str]] = {}  # by the end of the name after the layer, such as lora_A.default.weight
    for key in weights:
        layer = next((name for name in layers if key.startswith(f"{name}.")), None)
        kind = key.removeprefix(f"{layer}.")
        if layer is not None and not kind.startswith(("base_layer.", "original_module.")):
            keys_of_kind.setdefault(kind, []).append(key)
    given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    loaded = {id(weights[key]) for key in given if key in weights}  # a tied weight may be given by its other name
    kinds = [kind for kind in keys_of_kind if any(key.endswith(f".{kind}") for key in given)]
    if not kinds:
        return  # the weights of the model, or of another adapter
    tensors = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if reason := misfit_of_vocabulary(model, vocabulary_of_adapter(model, tensors)):
        raise ValueError(f"The adapter does not fit {model.name_or_path!r}: {reason}")
    misfits = given - weights.keys() - copies_of(key for key in weights if id(weights[key]) in loaded)
    misfits |= {key for kind in kinds for key in keys_of_kind[kind] if id(weights[key]) not in loaded}
    if misfits:
        raise ValueError(
            f"{len(misfits)} weights of the adapter are in its file alone or in {model.name_or_path!r} alone, first "
            f"{min(misfits)}."
        )


def copies_of(keys: Iterable[str]) -> set[str]:
    """
    The names under which peft writes some weights a second time: without the name of the adapter. It does so for the
    embedding and the head of a model that was resized (`save_embedding_layers`), and reads only the first copy.
    """
    parts = [key.split(".") for key in keys]
    return {".".join(key[:i] + key[i + 1 :]) for key in parts for i in range(len(key))}


def vocabulary_of_adapter(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], peft_config: Any = None
) -> int | None:
    """
    How many tokens the model had on which an adapter was trained; `None` if neither the weights of the adapter nor its
    configuration say so.

    Args:
        weights: of the adapter, by the names of peft.
    """
    sizes, config = [], model.config.get_text_config()
    vocabulary_layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = tuple(f"{name}." for name, module in model.named_modules() if module in vocabulary_layers)
    for key, weight in weights.items():
        name = key.removeprefix("base_model.model.")
        if not name.startswith(names):
            continue
        if ".lora_embedding_A" in name:
            sizes.append(weight.shape[1])
        elif ".lora_B." in name or (
            name.endswith(".weight") and ".lora_" not in name and weight.shape[1:] == (config.hidden_size,)
        ):
            sizes.append(weight.shape[0])
    tokens = getattr(peft_config, "trainable_token_indices", None) or []
    for index in itertools.chain(*tokens.values()) if isinstance(tokens, dict) else tokens:
        if index >= config.vocab_size:
            sizes.append(index + 1)
    return max(sizes, default=None)


def misfit_of_vocabulary(model: PreTrainedModel, vocabulary: int | None) -> str | None:
    """The reason for an error if adapter and model have different numbers of tokens; `None` if they have not."""
    of_model = model.config.get_text_config().vocab_size
    if vocabulary in (None, of_model):
        return None
    return (
        f"its vocabulary has {vocabulary:,} tokens, and that of the model {of_model:,}; resize the model first, by "
        f"resize_token_embeddings({vocabulary})."
    )


def is_trained_in_full(module: torch.nn.Module) -> bool:
    """Whether `module` is peft's wrapper around a module that is trained in full (`modules_to_save`)."""
    return hasattr(module, "modules_to_save") and hasattr(module, "original_module")
