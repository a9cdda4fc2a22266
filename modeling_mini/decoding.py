"""
The fast path of `generate()`: the same tokens as transformers' loop, several times sooner.

A decoding step of a small model has little arithmetic and many function calls. At 2.5 million parameters, well over
half of the time of transformers' loop is Python code that calls modules (docs/LOG.md). Here one step is one function,
`decoding_step`. It computes what `MiniForCausalLM.forward` computes for one new token of each sequence, with plain
torch operations on a cache that is allocated once. Read it beside modeling_mini.py: each line has a counterpart there.

When it runs: `obstacle` looks for anything in a request or a model that this function does not reproduce. If there is
nothing, `decode` runs in place of transformers' `_sample`. Everything else is still done by transformers: the checks of
`generate`, the forward pass over the prompt, logits processors, stopping criteria, streamers and the results. Only
where one sequence is sampled on a CPU, fast_sampling.py draws the token.

Why it is right: weights are read anew in each call of `generate`, so training, loading or `.to()` between two calls
have their effect. And each operation is the one that the module would call, on the same numbers in the same order. On a
CPU the logits of every preset are equal bit by bit. At narrower widths, the last bit of a product of fused projections
may differ. tests/modeling_mini/test_decoding.py checks this on hundreds of random models.

Many sequences at once, in float32 on a CPU, are the exception. Their time is that of the products, so these are done in
the form that is fastest there: weights are copied once in the order in which a product reads them, attention is two
batched products, and sequences that have ended are no longer computed. The same numbers are added in another order, so
the last bits of logits differ. `generate(..., fast_decoding="exact")` decodes any number of sequences as it does few.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from configuration_mini import unknown_norm
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .fast_sampling import FastSampler

# RoPE types whose frequencies depend on the length of the text, so cosine and sine cannot be computed in advance.
CHANGING_ROPE_TYPES = ("dynamic", "longrope")
OUTPUT_CAPTURING = "transformers.utils.output_capturing"
# Projections of more bytes than this are not fused: the time of a step is then that of reading memory, not of calls.
# Tokens/s on two cores, fused and not fused: small (6 MiB) 2,310 and 2,196, medium (48 MiB) 205 and 209, large (225
# MiB) 45 and 51.
FUSED_BYTES = 16 * 1024**2
# The norms that a step can compute: the function, and the attributes of the module that are its further arguments.
NORMS: dict[type[nn.Module], tuple[Callable[..., torch.Tensor], tuple[str, ...]]] = {
    nn.LayerNorm: (F.layer_norm, ("normalized_shape", "weight", "bias", "eps")),
    nn.RMSNorm: (F.rms_norm, ("normalized_shape", "weight", "eps")),
}
# Cache and text start with space for this many more tokens. When they are full, their capacity doubles.
FIRST_CAPACITY = 1024
# From this many sequences on, float32 on a CPU is decoded in the form for many, which copies up to PACKED_BYTES.
MANY_SEQUENCES = 8
PACKED_BYTES = 128 * 1024**2
# The cache of many sequences starts with space for fewer tokens: each takes as much memory as that of a whole batch.
FIRST_CAPACITY_OF_MANY = 64
# When no more than this share of the sequences is unfinished, the finished ones are dropped. That copies the cache of
# the others, so it is not done for each of them.
UNFINISHED_SHARE = 0.75


# When ----------------------------------------------------------------------------------------------------------------


def obstacle(
    model: PreTrainedModel,
    plain_modules: dict[type, Callable],
    generation_config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict[str, Any],
) -> str | None:
    """
    The reason why a request needs transformers' loop; `None` if the fast path gives the same result.

    Args:
        plain_modules: the classes whose forward `decoding_step` reproduces, each with that forward. Anything else in
            the model, be it an adapter, a quantized layer, a block of an experiment or a patched class, is an obstacle.
    """
    if not getattr(generation_config, "fast_decoding", True):
        return "fast_decoding is off"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if generation_config.is_assistant or synced_gpus:
        return "this is one part of a larger generation"
    if unknown := {name for name, value in model_kwargs.items() if value is not None} - {
        "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"
    }:  # fmt: skip
        return f"the model is given {', '.join(sorted(unknown))}"
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    if not model_kwargs.get("use_cache") or type(cache) is not DynamicCache:
        return "there is no plain growing cache"
    if any(type(layer) is not DynamicLayer for layer in cache.layers) or cache.offloading:
        return "there is no plain growing cache"
    if mask is not None and mask.dim() != 2:
        return "the attention mask is not one row for each sequence"
    return obstacle_of_model(model, plain_modules)


def obstacle_of_model(model: PreTrainedModel, plain_modules: dict[type, Callable]) -> str | None:
    """The reason why a model cannot be decoded by `decoding_step`; `None` if it can."""
    # peft's prompt and prefix tuning replace this method to add what they have learned.
    prepare = model.prepare_inputs_for_generation
    if getattr(prepare, "__func__", None) is not type(model).prepare_inputs_for_generation:
        return "something else prepares the inputs"
    if ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation) is not sdpa_attention_forward:
        return "attention is not sdpa"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks for all modules"
    kinds = set()
    # Called for every text, so it must be cheap: the name of a module is looked up only when it is an obstacle.
    for module in model.modules():
        # Offloading works by hooks, and compilation by a `forward` of the instance. When hidden states were asked for
        # once, transformers leaves hooks behind that do nothing until they are asked for again.
        is_plain = plain_modules.get(type(module)) is type(module).forward and "forward" not in module.__dict__
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not is_plain or any(getattr(hook, "__module__", None) != OUTPUT_CAPTURING for hook in hooks):
            name = next(name for name, each in model.named_modules() if each is module)
            return f"{name or 'the model'} is not a plain {type(module).__name__}: it has another forward, or a hook"
        # A module with weights of its own (also a resized embedding) computes the same in training mode.
        if module.training and not module._parameters:
            return "the model is in training mode, or a part of it"
        for parameter in module._parameters.values():
            if parameter is not None:
                if type(parameter) is not nn.Parameter:
                    return f"a {type(module).__name__} has a weight of type {type(parameter).__name__}"
                kinds.add((parameter.dtype, parameter.device))
    if len(kinds) != 1:
        return "the weights have several types or lie on several devices"
    ((dtype, device),) = kinds
    if not dtype.is_floating_point or torch.is_autocast_enabled(device.type):
        return "the weights are computed with in another type"
    return None


# One step ------------------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """One projection, or several whose weights are stacked: weight (out, in), its transpose, and bias (out,)."""

    weight: torch.Tensor
    transposed: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, *projections: nn.Linear, pack: bool = False) -> "Linear":
        """
        One projection without a copy, or a copy of several that have no biases. Packed, the transpose is contiguous: a
        product with 8 rows then takes 0.6 and one with 64 rows 0.8 of the time (docs/LOG.md).
        """
        weight, bias = projections[0].weight, projections[0].bias
        if len(projections) > 1:
            weight = torch.cat([projection.weight for projection in projections])
        return cls(weight, weight.t().contiguous() if pack else weight.t(), bias)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return torch.mm(states, self.transposed)  # what F.linear calls in the end
        return torch.addmm(self.bias, states, self.transposed)


class Norm(NamedTuple):
    """The function of a norm and its further arguments; without a function, nothing is normalised."""

    function: Callable[..., torch.Tensor] | None
    arguments: tuple[Any, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> "Norm":
        """Raises ValueError for a norm that is not in `NORMS`."""
        if type(module) is nn.Identity:
            return cls(None)
        if type(module) not in NORMS:
            raise unknown_norm("decoding_step", type(module).__name__)
        function, names = NORMS[type(module)]
        return cls(function, tuple(getattr(module, name) for name in names))

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        return self.function(states, *self.arguments)


class Layer(NamedTuple):
    """The parts of one block. Projections of the same input are a list: one if they are fused, several if not."""

    input_layernorm: Norm
    query_key_value: list[Linear]
    q_norm: Norm
    k_norm: Norm
    o_proj: Linear
    post_attention_layernorm: Norm
    gate_up: list[Linear]
    down_proj: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    scaling: float


class Weights(NamedTuple):
    """Everything that `decoding_step` needs of a model. It is made for one call of `generate`."""

    embedding: torch.Tensor
    layers: list[Layer]
    norm: Norm
    head: Linear
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    for_many: bool

    @classmethod
    def of(cls, model: PreTrainedModel, may_copy: bool = True, for_many: bool = False) -> "Weights":
        """
        Args:
            may_copy: whether weights may be copied, which hides later changes of the model.
            for_many: takes the form for many sequences at once: packed weights, and attention as batched products.
        """
        config, body = model.config, model.model
        modules = body.layers[: config.num_hidden_layers]
        projections = [
            projection
            for layer in modules
            for projection in (
                *(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                *(layer.mlp.gate_proj, layer.mlp.up_proj),
            )
        ]
        is_small = sum(projection.weight.nbytes for projection in projections) <= FUSED_BYTES
        # With a bias in bfloat16, a fused product rounds at another point of the computation.
        together = may_copy and is_small and all(projection.bias is None for projection in projections)
        pack = for_many and sum(projection.weight.nbytes for projection in projections) <= PACKED_BYTES

        def join(*projections: nn.Linear) -> list[Linear]:
            if together:
                return [Linear.of(*projections, pack=pack)]
            return [Linear.of(one, pack=pack) for one in projections]

        layers = [
            Layer(
                input_layernorm=Norm.of(layer.input_layernorm),
                query_key_value=join(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                q_norm=Norm.of(layer.self_attn.q_norm),
                k_norm=Norm.of(layer.self_attn.k_norm),
                o_proj=Linear.of(layer.self_attn.o_proj, pack=pack),
                post_attention_layernorm=Norm.of(layer.post_attention_layernorm),
                gate_up=join(layer.mlp.gate_proj, layer.mlp.up_proj),
                down_proj=Linear.of(layer.mlp.down_proj, pack=pack),
                activation=layer.mlp.act_fn.forward,
                scaling=layer.self_attn.scaling,
            )
            for layer in modules
        ]
        return cls(
            embedding=body.embed_tokens.weight,
            layers=layers,
            norm=Norm.of(body.norm),
            head=Linear.of(model.lm_head, pack=pack),
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            for_many=for_many,
        )


def projected(states: torch.Tensor, projections: list[Linear]) -> torch.Tensor:
    """The results of all projections of one input, concatenated in the last dimension."""
    if len(projections) == 1:
        return projections[0](states)
    return torch.cat([projection(states) for projection in projections], dim=-1)


def attention_of_many(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """
    Attention of one query for each head, as two batched products of which each takes all query heads of a group.

    Args:
        query: (batch, heads, head_dim).
        keys, values: (batch, key_value_heads, length, head_dim); in memory, heads come before sequences.
        mask: as `mask_of_many` makes it, or `None`.

    Returns:
        (batch, heads, head_dim).
    """
    batch, kv_heads, _, head_dim = keys.shape
    keys, values = (states.transpose(0, 1).flatten(0, 1) for states in (keys, values))  # views
    group = query.view(batch, kv_heads, -1, head_dim).transpose(0, 1).reshape(kv_heads * batch, -1, head_dim)
    group.mul_(scaling)
    if mask is None:
        scores = torch.bmm(group, keys.transpose(1, 2))
    else:
        scores = torch.baddbmm(mask, group, keys.transpose(1, 2))
    output = torch.bmm(torch.softmax(scores, dim=-1), values)  # (key_value_heads * batch, heads of a group, head_dim)
    return output.view(kv_heads, batch, -1, head_dim).transpose(0, 1).reshape(query.shape)


def mask_of_many(mask: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """
    A mask (batch, 1, 1, length), true where a token may be seen, as numbers to add to the scores of
    `attention_of_many`: (key_value_heads * batch, heads / key_value_heads, length).
    """
    added = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -float("inf"))[:, 0]
    return added.expand(kv_heads, -1, heads // kv_heads, -1).flatten(0, 1)


def decoding_step(
    weights: Weights,
    token_ids: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: list[torch.Tensor],
    mask: torch.Tensor | None,
    cache_position: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The logits (batch, vocab_size) after one more token of each sequence, which is also written to the cache.

    Args:
        token_ids: (batch,).
        cos, sin: (batch or 1, 1, rotary_dim), at the position of the token. The first half of `sin` is negated.
        cache: for each layer, the keys and then the values, (batch, 2 * key_value_heads, length, head_dim), with space
            for those of the new token at the end. With weights for many sequences, heads come before sequences in
            memory.
        mask: (batch, 1, 1, length), true where a token may be seen, or `None` if all may.
        cache_position: (1,), the index in the cache at which the new token is written; by default, the last.
    """
    batch, heads, kv_heads, head_dim = len(token_ids), weights.num_heads, weights.num_key_value_heads, weights.head_dim
    if weights.for_many and mask is not None:
        mask = mask_of_many(mask, heads, kv_heads)
    rotary_dim = cos.shape[-1]
    hidden_states = F.embedding(token_ids, weights.embedding)
    for layer, keys_and_values in zip(weights.layers, cache, strict=True):
        states = projected(layer.input_layernorm(hidden_states), layer.query_key_value)
        states = states.view(batch, heads + 2 * kv_heads, head_dim)
        if layer.q_norm.function is not None:
            query, key, value = states.split((heads, kv_heads, kv_heads), dim=1)
            states = torch.cat((layer.q_norm(query), layer.k_norm(key), value), dim=1)
        # Queries and keys are rotated together, in place. A roll by half the width swaps the two features of each pair.
        pairs = states[:, : heads + kv_heads, :rotary_dim]
        other = pairs.roll(rotary_dim // 2, -1)
        pairs.mul_(cos).add_(other.mul_(sin))
        if cache_position is None:
            keys_and_values.select(2, -1).copy_(states[:, heads:])
        else:
            keys_and_values.index_copy_(2, cache_position, states[:, heads:].unsqueeze(2))
        keys, values = keys_and_values.split(kv_heads, dim=1)
        if weights.for_many:
            attention = attention_of_many(states[:, :heads], keys, values, mask, layer.scaling)
        else:
            query = states[:, :heads].unsqueeze(2)
            if mask is not None and heads != kv_heads:  # as transformers does it for grouped heads with a mask
                query = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
            attention = F.scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=mask,
                scale=layer.scaling,
                enable_gqa=mask is None and heads != kv_heads,
            )
        hidden_states = hidden_states + layer.o_proj(attention.reshape(batch, heads * head_dim))
        gate_up = projected(layer.post_attention_layernorm(hidden_states), layer.gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden_states = hidden_states + layer.down_proj(layer.activation(gate) * up)
    return weights.head(weights.norm(hidden_states))


# Many steps ----------------------------------------------------------------------------------------------------------


class RotaryTable:
    """
    Cosine and sine of the rotary embedding for the new tokens of a text.

    Args:
        position_ids: (batch or 1, any length), of which the last column is that of the last token of the prompt.
    """

    def __init__(self, model: PreTrainedModel, position_ids: torch.Tensor) -> None:
        self.rotary_embedding = model.model.rotary_emb
        self.weight = model.model.embed_tokens.weight  # of the type in which the model computes
        self.has_table = self.rotary_embedding.rope_type not in CHANGING_ROPE_TYPES
        self.first_positions = position_ids[:, -1:] + 1
        self.kept: torch.Tensor | None = None

    def reserve(self, capacity: int) -> None:
        """Computes both for the first `capacity` new tokens, where they do not depend on the length of the text."""
        if self.has_table:
            self.cos, self.sin = self.between(0, capacity)

    def between(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `at_positions`, for the new tokens from `start` to `end`."""
        return self.at_positions(self.first_positions + torch.arange(start, end, device=self.first_positions.device))

    def at_positions(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Cosine and sine at these positions (batch or 1, tokens), each (batch or 1, tokens, rotary_dim). The first half
        of the sine is negated.
        """
        cos, sin = self.rotary_embedding(self.weight, position_ids)
        half = sin.shape[-1] // 2
        return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)

    def at(self, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `between`, for one new token: (kept sequences or 1, 1, rotary_dim)."""
        if self.has_table:
            cos, sin = self.cos[:, new : new + 1], self.sin[:, new : new + 1]
        else:
            # For all sequences, because the frequencies depend on the longest, be it finished or not.
            cos, sin = self.between(new, new + 1)
        if self.kept is not None and len(cos) > 1:
            cos, sin = cos[self.kept], sin[self.kept]
        return cos, sin

    def keep(self, sequences: torch.Tensor) -> None:
        """From now on, `at` is for these sequences (indices) of the batch alone."""
        self.kept = sequences


class Decoder:
    """
    The state of one call of `generate` between two steps: weights, cache and positions.

    Args:
        cache: as the first forward over the prompt left it. It is read here, and written by `give_back`.
        attention_mask: (batch, length of the cache), 1 for tokens and 0 for padding; `None` without padding.
        position_ids: as `RotaryTable` takes them.
        max_new_tokens: how many tokens `logits` will read at most.
        exact: decodes many sequences in the form for few.
        prompt_length: the tokens of the prompt; `None` if the cache has all of them.

    Attributes:
        kept: the indices of the sequences that are computed; `None` for all.
        whole: for each layer, keys and values as `decoding_step` takes them, with space for `capacity` tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        max_new_tokens: int,
        exact: bool = False,
        prompt_length: int | None = None,
    ) -> None:
        self.cache = cache
        self.whole = [torch.cat((layer.keys, layer.values), dim=1) for layer in cache.layers]
        self.for_many = not exact and self.takes_form_for_many(self.whole[0])
        self.kept: torch.Tensor | None = None
        self.batch = len(self.whole[0])
        self.read_weights(model)
        self.rotary_table = RotaryTable(model, position_ids)
        self.length = cache.get_seq_length()
        self.prompt_length = self.length if prompt_length is None else prompt_length
        self.max_length = self.prompt_length + max_new_tokens
        self.mask = attention_mask.bool()[:, None, None, :] if attention_mask is not None else None
        if self.for_many and self.mask is not None and self.mask.all():
            self.mask = None
        first_capacity = FIRST_CAPACITY_OF_MANY if self.for_many else FIRST_CAPACITY
        self.reserve(self.prompt_length + min(max_new_tokens, first_capacity))

    @property
    def filled(self) -> list[torch.Tensor]:
        """The first `length` tokens of `whole`, as views."""
        return [keys_and_values.narrow(2, 0, self.length) for keys_and_values in self.whole]

    def takes_form_for_many(self, keys_and_values: torch.Tensor) -> bool:
        """Whether sequences with this cache are decoded in the form for many."""
        is_float32_on_cpu = keys_and_values.dtype == torch.float32 and keys_and_values.device.type == "cpu"
        return is_float32_on_cpu and len(keys_and_values) >= MANY_SEQUENCES

    def read_weights(self, model: PreTrainedModel) -> None:
        """Takes what `step` needs of the model."""
        self.weights = Weights.of(model, for_many=self.for_many)

    def reserve(self, capacity: int) -> None:
        """Moves the cache into tensors of `capacity` tokens."""
        self.whole = [with_capacity(keys_and_values, capacity, self.for_many) for keys_and_values in self.filled]
        if self.mask is not None:
            # Padding stands in the prompt alone.
            self.whole_mask = F.pad(self.mask, (0, capacity - self.length), value=True)
        self.rotary_table.reserve(capacity - self.prompt_length)
        self.capacity = capacity

    def drop_finished(self, unfinished: torch.Tensor) -> None:
        """
        No longer computes finished sequences, once there are enough of them. Their logits are 0 from then on.

        Args:
            unfinished: (batch,), true for each sequence that goes on.
        """
        if not self.for_many:
            return
        kept = unfinished.nonzero().squeeze(1)
        if len(kept) > UNFINISHED_SHARE * len(self.whole[0]):
            return
        places = kept if self.kept is None else torch.searchsorted(self.kept, kept)  # among those kept so far
        self.kept = kept
        self.whole = [keys_and_values[places] for keys_and_values in self.filled]
        if self.mask is not None:
            self.mask = self.mask[places]
        self.rotary_table.keep(kept)
        self.reserve(self.capacity)

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The logits (batch, vocab_size) after these tokens (batch,), which are now part of the text."""
        if self.length == self.capacity:
            self.reserve(min(2 * self.capacity, self.max_length))
        cos, sin = self.rotary_table.at(self.length - self.prompt_length)
        if self.kept is not None:
            token_ids = token_ids[self.kept]
        self.length += 1
        if self.mask is not None:
            self.mask = self.whole_mask.narrow(3, 0, self.length)
        # Inference mode makes tensors cheaper. The cache itself is made outside, because its owner may use it
        # elsewhere.
        with torch.inference_mode():
            logits = self.step(token_ids, cos, sin)
            if self.kept is None:
                return logits
            return logits.new_zeros(self.batch, logits.shape[1]).index_copy_(0, self.kept, logits)

    def step(self, token_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`decoding_step` for the kept sequences."""
        return decoding_step(self.weights, token_ids, cos, sin, self.filled, self.mask)

    def give_back(self) -> None:
        """
        Puts keys and values into transformers' cache, as its own loop would have done. Sequences are dropped only
        where nobody wants the cache; then it stays as it is.
        """
        if self.kept is not None:
            return
        for layer, keys_and_values in zip(self.cache.layers, self.filled, strict=True):
            layer.keys, layer.values = keys_and_values.chunk(2, dim=1)


def with_capacity(keys_and_values: torch.Tensor, capacity: int, heads_first: bool) -> torch.Tensor:
    """A copy of the cache of a layer, (batch, heads, length, head_dim), with space for `capacity` tokens."""
    batch, heads, length, head_dim = keys_and_values.shape
    if heads_first:  # in memory, as `attention_of_many` needs it
        whole = keys_and_values.new_empty(heads, batch, capacity, head_dim).transpose(0, 1)
    else:
        whole = keys_and_values.new_empty(batch, heads, capacity, head_dim)
    whole[:, :, :length] = keys_and_values
    return whole


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
    reads_prompt: bool = False,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """
    Greedy decoding and sampling: transformers' `GenerationMixin._sample`, with `decoding_step` for its forward.

    Args:
        reads_prompt: the compiled step of the model reads the prompt, too.
    """
    input_ids = input_ids.long()  # the native step reads 64 bits, and transformers' loop gives them back
    batch, length = input_ids.shape
    mask, position_ids, cache = (model_kwargs.get(k) for k in ("attention_mask", "position_ids", "past_key_values"))
    pad_token = generation_config._pad_token_tensor
    returns_dict = generation_config.return_dict_in_generate
    scores = () if returns_dict and generation_config.output_scores else None
    raw_logits = () if returns_dict and generation_config.output_logits else None
    # These two kinds of criteria need only the length and the last token. All others are called as transformers does.
    max_length = min(each.max_length for each in stopping_criteria if isinstance(each, MaxLengthCriteria))
    end_tokens = [each.eos_token_id for each in stopping_criteria if type(each) is EosTokenCriteria]
    others = StoppingCriteriaList(
        each for each in stopping_criteria if type(each) not in (EosTokenCriteria, MaxLengthCriteria)
    )
    has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    exact = getattr(generation_config, "fast_decoding", True) == "exact"
    # Finished sequences need no computing where nobody can see what would be computed.
    cache_is_seen = returns_dict or getattr(generation_config, "keeps_cache", True)
    may_drop = has_end and not exact and not cache_is_seen
    may_drop = may_drop and all(type(each).__module__.startswith("transformers.") for each in logits_processor)
    text = F.pad(input_ids, (0, max(1, min(FIRST_CAPACITY, max_length - length))))
    unfinished = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    processors, sampler = list(logits_processor), None
    if generation_config.do_sample and batch == 1 and scores is None and input_ids.device.type == "cpu":
        processors, sampler = FastSampler.taken_from(processors)

    decoder = None
    if reads_prompt:
        new = length - cache.get_seq_length()
        # The last token that is written is never read.
        decoder = model.compiled_step.decoder(model, cache, mask, position_ids, max_length - length - 1, input_ids)
        logits = decoder.read_prompt(input_ids[:, -new:], position_ids[:, -new:]).clone()
    else:  # a decoder is made when there is a second token to write
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        cache = outputs.past_key_values
        del outputs
    while True:
        so_far = text[:, :length]
        if batch > 1 and processors:
            so_far = so_far.contiguous()  # processors expect that
        next_scores = logits
        for process in processors:  # the list itself would inspect each signature for each token
            next_scores = process(so_far, next_scores)
        if scores is not None:
            scores += (next_scores,)
        if raw_logits is not None:
            raw_logits += (logits,)
        if sampler is not None:
            next_tokens = sampler(next_scores)
        elif generation_config.do_sample:
            probabilities = F.softmax(next_scores, dim=-1)
            next_tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
        else:
            next_tokens = torch.argmax(next_scores, dim=-1)
        if has_end:
            next_tokens = torch.where(unfinished, next_tokens, pad_token)
        if length == text.shape[1]:
            text = F.pad(text, (0, min(length, max_length - length)))
        text[:, length] = next_tokens
        length += 1
        if streamer is not None:
            streamer.put(next_tokens.cpu())
        for ends in end_tokens:
            unfinished &= torch.isin(next_tokens, ends, invert=True)
        if others:
            unfinished &= ~others(text[:, :length].contiguous(), scores).bool()
        if length >= max_length or not unfinished.any():
            break
        if may_drop and decoder is not None:
            decoder.drop_finished(unfinished)
        if decoder is None:
            # The token just written is still to be read, and the last one never is.
            max_new_tokens = max_length - length
            step = model.compiled_step
            if step is not None and not exact and step.suits(model):
                decoder = step.decoder(model, cache, mask, position_ids, max_new_tokens)
                may_drop = may_drop and isinstance(decoder, Decoder)
            else:
                decoder = Decoder(model, cache, mask, position_ids, max_new_tokens, exact)
        logits = decoder.logits(next_tokens).to(copy=True, dtype=torch.float32)

    if decoder is not None:
        decoder.give_back()
    if streamer is not None:
        streamer.end()
    text = text[:, :length].contiguous()
    if not returns_dict:
        return text
    return GenerateDecoderOnlyOutput(sequences=text, scores=scores, logits=raw_logits, past_key_values=cache)
