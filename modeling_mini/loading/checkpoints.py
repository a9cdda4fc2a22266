"""Finds and loads the model and the tokenizer that a user names."""

import contextlib
import logging
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from configuration_mini import MiniConfig
from files_mini import BOX, MODEL_CONFIG, find_checkpoint, read_json
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..integrations import check_quantized_layers
from .adapters import base_of_adapter, config_of_adapter, with_adapter
from .quantization import check_bitsandbytes, is_quantized, quantization_config

# Of the generation settings, with which transformers would fail in the midst of a text.
WHOLE_NUMBERS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
    "num_beams", "num_return_sequences", "no_repeat_ngram_size", "top_k",
)  # fmt: skip

# For `cached_file`: of a file that is not there, on the Hub or at all.
WITHOUT_ERRORS = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def load_model(
    model: str | None, adapter: str | None = None, merge_quantized: bool = False, merge: bool = True, **loading: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model and tokenizer of `--model` and `--adapter`, ready to generate. If `--model` is the folder of an adapter,
    the base that it names is loaded.

    Args:
        merge_quantized, merge: see `with_adapter`.
        loading: passed to `load_checkpoint`.

    Raises:
        ValueError: if something is missing or damaged, or if the adapter does not belong to the model.
    """
    checkpoint = find_checkpoint(model) if model is not None or adapter is None else None
    if checkpoint is not None and not (Path(checkpoint) / MODEL_CONFIG).is_file() and Path(checkpoint).is_dir():
        if adapter is not None:
            raise ValueError(f"model {model!r} is an adapter itself, so --adapter cannot be given too.")
        checkpoint, adapter = None, checkpoint
    if adapter is not None and (adapter in BOX or Path(adapter).is_dir()):
        adapter = find_checkpoint(adapter)
    # What is no adapter is refused before any loading.
    adapter_config = config_of_adapter(adapter) if adapter is not None else None
    if checkpoint is None:
        named = base_of_adapter(adapter, adapter_config)
        try:
            base, tokenizer = load_checkpoint(find_checkpoint(named), **loading)
        except ValueError as error:
            raise ValueError(
                f"The adapter {adapter!r} lies on {named!r}, which could not be loaded; if that is elsewhere now, name "
                f"it by --model and the adapter by --adapter. {error}"
            ) from None
    else:
        base, tokenizer = load_checkpoint(checkpoint, **loading)
    if adapter is None:
        return base, tokenizer
    check_generation_config(Path(adapter))
    with contextlib.suppress(OSError):  # most adapters have none; one that was trained on chats ends a turn by them
        base.generation_config = GenerationConfig.from_pretrained(adapter)
    vocabulary = 0
    if has_tokenizer(adapter):
        own = load_tokenizer(adapter, loading.get("trust_remote_code", False))
        if len(own) > len(tokenizer):  # tokens were added before it was trained
            tokenizer, vocabulary = own, len(own)
        elif own.chat_template is not None:  # that in which the adapter learned to answer
            tokenizer.chat_template = own.chat_template
    return with_adapter(base, adapter, merge_quantized, vocabulary, merge, adapter_config), tokenizer


def has_tokenizer(adapter: str) -> bool:
    """Whether an adapter, in a folder or on the Hub, has a tokenizer of its own; many have none."""
    return cached_file(adapter, "tokenizer.json", **WITHOUT_ERRORS) is not None


def load_checkpoint(
    name_or_path: str,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    quantization: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model in evaluation mode, and the tokenizer.

    Args:
        dtype: the type of the weights; with "auto" that in which they were saved.
        device: by default a GPU if there is one.
        quantization: "8bit" or "4bit", see `quantization_config`.

    Raises:
        ValueError: if a file is missing or damaged (the error names it), or if there is no such device.
    """
    torch_device = existing_device(device)
    folder = Path(name_or_path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
            raise ValueError(f"{name_or_path!r} has no weights: model.safetensors is missing.")
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{name_or_path!r} has no tokenizer: tokenizer.json is missing.")
        for name in (MODEL_CONFIG, GENERATION_CONFIG_NAME, "tokenizer.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                read_json(folder / name)  # if it is cut short, transformers' error says less, or there is none
        check_generation_config(folder)
    options: dict[str, Any] = {}
    logger = logging.getLogger("transformers.modeling_utils")
    was_disabled, logger.disabled = logger.disabled, True  # it prints a table of what `check_complete` checks
    try:
        # The configuration first: of a model with code of its own, transformers' tokenizers would print a riddle.
        config = load_config(name_or_path, trust_remote_code)
        tokenizer = load_tokenizer(name_or_path, trust_remote_code)
        if quantization is not None:
            options["quantization_config"] = quantization_config(quantization, config, torch_device)
        if quantization is not None or is_quantized(config):
            check_bitsandbytes(torch_device)
            options["device_map"] = {"": torch_device}  # quantized weights cannot be moved later
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, dtype=dtype, ignore_mismatched_sizes=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    except SafetensorError as error:
        raise ValueError(f"The weights in {name_or_path!r} are damaged or cut short ({error}).") from None
    except OSError as error:
        raise ValueError(f"No model could be loaded from {name_or_path!r}: {error}") from None
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):  # followed by a list of all that there are
            raise
        raise ValueError(
            f"{name_or_path!r} is a model of the type {config.model_type!r}, which is not made to continue texts."
        ) from None
    finally:
        logger.disabled = was_disabled
    check_complete(name_or_path, config, found)
    if not is_quantized(config):
        check_numbers(name_or_path, model)
    check_quantized_layers(model)  # for models other than Mini, which does this itself
    return (model if options else model.to(torch_device)).eval(), tokenizer


def check_generation_config(folder: Path) -> None:
    """
    Raises ValueError if a folder has generation settings that are no JSON, or none that transformers takes: it would
    leave out the first without a word, and of others say nothing before it writes.
    """
    path = folder / GENERATION_CONFIG_NAME
    if not path.is_file():
        return
    settings = read_json(path)
    for name in WHOLE_NUMBERS:
        value = settings.get(name)
        if any(type(number) not in (int, NoneType) for number in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{path} must have a whole number as {name}, got {value!r:.40}.")
    try:
        GenerationConfig.from_dict(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has settings that do not fit: {' '.join(str(error).split())}") from None


def check_complete(name_or_path: str, config: PreTrainedConfig, found: dict[str, Any]) -> None:
    """
    Raises ValueError if weights are missing, left over or of another shape. `from_pretrained` would only warn, and use
    random weights or leave layers out. In models other than Mini, left-over weights are usual and allowed.
    """
    for kind, words in (("missing", "not there"), ("unexpected", "left over"), ("mismatched", "of another shape")):
        names = found[f"{kind}_keys"]
        if names and (kind != "unexpected" or config.model_type == MiniConfig.model_type):
            first = min(name if isinstance(name, str) else name[0] for name in names)
            raise ValueError(
                f"The weights in {name_or_path!r} do not fit its {MODEL_CONFIG}: {len(names)} are {words}, first "
                f"{first}."
            )


def check_numbers(name_or_path: str, model: PreTrainedModel) -> None:
    """
    Raises ValueError if a weight is saved as integers, as another quantization does it. `from_pretrained` would take
    them for the numbers that they stand for. Buffers, such as the masks of older models, may be integers.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = list(filter(None, [cached_file(name_or_path, SAFE_WEIGHTS_NAME, **WITHOUT_ERRORS)]))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in parameters.keys() & file.keys():
                if (dtype := file.get_slice(name).get_dtype()).startswith(("I", "U", "BOOL")):
                    raise ValueError(
                        f"The weights in {name_or_path!r} are integers ({name}: {dtype}), and its {MODEL_CONFIG} names "
                        f"no quantization that says what they stand for: save them as float32, float16 or bfloat16."
                    )


def load_config(name_or_path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """
    The configuration of a checkpoint.

    Raises:
        ValueError: if it cannot be read, or the checkpoint has code of its own that nobody said may run.
        OSError: if there is none.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name_or_path!r} has Python code of its own, which runs when it is loaded: if you trust that code, give "
            f"trust_remote_code."
        ) from None


def load_tokenizer(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        ValueError: if its files are damaged.
        OSError: if there are no files.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"The tokenizer in {name_or_path!r} is damaged ({type(error).__name__}: {error}).") from None
    if not isinstance(tokenizer.model_max_length, int | float):
        length = tokenizer.model_max_length
        raise ValueError(
            f"The tokenizer in {name_or_path!r} is damaged: model_max_length is no number, but {length!r}."
        )
    return tokenizer


def is_chat_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model was taught to chat: it then ends its turns with <|end|>, as its generation settings say."""
    end_ids = model.generation_config.eos_token_id
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    # Not convert_tokens_to_ids, which gives <|endoftext|> for what a tokenizer such as GPT-2's does not have, or None.
    end_id = tokenizer.get_vocab().get("<|end|>", -1)
    return tokenizer.chat_template is not None and end_id in end_ids


def load_assistant(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PreTrainedModel:
    """
    A smaller model that drafts tokens for another one (assisted decoding).

    Raises:
        ValueError: if it has another vocabulary.
    """
    assistant, its_tokenizer = load_checkpoint(find_checkpoint(name), trust_remote_code, device=str(model.device))
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"assistant {name!r} has another tokenizer than the model: it cannot draft for it.")
    return assistant


def existing_device(name: str | None) -> torch.device:
    """
    The device of that name. Without a name it is a GPU, or the CPU if there is no GPU.

    Raises:
        ValueError: if there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise ValueError(f"There is no device {name!r} here; there is {', '.join(there)}.") from None
    if device.type == "meta":
        raise ValueError("The device 'meta' holds no numbers.")
    return device
