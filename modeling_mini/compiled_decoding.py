"""
A decoding step as one native function: what `model.compile_decoding()` makes on a CPU, and `generate` then uses.

Without a compiler (decoding.py), a step of a small model is about a hundred calls of torch, each a few microseconds
long, and a product of matrices with few rows is slow in every library. Here the step is one function in C++
(native_step.py). It is compiled once on a machine, in a few seconds, for models of any shape and any number of
sequences, padded or not.

It contains no weights. One sequence reads them where the model has them, in float32, INT8 or INT4. For several
sequences, those in float32 and INT8 are packed in each call of `generate`, in the order in which the function reads
them. So training, loading or merging between two calls have their effect.

The function also reads a short prompt, a block of tokens at a time. There torch would need more time for its calls than
for its products, and quantized weights would have to be dequantized. A long prompt is read by the modules.

It adds the same numbers as the modules, in another order. So logits differ by rounding, by about 1e-7 of their size.
Therefore it is used in float32 only: in bfloat16 the difference would sometimes choose another token.
"""

import ctypes
import functools
import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache

from .decoding import PACKED_BYTES, Decoder
from .integrations import features_of
from .native_code import kept_library, load_library
from .native_step import SOURCE
from .quantized_decoding import QuantizedLinear, with_quantized

NAME = "decoding"  # folder of the compiled function in the cache
# The same as in native_step.py: how many columns a block of packed weights has, how many projections may share an
# input, and the numbers of the enumerations `Format`, `Kind` and `Activation`.
COLUMNS, PARTS = 32, 3
FORMATS = {torch.float32: 0, torch.int8: 1, torch.uint8: 2}
KINDS = {nn.Identity: 0, nn.LayerNorm: 1, nn.RMSNorm: 2}
ACTIVATIONS = {
    type(ACT2FN[name]): number
    for name, number in {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3, "relu2": 4}.items()
}
# A block of a prompt has about this many tokens, of all sequences together: more would not stay in the L1 cache.
BLOCK_TOKENS = 16
# Longer prompts, of all sequences together, are read by the modules: products and attention of torch are faster there.
# Quantized weights would have to be dequantized for them. Milliseconds of one core to the second token, modules and
# native: float32 with 32 tokens, small 10.9 and 7.4, medium 38.7 and 35.4; with 64 tokens, medium 53 and 63. INT8 with
# 256 tokens, small 44 and 37, medium 199 and 206; INT4, small 46 and 43, medium 200 and 211.
PROMPT_TOKENS, QUANTIZED_PROMPT_TOKENS = 32, 256


