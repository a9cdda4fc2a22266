"""
When `generate()` leaves transformers' loop: a mixin for the causal language model.

`decode` (decoding.py) writes the same tokens as transformers' loop in less time, and `obstacle` recognises each request
or model that it cannot handle. These take transformers' loop, so nobody has to choose.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2CLS
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .compiled_decoding import CompiledStep, is_compiled
from .decoding import NORMS, decode, obstacle, obstacle_of_model
from .graph_decoding import GraphStep
from .quantized_decoding import QuantizedLinear, dequantized, has_quantized_layers, with_quantized

logger = logging.get_logger(__name__)


class FastGenerationMixin:
    """
    The fast path of `generate()`, and `compile_decoding()`, which makes it faster still.

    Attributes:
        plain_modules: the classes whose forward `decoding_step` reproduces, each with that forward; see `forwards_of`.
        compiled_step: what `compile_decoding` made, or `None`.
    """

    plain_modules: dict[type, Callable] = {}
    compiled_step: CompiledStep | GraphStep | None = None

    def compile_decoding(self, only_kept: bool = False) -> None:
        """
        Compiles the step with which `generate` writes. On a CPU that gives a native function for models in float32,
        several times as fast; compiling takes a few seconds the first time on a machine. On a GPU it gives a CUDA
        graph. All other requests are decoded as before. If there is no compiler, or the model has layers other than the
        plain ones, a warning says so and nothing changes.

        Args:
            only_kept: take the native function where an earlier call has compiled it on this machine, which takes
                milliseconds, and do nothing elsewhere, without a warning.
        """
        if only_kept and (self.device.type != "cpu" or not is_compiled()):
            return
        model = dequantized(self) if has_quantized_layers(self) else self
        reason = obstacle_of_model(model, self.plain_modules)
        if reason is None:
            try:
                self.compiled_step = compiled_step_class(self.device)(model)
                return
            except (ValueError, RuntimeError, OSError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
        if not only_kept:
            logger.warning(f"Decoding is not compiled, and goes on without: {reason[:300]}")

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, fast_decoding: bool | str | None = None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        """
        Lets `generate` take `fast_decoding`: transformers' generation configs have no such field.

        Args:
            fast_decoding: `True` by default; `False` for transformers' loop; "exact" for the fast path with the bits of
                that loop also where many sequences are decoded at once.

        Raises:
            ValueError: for any other value.
        """
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if fast_decoding is not None:
            generation_config.fast_decoding = fast_decoding
        if (given := getattr(generation_config, "fast_decoding", True)) not in (True, False, "exact"):
            raise ValueError(f'fast_decoding must be True, False or "exact", got {given!r}.')
        # A cache that the caller gave must be complete at the end, also for sequences that have ended.
        generation_config.keeps_cache = model_kwargs.get("past_key_values") is not None
        return generation_config, model_kwargs

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        """What `generate` calls for greedy decoding and for sampling: the fast path wherever it gives the same."""
        model, plain_modules, reads_prompt = self, self.plain_modules, False
        # With "exact", layers of bitsandbytes stay: they give other bits than their dequantized weights do.
        if getattr(generation_config, "fast_decoding", True) is True:
            step, is_quantized = self.compiled_step, has_quantized_layers(self)
            if step is not None and step.suits(self):
                reads_prompt = step.reads_prompt(input_ids, generation_config, model_kwargs, is_quantized)
            if is_quantized:
                model = with_quantized(self) if reads_prompt else dequantized(self)
                plain_modules = {**plain_modules, QuantizedLinear: QuantizedLinear.forward}
        if obstacle(model, plain_modules, generation_config, synced_gpus, model_kwargs) is None:
            return decode(
                *(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs),
                reads_prompt,
            )
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )


def compiled_step_class(device: torch.device) -> type[CompiledStep] | type[GraphStep]:
    """What `compile_decoding` makes for a model on this device."""
    return GraphStep if device.type == "cuda" else CompiledStep


def forwards_of(*blocks: type[nn.Module]) -> dict[type, Callable]:
    """
    The given classes and the classes that they are built of, each with its present forward. A subclass does not count
    as its class, nor does a class whose forward was replaced: `decoding_step` does not know what those compute.
    """
    activations = (entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())
    parts = (nn.Embedding, nn.Linear, nn.Identity, nn.Dropout, nn.ModuleList)
    return {module_class: module_class.forward for module_class in (*blocks, *parts, *NORMS, *activations)}
