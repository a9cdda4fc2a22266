"""What a request may ask for. What is wrong, or would be passed over in silence, is refused with a reason."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving import utils

from ..text_generation import failures_in_a_sentence
from .models import split_model_id

# What OpenAI's protocol has and the server would ignore, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
# What other values would end in an error of the server.
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "a number that is not negative"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, and 1 at most"),
    "frequency_penalty": (lambda value: value > -1, "a number above -1"),
}
# Of `generation_config`: an answer is one text of tokens. An early exit changes the number of layers of the model, and
# leaves it changed after an error, for all requests.
NEUTRAL_IN_SETTINGS = {
    "assistant_early_exit": (None,), "num_return_sequences": (None, 1), "return_dict_in_generate": (None, False)
}  # fmt: skip
MOST_CHOICES = 128
MOST_TOKENS = 1 << 31
LARGEST_SEED = (1 << 63) - 1 - MOST_CHOICES  # each choice has the next one


class Checked:
    """
    For handlers: refuses, with a reason, what they would ignore.

    Attributes:
        neutral: what does not work at this endpoint, with the values that ask for nothing and may stand there.
        supported: what of that works all the same.
        fewest_tokens: the least that a request may ask for.
    """

    neutral = NEUTRAL
    supported: frozenset[str] = frozenset()
    fewest_tokens = 1

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        for name in self.neutral.keys() & body.keys() - self.supported:
            if body[name] is not None and body[name] not in self.neutral[name]:
                raise HTTPException(400, f"{name} does not work here, got {body[name]!r}: leave it out.")
        settings = settings_in(body.get("generation_config"))
        for name, neutral in NEUTRAL_IN_SETTINGS.items():
            if (value := settings.get(name)) not in neutral:
                raise HTTPException(400, f"{name} does not work here, got {value!r}: leave it out.")
        for stop in (body.get("stop"), settings.get("stop_strings")):
            if stop is not None and not all(isinstance(text, str) and text for text in as_list(stop)):
                raise HTTPException(400, f"stop must be a text or a list of texts that are not empty, got {stop!r}.")
        for name in ("stream", "echo"):
            if body.get(name) not in (None, True, False):
                raise HTTPException(400, f"{name} must be true or false, got {body[name]!r:.80}.")
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if body.get(name) is not None:
                number_in(body, name, 1, self.fewest_tokens, MOST_TOKENS)
        number_in(body, "seed", 0, 0, LARGEST_SEED)
        if not isinstance(suffix := body.get("suffix") or "", str):
            raise HTTPException(400, f"suffix must be a text, got {suffix!r}.")
        for name, (fits, words) in NUMBERS.items():
            if (value := body.get(name)) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                raise HTTPException(400, f"{name} must be {words}, got {value!r}.")
            if value > sys.float_info.max:
                raise HTTPException(400, f"{name} must be finite, got {value!r:.80}.")

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        # Without the seed, which transformers would set at once, whatever is being written.
        config = super()._build_generation_config({**body, "seed": None}, model_generation_config, use_cb=use_cb)
        config.seed_of_request = body.get("seed")
        return config

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, PreTrainedModel, Any]:
        # transformers compares with the name of the start alone; a client may also name the folder that it stands for.
        models = self.model_manager
        if models.force_model is None:
            split_model_id(body.get("model"))  # refuses what is no name
        elif body.get("model") == models.checkpoint:
            body["model"] = models.force_model
        return super()._resolve_model(body)


@contextlib.contextmanager
def wrong_input_is_refused(body: dict[str, Any] | None = None) -> Iterator[None]:
    """
    Status 400 and a sentence for wrong input, which would otherwise be an error of the server without a reason.

    Args:
        body: of the request, if it is JSON.
    """
    try:
        with failures_in_a_sentence():
            yield
    except TemplateError as error:
        raise HTTPException(400, f"The chat template refuses the messages: {error}") from None
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise HTTPException(404, f"There is no such model: {' '.join(str(error).split())}") from None
    except (HTTPException, utils.CBWorkerDeadError):
        raise
    except Exception as error:  # of any kind: the rest of the request was looked at, these settings by nobody
        if body is None or body.get("generation_config") is None:
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise HTTPException(400, f"generation_config has settings that do not fit: {reason}.") from error


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def settings_in(text: Any) -> dict[str, Any]:
    """
    The settings in the field `generation_config`, which is the text of a JSON object; none where there is no field.

    Raises:
        HTTPException: 400, if it is something else.
    """
    try:
        settings = {} if text is None else json.loads(text)
    except (TypeError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise HTTPException(400, f"generation_config must be the text of a JSON object, got {text!r:.80}.")
    return settings


def number_in(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    """
    A whole number of a request, from `least` to `most`; the default where it has none.

    Raises:
        HTTPException: 400, if it is none or lies outside.
    """
    value = body.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise HTTPException(400, f"{name} must be a whole number from {least} to {most}, got {value!r}.")
    return value