# The structures of native_step.py ------------------------------------------------------------------------------------


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Fields of one type."""
    return [(name, kind) for name in names.split()]


class LinearStruct(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p * PARTS, "weights scales biases"),
        *fields(ctypes.c_int64 * PARTS, "ends"),
        *fields(ctypes.c_int64, "inputs outputs is_packed format block"),
        *fields(ctypes.c_void_p, "table"),
    ]


class NormStruct(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_void_p, "weight bias"),
        *fields(ctypes.c_int64, "size kind"),
        *fields(ctypes.c_double, "eps"),
    ]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        *fields(NormStruct, "input_layernorm q_norm k_norm post_attention_layernorm"),
        *fields(LinearStruct, "query_key_value o_proj gate_up down_proj"),
        *fields(ctypes.c_double, "scaling"),
        *fields(ctypes.c_int64, "activation"),
    ]


class ModelStruct(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.POINTER(LayerStruct), "layers"),
        *fields(ctypes.c_void_p, "embedding"),
        *fields(NormStruct, "norm"),
        *fields(LinearStruct, "head"),
        *fields(ctypes.c_int64, "num_layers vocab_size hidden_size heads kv_heads"),
        *fields(ctypes.c_int64, "head_dim rotary_dim intermediate_size"),
    ]


class StepStruct(ctypes.Structure):
    _fields_ = [
        *fields(ctypes.c_int64, "batch tokens length capacity threads"),
        *fields(ctypes.c_void_p, "token_ids cos sin"),
        *fields(ctypes.c_int64, "rotary_stride"),
        *fields(ctypes.c_void_p, "mask cache logits scratch"),
    ]


class NativeModel:
    """
    What the function reads of a model: a `struct`, and the tensors that it points to.

    Args:
        pack: copies the weights of products into blocks of columns, but not those in INT4.
    """

    def __init__(self, model: PreTrainedModel, pack: bool) -> None:
        self.pack = pack
        self.tensors: list[torch.Tensor] = []
        config, body = model.config, model.model
        modules = body.layers[: config.num_hidden_layers]
        self.layers = (LayerStruct * len(modules))(*map(self.layer, modules))
        self.struct = ModelStruct(
            layers=self.layers,
            embedding=self.pointer(body.embed_tokens.weight),
            norm=self.norm(body.norm),
            head=self.linear(model.lm_head),
            num_layers=len(modules),
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_dim=2 * len(body.rotary_emb.inv_freq),
            intermediate_size=config.intermediate_size,
        )

    def layer(self, layer: nn.Module) -> LayerStruct:
        """One block."""
        attention, mlp = layer.self_attn, layer.mlp
        return LayerStruct(
            input_layernorm=self.norm(layer.input_layernorm),
            q_norm=self.norm(attention.q_norm),
            k_norm=self.norm(attention.k_norm),
            post_attention_layernorm=self.norm(layer.post_attention_layernorm),
            query_key_value=self.linear(attention.q_proj, attention.k_proj, attention.v_proj),
            o_proj=self.linear(attention.o_proj),
            gate_up=self.linear(mlp.gate_proj, mlp.up_proj),
            down_proj=self.linear(mlp.down_proj),
            scaling=attention.scaling,
            activation=ACTIVATIONS[type(mlp.act_fn)],
        )

    def pointer(self, tensor: torch.Tensor | None) -> int | None:
        """The address of the numbers of a tensor, in the order of its dimensions."""
        if tensor is None:
            return None
        self.tensors.append(tensor.detach().contiguous())
        return self.tensors[-1].data_ptr()

    def norm(self, norm: nn.Module) -> NormStruct:
        """A norm, or none at all."""
        kind = KINDS[type(norm)]
        if type(norm) is nn.Identity:
            return NormStruct(kind=kind)
        bias = self.pointer(getattr(norm, "bias", None))
        return NormStruct(self.pointer(norm.weight), bias, norm.weight.numel(), kind, norm.eps)

    def linear(self, *projections: nn.Linear | QuantizedLinear) -> LinearStruct:
        """Projections of the same input."""
        formats = {getattr(each, "format", "float32") for each in projections}
        # Projections that are stored in different formats are all read in float32.
        as_stored = len(formats) == 1 and formats != {""}
        parts = []
        for each in projections:
            if as_stored or isinstance(each, nn.Linear):
                parts.append((each.weight, getattr(each, "scales", None), each.bias))
            else:
                parts.append((each.dequantized(), None, each.bias))
        shapes = [features_of(each) for each in projections]
        inputs = shapes[0][1]
        pack = self.pack and parts[0][0].dtype != torch.uint8  # INT4 is read in tiles of another order
        if pack:
            weight, scales, bias = (
                None if tensors[0] is None else torch.cat([tensor.detach() for tensor in tensors])
                for tensors in zip(*parts, strict=True)
            )
            missing = -len(weight) % COLUMNS
            scales, bias = (F.pad(each, (0, missing)) if each is not None else None for each in (scales, bias))
            blocks = F.pad(weight, (0, 0, 0, missing)).view(-1, COLUMNS, inputs)
            parts = [(blocks.transpose(1, 2), scales, bias)]
            ends = [len(weight) + missing]
        else:
            ends = list(itertools.accumulate(outputs for outputs, _ in shapes))
        struct = LinearStruct(inputs=inputs, outputs=ends[-1], is_packed=pack, format=FORMATS[parts[0][0].dtype])
        if struct.format == FORMATS[torch.uint8]:
            struct.block, struct.table = projections[0].block, self.pointer(projections[0].table)
        for number, (weight, scales, bias) in enumerate(parts):
            struct.weights[number], struct.scales[number] = self.pointer(weight), self.pointer(scales)
            struct.biases[number], struct.ends[number] = self.pointer(bias), ends[number]
        return struct


# The step ------------------------------------------------------------------------------------------------------------


@functools.cache
def native_library() -> ctypes.CDLL:
    """The compiled native_step.py. Raises as `load_library`."""
    library = load_library(NAME, SOURCE)
    library.scratch_size.restype = ctypes.c_int64
    library.decoding_step.restype = ctypes.c_bool
    return library


def is_compiled() -> bool:
    """Whether an earlier call of `native_library` has compiled the function on this machine."""
    return kept_library(NAME, SOURCE) is not None


class CompiledStep:
    """
    The native function.

    Raises:
        ValueError: if the model is not in float32 on a CPU, or has an activation that the function does not know.
        RuntimeError, OSError: as `native_library`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if reason := self.reason_against(model):
            raise ValueError(reason)
        self.library = native_library()

    def reason_against(self, model: PreTrainedModel) -> str | None:
        """Why the function cannot decode a model that `obstacle_of_model` lets pass; `None` if it can."""
        weight = model.model.embed_tokens.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            kind = str(weight.dtype).removeprefix("torch.")
            return f"It is compiled for float32 on a CPU; this model is {kind} on a {weight.device.type}."
        for layer in model.model.layers:
            if type(layer.mlp.act_fn) not in ACTIVATIONS:
                known = ", ".join(each.__name__ for each in ACTIVATIONS)
                return f"It is compiled for the activations {known}; this model has {type(layer.mlp.act_fn).__name__}."
        return None

    def suits(self, model: PreTrainedModel) -> bool:
        """Whether it computes what the model does, as it is now."""
        return self.reason_against(model) is None

    def reads_prompt(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_quantized: bool,
    ) -> bool:
        """Whether the function reads the prompt of a request, too. The arguments are those of `decode`."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if type(cache) is not DynamicCache or generation_config.prefill_chunk_size is not None:
            return False
        batch, length = input_ids.shape
        known = cache.get_seq_length()
        # With a cache, transformers takes the text with or without the tokens that are in it, and tells by the mask.
        mask_length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        if known and mask_length != length:
            return False
        most = QUANTIZED_PROMPT_TOKENS if is_quantized else PROMPT_TOKENS
        return known < length <= known + most // batch

    def decoder(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        max_new_tokens: int,
        prompt: torch.Tensor | None = None,
    ) -> "CompiledDecoder":
        """The state of one call of `generate`. The arguments are those of `CompiledDecoder`."""
        return CompiledDecoder(self.library, model, cache, attention_mask, position_ids, max_new_tokens, prompt)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledStep":
        """A copy of a model shares the function, because weights are its arguments."""
        return self

    def __reduce__(self) -> tuple[type, tuple]:
        """A model that is pickled and loaded again has no compiled step."""
        return type(None), ()


def bytes_of_weights(model: PreTrainedModel) -> int:
    """The size of all parameters, quantized weights counted as they are when they are packed."""
    quantized = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return sum(parameter.nbytes for parameter in model.parameters()) + sum(each.packed_bytes for each in quantized)


class CompiledDecoder(Decoder):
    """
    `Decoder` with the native step.

    Args:
        library: the compiled function.
        prompt: (batch, length), if `read_prompt` will read those of its tokens that are not in the cache; `None` if the
            cache has all of them.

    The other arguments are those of `Decoder`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        model: PreTrainedModel,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        max_new_tokens: int,
        prompt: torch.Tensor | None = None,
    ) -> None:
        self.library = library
        prompt_length = None
        if prompt is not None:
            prompt_length, config = prompt.shape[1], model.config
            size = (len(prompt), config.num_key_value_heads, 0, config.head_dim)
            nothing = model.model.embed_tokens.weight.detach().new_empty(size)
            for number in range(config.num_hidden_layers):  # makes the layers of a new cache
                cache.update(nothing, nothing, number)
        super().__init__(model, cache, attention_mask, position_ids, max_new_tokens, prompt_length=prompt_length)

    def takes_form_for_many(self, keys_and_values: torch.Tensor) -> bool:
        """Always: there is no other form of this step."""
        return True

    def read_weights(self, model: PreTrainedModel) -> None:
        """One sequence needs each weight once in a step, and reads it where it lies. For several, packing pays."""
        model = with_quantized(model)
        self.native_model = NativeModel(model, pack=self.batch > 1 and bytes_of_weights(model) <= PACKED_BYTES)

    def reserve(self, capacity: int) -> None:
        """Moves the cache into one tensor (layers, 2 * key_value_heads, batch, capacity, head_dim)."""
        before = self.filled
        batch, heads, length, head_dim = before[0].shape
        self.caches = before[0].new_empty(len(before), heads, batch, capacity, head_dim)
        self.whole = [cache.transpose(0, 1) for cache in self.caches]
        for whole, filled in zip(self.whole, before, strict=True):
            whole[:, :, :length] = filled
        self.added = None  # what is added to scores: -inf for padding, which is only in the prompt
        if self.mask is not None:
            self.added = self.caches.new_zeros(batch, capacity)
            self.added[:, : self.mask.shape[3]].masked_fill_(~self.mask[:, 0, 0], -float("inf"))
            self.whole_mask = F.pad(self.mask, (0, capacity - self.mask.shape[3]), value=True)
        self.rotary_table.reserve(capacity - self.prompt_length)
        self.capacity = capacity
        self.padded_logits = self.caches.new_empty(batch, self.native_model.struct.head.outputs)
        self.block = max(1, BLOCK_TOKENS // batch)  # tokens of a sequence at a time
        self.arguments = StepStruct(
            batch=batch,
            tokens=self.block,
            capacity=capacity,
            threads=torch.get_num_threads(),
            mask=None if self.added is None else self.added.data_ptr(),
            cache=self.caches.data_ptr(),
        )
        struct = ctypes.byref(self.native_model.struct)
        self.scratch = self.caches.new_empty(self.library.scratch_size(struct, ctypes.byref(self.arguments)))
        self.arguments.scratch = self.scratch.data_ptr()

    def step(self, token_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The native step for one token of each sequence, whose keys and values it puts into the cache."""
        self.call(token_ids[:, None], cos, sin, self.length - 1)
        return self.padded_logits[:, : self.native_model.struct.vocab_size]

    def read_prompt(self, token_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """
        Puts the keys and values of the tokens of the prompt that are not in the cache there, and gives the logits after
        them (batch, vocab_size).

        Args:
            token_ids: (batch, tokens).
            position_ids: (batch or 1, tokens).
        """
        cos, sin = self.rotary_table.at_positions(position_ids)
        for start in range(0, token_ids.shape[1], self.block):
            end = start + self.block
            block = token_ids[:, start:end].contiguous()
            self.call(block, cos[:, start:end], sin[:, start:end], self.length, end >= token_ids.shape[1])
            self.length += block.shape[1]
        return self.padded_logits[:, : self.native_model.struct.vocab_size]

    def call(
        self, token_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, length: int, gives_logits: bool = True
    ) -> None:
        """
        Calls the native function.

        Args:
            token_ids: (batch, tokens).
            cos, sin: (batch or 1, tokens, rotary_dim).
            length: how many tokens the cache has.

        Raises:
            IndexError: for a token that is not in the vocabulary, such as a wrong pad token, as an embedding does.
        """
        arguments = self.arguments
        arguments.length, arguments.tokens = length, token_ids.shape[1]
        arguments.token_ids, arguments.cos, arguments.sin = (tensor.data_ptr() for tensor in (token_ids, cos, sin))
        arguments.rotary_stride = cos.stride(0) if len(cos) > 1 else 0
        arguments.logits = self.padded_logits.data_ptr() if gives_logits else None
        if not self.library.decoding_step(ctypes.byref(self.native_model.struct), ctypes.byref(arguments)):
            raise IndexError("index out of range in self")
