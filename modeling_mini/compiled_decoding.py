"""
A decoding step as one native function: what `model.compile_decoding()` makes, and `generate` then uses.

Without a compiler (decoding.py), a step of a small model is about a hundred calls of torch, each a few microseconds
long. Here the same step is written again for one sequence, exported, and compiled by inductor into one function. It
contains no matrix product that torch would give to a library. The product of a matrix and a vector is written as
multiply and sum, which inductor turns into a loop and fuses with the operations around it. For one sequence, a library
would not be faster.

The function is made once for each shape of model and each machine, in about half a minute. It is kept in a file that
later processes load in a second. It contains no weights: those of the model are arguments of each step. So nothing is
copied, and training, loading or merging between two steps have their effect. (A package of inductor can also hold
pointers to its constants. From Python, these would point to memory that has been freed.) The number of tokens in the
cache is a variable, so the function is not compiled again when a text grows.

Several sequences have a function of their own, for any number of them, padded or not (`compile_decoding(many=True)`).
With several rows, a product is faster in a library. So that function calls the library for products, on weights that
are packed once for each call of `generate`, and fuses all that is between them.

It adds the same numbers as the modules, in another order. So logits differ by rounding, by about 1e-7 of their size.
Therefore it is used in float32 only: in bfloat16 the difference would sometimes choose another token.
"""

import hashlib
import json
import os
import platform
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from configuration_mini import MiniConfig
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .decoding import FIRST_CAPACITY, Decoder, RotaryTable
from .quantized_decoding import IntegerLinear, with_integers

# The compiled step depends on the shapes of the weights, on these attributes of modules, and on all fields of the
# config but those that have no effect on it.
MODULE_FIELDS = ("eps", "scaling")
FIELDS_WITHOUT_EFFECT = {
    "embedding_dropout", "attention_dropout", "residual_dropout", "initializer_range", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "rope_parameters", "max_position_embeddings",
}  # fmt: skip
CONFIG_FIELDS = tuple(name for name in MiniConfig.own_fields() if name not in FIELDS_WITHOUT_EFFECT)
# The sizes with which the steps are traced. The compiled ones take any length and capacity, and any number of sequences
# from 2 on.
EXAMPLE_LENGTH, EXAMPLE_CAPACITY, EXAMPLE_BATCH = 20, 32, 5
DIMENSIONS = {"batch": 2, "length": 1, "capacity": 1}  # the variable ones, and their least values


class StepOfModel(nn.Module):
    """Computes what `decoding_step` computes, for one token of one sequence, with operations that become loops."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token_id: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, caches: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            token_id: (1,).
            cos, sin: (rotary_dim,), at the position of the token. The first half of `sin` is negated.
            caches: for each layer, the keys and then the values of the earlier tokens, (length, 2 * key_value_heads,
                head_dim).

        Returns:
            The logits (1, vocab_size) after the token, and its own keys and values (layers, 2 * key_value_heads,
            head_dim). The caller puts these into the caches.
        """
        config, body = self.model.config, self.model.model
        kv_heads, rotary_dim = config.num_key_value_heads, cos.shape[-1]
        hidden_states = body.embed_tokens.weight[token_id[0]]
        new = []
        for layer, cache in zip(body.layers[: config.num_hidden_layers], caches, strict=True):
            attention, states = layer.self_attn, layer.input_layernorm(hidden_states)
            query = attention.q_norm(product(attention.q_proj, states).view(-1, config.head_dim))
            key = attention.k_norm(product(attention.k_proj, states).view(-1, config.head_dim))
            value = product(attention.v_proj, states).view(-1, config.head_dim)
            query, key = rotated(query, cos, sin, rotary_dim), rotated(key, cos, sin, rotary_dim)
            new.append(torch.cat((key, value)))

            # The token itself is not in the cache yet, so it is a second term of each sum.
            query = query.view(kv_heads, -1, config.head_dim) * attention.scaling
            keys, values = cache.unsqueeze(2).split(kv_heads, dim=1)
            scores, own_score = (keys * query).sum(-1), (key.unsqueeze(1) * query).sum(-1)
            highest = torch.maximum(scores.amax(0), own_score)
            weights, own_weight = (scores - highest).exp(), (own_score - highest).exp()
            output = (weights.unsqueeze(-1) * values).sum(0) + own_weight.unsqueeze(-1) * value.unsqueeze(1)
            output = output / (weights.sum(0) + own_weight).unsqueeze(-1)

            hidden_states = hidden_states + product(attention.o_proj, output.flatten())
            states = layer.post_attention_layernorm(hidden_states)
            gated = layer.mlp.act_fn(product(layer.mlp.gate_proj, states)) * product(layer.mlp.up_proj, states)
            hidden_states = hidden_states + product(layer.mlp.down_proj, gated)
        return product(self.model.lm_head, body.norm(hidden_states)).unsqueeze(0), torch.stack(new)


def product(projection: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """A linear layer on one vector (in,), as multiply and sum."""
    output = (projection.weight * states).sum(-1)
    if isinstance(projection, IntegerLinear):
        output = output * projection.scales
    return output if projection.bias is None else output + projection.bias


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """The rotary embedding of queries or keys (..., heads, head_dim)."""
    pairs, rest = states[..., :rotary_dim], states[..., rotary_dim:]
    other = torch.cat((pairs[..., rotary_dim // 2 :], pairs[..., : rotary_dim // 2]), dim=-1)
    return torch.cat((pairs * cos + other * sin, rest), dim=-1)


class StepWithWeights(nn.Module):
    """The step with the weights as an argument, and with no parameters of its own. This module is compiled."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        step = StepOfModel(model)
        # Inside a function, because the parameters of a submodule would be parameters of this module.
        self.step_with = lambda weights, arguments: torch.func.functional_call(step, weights, arguments)

    def forward(
        self,
        token_id: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        caches: list[torch.Tensor],
        weights: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `StepOfModel`, with the weights as `weights_of` names them."""
        return self.step_with(weights, (token_id, cos, sin, caches))


class StepOfBatch(nn.Module):
    """Computes what `decoding_step` computes, for two or more sequences, with products that go to a library."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        caches: list[torch.Tensor],
        packed: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            token_ids: (batch,).
            cos, sin: (batch, rotary_dim), at the positions of the tokens. The first half of `sin` is negated.
            mask: (batch, length), what is added to the scores of the earlier tokens: 0, or -inf for padding.
            caches: for each layer, the keys and then the values of the earlier tokens, (2 * key_value_heads, batch,
                capacity, head_dim), of which the first `length` are read.
            packed: as `packed_weights` makes them.

        Returns:
            The logits (batch, vocab_size) after the tokens, and their own keys and values (layers, 2 *
            key_value_heads, batch, head_dim). The caller puts these into the caches.
        """
        config, body = self.model.config, self.model.model
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        (batch,), length, rotary_dim = token_ids.shape, mask.shape[1], cos.shape[-1]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

        def linear(states: torch.Tensor, name: str) -> torch.Tensor:
            bias = packed.get(f"{name}.bias")
            return states @ packed[name] if bias is None else torch.addmm(bias, states, packed[name])

        hidden_states = body.embed_tokens.weight[token_ids]
        new = []
        for number, (layer, cache) in enumerate(zip(body.layers[: config.num_hidden_layers], caches, strict=True)):
            torch._check(length <= cache.shape[2])
            attention = layer.self_attn
            states = linear(layer.input_layernorm(hidden_states), f"{number}.query_key_value")
            states = states.view(batch, heads + 2 * kv_heads, head_dim)
            query, key, value = states.split((heads, kv_heads, kv_heads), dim=1)
            query = rotated(attention.q_norm(query), cos, sin, rotary_dim) * attention.scaling
            key = rotated(attention.k_norm(key), cos, sin, rotary_dim)
            # (key_value_heads, batch, heads of a group, head_dim), and below with one head: heads come first, as in
            # the cache.
            query = query.view(batch, kv_heads, -1, head_dim).transpose(0, 1)
            key, value = key.transpose(0, 1), value.transpose(0, 1)
            new.append(torch.cat((key, value)))

            # The token itself is not in the cache yet, so it is a second term of each sum.
            keys, values = (part.flatten(0, 1)[:, :length] for part in cache.split(kv_heads))
            scores = torch.bmm(query.reshape(kv_heads * batch, -1, head_dim), keys.transpose(1, 2))
            scores = scores.view(kv_heads, batch, -1, length) + mask.unsqueeze(1)
            own_score = (query * key.unsqueeze(2)).sum(-1, keepdim=True)
            highest = torch.maximum(scores.amax(-1, keepdim=True), own_score)
            weights, own_weight = (scores - highest).exp(), (own_score - highest).exp()
            output = torch.bmm(weights.view(kv_heads * batch, -1, length), values).view(query.shape)
            output = output + own_weight * value.unsqueeze(2)
            output = output / (weights.sum(-1, keepdim=True) + own_weight)

            hidden_states = hidden_states + linear(output.transpose(0, 1).reshape(batch, -1), f"{number}.o_proj")
            states = layer.post_attention_layernorm(hidden_states)
            gate, up = linear(states, f"{number}.gate_up").chunk(2, dim=-1)
            hidden_states = hidden_states + linear(layer.mlp.act_fn(gate) * up, f"{number}.down_proj")
        return linear(body.norm(hidden_states), "head"), torch.stack(new)


class StepOfBatchWithWeights(nn.Module):
    """As `StepWithWeights`, for `StepOfBatch`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        step = StepOfBatch(model)
        self.step_with = lambda weights, arguments: torch.func.functional_call(step, weights, arguments)

    def forward(
        self,
        token_ids: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        caches: list[torch.Tensor],
        packed: dict[str, torch.Tensor],
        weights: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `StepOfBatch`, with the other weights as `weights_between_products` names them."""
        return self.step_with(weights, (token_ids, cos, sin, mask, caches, packed))


def packed_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Copies of the matrices and biases of `StepOfBatch`. Projections of the same input are one, (in, out), in the order
    in which a product with few rows reads them fastest.
    """
    packed: dict[str, torch.Tensor] = {}

    def pack(name: str, *projections: nn.Linear) -> None:
        packed[name] = torch.cat([each.weight for each in projections]).detach().t().contiguous()
        if projections[0].bias is not None:
            packed[f"{name}.bias"] = torch.cat([each.bias for each in projections]).detach()

    for number, layer in enumerate(model.model.layers[: model.config.num_hidden_layers]):
        attention, mlp = layer.self_attn, layer.mlp
        pack(f"{number}.query_key_value", attention.q_proj, attention.k_proj, attention.v_proj)
        pack(f"{number}.o_proj", attention.o_proj)
        pack(f"{number}.gate_up", mlp.gate_proj, mlp.up_proj)
        pack(f"{number}.down_proj", mlp.down_proj)
    pack("head", model.lm_head)
    return packed


def weights_between_products(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What `StepOfBatch` reads of the parameters themselves, by their names in it: embedding and norms."""
    return {name: weight for name, weight in weights_of(model).items() if "_proj" not in name and "lm_head" not in name}


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters of a model, by their names in `StepOfModel`. Tied ones appear once."""
    return dict(model.named_parameters(prefix="model"))


def constants_of(model: PreTrainedModel) -> list[Any]:
    """The numbers and names of a model that are fixed when its step is compiled or recorded."""
    settings = [getattr(model.config, name) for name in CONFIG_FIELDS]
    modules = list(model.modules())
    kinds = [type(module).__qualname__ for module in modules]  # somebody may have replaced an activation
    return settings + kinds + [vars(module).get(name) for name in MODULE_FIELDS for module in modules]


class CompiledStep:
    """
    The native function for models of this shape. It is loaded from the file of an earlier call, or compiled now.

    Raises:
        ValueError: if the model is not in float32 on a CPU.
        RuntimeError: if there is no compiler, or it fails.
        OSError: if the file cannot be written.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        weight = model.model.embed_tokens.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(f"It is compiled for float32 on a CPU; this model is {kind} on a {weight.device.type}.")
        self.shape = self.shape_of(model)
        model = with_integers(model)
        self.run = load_or_write(package_path(model), lambda path: write_package(model, path))

    def shape_of(self, model: PreTrainedModel) -> list[Any]:
        """Everything about a model that the compiled function depends on."""
        model = with_integers(model)
        layouts = [(name, t.shape, t.stride(), t.dtype, t.device) for name, t in weights_of(model).items()]
        return [*constants_of(model), *layouts]

    def suits(self, model: PreTrainedModel, batch: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether it computes what the model does: one sequence without padding, and the shape that was compiled."""
        if batch != 1 or (attention_mask is not None and not attention_mask.all()):
            return False
        return self.shape_of(model) == self.shape

    def decoder(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        max_new_tokens: int,
    ) -> "CompiledDecoder":
        """The state of one call of `generate`. The arguments are those of `Decoder`; the mask is all ones or `None`."""
        return CompiledDecoder(
            self.run,
            list(weights_of(with_integers(model)).values()),
            cache,
            RotaryTable(model, position_ids),
            max_new_tokens,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledStep":
        """A copy of a model shares the function, because weights are its arguments."""
        return self

    def __reduce__(self) -> tuple[type, tuple]:
        """A model that is pickled and loaded again has no compiled step."""
        return type(None), ()


class CompiledStepForMany(CompiledStep):
    """Two native functions for models of this shape: one for one sequence, and one for any number of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        path = package_path(model, for_many=True)
        self.run_many = load_or_write(path, lambda path: write_package_for_many(model, path))

    def suits(self, model: PreTrainedModel, batch: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether it computes what the model does: any sequences but a padded one alone, and the compiled shape."""
        return self.shape_of(model) == self.shape if batch > 1 else super().suits(model, batch, attention_mask)

    def decoder(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        max_new_tokens: int,
    ) -> "CompiledDecoder | CompiledBatchDecoder":
        """The state of one call of `generate`. The arguments are those of `Decoder`."""
        arguments = (model, cache, attention_mask, position_ids, max_new_tokens)
        if len(cache.layers[0].keys) == 1:
            return super().decoder(*arguments)
        return CompiledBatchDecoder(self.run_many, *arguments)


class CompiledBatchDecoder(Decoder):
    """
    `Decoder` with a compiled step for several sequences.

    Args:
        run: the compiled step. The other arguments are those of `Decoder`.
    """

    fewest = 2

    def __init__(self, run: Callable[[list[torch.Tensor]], list[torch.Tensor]], *arguments: Any) -> None:
        self.run = run
        super().__init__(*arguments)

    def takes_form_for_many(self, keys_and_values: torch.Tensor) -> bool:
        """Always: there is no other form of this step."""
        return True

    def read_weights(self, model: PreTrainedModel) -> None:
        """Packs the weights of the products, and takes the others as they are."""
        self.weights = [*packed_weights(model).values(), *weights_between_products(model).values()]

    def reserve(self, capacity: int) -> None:
        """Moves the cache into one tensor (layers, 2 * key_value_heads, batch, capacity, head_dim)."""
        batch, heads, length, head_dim = self.filled[0].shape
        self.caches = self.filled[0].new_empty(len(self.filled), heads, batch, capacity, head_dim)
        self.whole = [cache.transpose(0, 1) for cache in self.caches]
        for whole, filled in zip(self.whole, self.filled, strict=True):
            whole[:, :, :length] = filled
        # What is added to scores; padding stands in the prompt alone.
        self.added = self.caches.new_zeros(batch, capacity)
        if self.mask is not None:
            self.added[:, : self.length].masked_fill_(~self.mask[:, 0, 0], -float("inf"))
            self.whole_mask = F.pad(self.mask, (0, capacity - self.length), value=True)
        self.rotary_table.reserve(capacity - self.prompt_length)
        self.capacity = capacity

    def step(self, token_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The compiled step, and its keys and values put into the cache."""
        earlier, batch = self.length - 1, len(token_ids)
        cos, sin = (table[:, 0].expand(batch, -1).contiguous() for table in (cos, sin))
        mask = self.added[:, :earlier].contiguous()
        logits, keys_and_values = self.run([token_ids, cos, sin, mask, *self.caches.unbind(), *self.weights])
        self.caches.select(3, earlier).copy_(keys_and_values)
        return logits


class CompiledDecoder:
    """
    Like `Decoder`, for a compiled step of one sequence. All keys and values are in one tensor (layers, length, 2 *
    key_value_heads, head_dim), in the order in which the step reads them.

    Args:
        run: the compiled step.
        weights: the tensors that it takes after the caches.
    """

    def __init__(
        self,
        run: Callable[[list[torch.Tensor]], list[torch.Tensor]],
        weights: list[torch.Tensor],
        cache: DynamicCache,
        rotary_table: RotaryTable,
        max_new_tokens: int,
    ) -> None:
        self.run = run
        self.weights = weights
        self.cache = cache
        self.rotary_table = rotary_table
        self.length = self.prompt_length = cache.get_seq_length()
        self.max_length = self.length + max_new_tokens
        # (1, key_value_heads, length, head_dim) of each layer
        layers = [torch.cat((layer.keys, layer.values), dim=1)[0].transpose(0, 1) for layer in cache.layers]
        self.whole = torch.stack(layers)
        self.reserve(self.length + min(max_new_tokens, FIRST_CAPACITY))

    def reserve(self, capacity: int) -> None:
        """Moves the cache into tensors of `capacity` tokens."""
        self.whole = F.pad(self.whole[:, : self.length], (0, 0, 0, 0, 0, capacity - self.length))
        self.rotary_table.reserve(capacity - self.prompt_length)
        self.capacity = capacity

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The logits (1, vocab_size) after this token (1,), which is now part of the text."""
        if self.length == self.capacity:
            self.reserve(min(2 * self.capacity, self.max_length))
        with torch.inference_mode():  # see Decoder.logits
            cos, sin = self.rotary_table.at(self.length - self.prompt_length)
            caches = self.whole.narrow(1, 0, self.length).unbind()
            logits, keys_and_values = self.run([token_ids, cos[0, 0], sin[0, 0], *caches, *self.weights])
            self.whole.select(1, self.length).copy_(keys_and_values)
        self.length += 1
        return logits

    def give_back(self) -> None:
        """Puts keys and values into transformers' cache, as its own loop would have done."""
        for layer, keys_and_values in zip(self.cache.layers, self.whole[:, : self.length], strict=True):
            layer.keys, layer.values = keys_and_values.transpose(0, 1)[None].chunk(2, dim=1)


def package_path(model: PreTrainedModel, for_many: bool = False) -> Path:
    """The file for a step of models of this shape. Its name is a hash of everything that the step depends on."""
    weights = {name: (list(tensor.shape), tensor.stride()) for name, tensor in model.named_parameters()}
    parts = {
        "for_many": for_many,
        "constants": constants_of(model),
        "rotary_dim": 2 * len(model.model.rotary_emb.inv_freq),
        "weights": weights,
        "source": Path(__file__).read_text(encoding="utf-8"),
        "versions": [torch.__version__, transformers.__version__, platform.machine(), platform.processor()],
        "instructions": dict(torch.cpu.get_capabilities()),  # it is compiled for this kind of processor
        "threads": torch.get_num_threads(),
    }
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = os.environ.get("MINI_CACHE") or Path.home() / ".cache" / "mini"
    return Path(folder, "decoding", f"{name}.pt2")


def load_or_write(path: Path, write: Callable[[Path], None]) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """
    The function in a file, which is written first if it is not there or damaged.

    Raises:
        RuntimeError: if what was written cannot be loaded; and what `write` raises.
    """
    run = load_package(path)
    if run is None:
        write(path)
        run = load_package(path)
    if run is None:
        raise RuntimeError(f"What was compiled to {path} cannot be loaded.")
    return run


def load_package(path: Path) -> Callable[[list[torch.Tensor]], list[torch.Tensor]] | None:
    """The function in a file that `write_package` wrote; `None` if there is no file or it is damaged."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as package:
            if package.testzip() is not None:  # torch would not notice, and run it
                return None
        # Calling the package itself would parse the description of its arguments at each call.
        return torch._inductor.aoti_load_package(str(path)).loader.run
    except (zipfile.BadZipFile, RuntimeError):
        return None


def write_package(model: PreTrainedModel, path: Path) -> None:
    """
    Exports and compiles the step of one sequence.

    Raises:
        RuntimeError: if there is no compiler, or it fails.
        OSError: if the file cannot be written.
    """
    config = model.config
    shape = (EXAMPLE_LENGTH, 2 * config.num_key_value_heads, config.head_dim)
    # Two different tensors: export would take one tensor in two places for a single input.
    cos, sin = (torch.rand(2 * len(model.model.rotary_emb.inv_freq)) for _ in range(2))
    caches = [torch.rand(shape) for _ in range(config.num_hidden_layers)]
    length, weights = torch.export.Dim("length", min=1), weights_of(model)
    compile_to(
        path,
        StepWithWeights(model),
        (torch.zeros(1, dtype=torch.long), cos, sin, caches, weights),
        (None, None, None, [{0: length}] * len(caches), dict.fromkeys(weights)),
    )


def write_package_for_many(model: PreTrainedModel, path: Path) -> None:
    """As `write_package`, for the step of several sequences."""
    config = model.config
    rotary_dim = 2 * len(model.model.rotary_emb.inv_freq)
    cos, sin = (torch.rand(EXAMPLE_BATCH, rotary_dim) for _ in range(2))
    shape = (2 * config.num_key_value_heads, EXAMPLE_BATCH, EXAMPLE_CAPACITY, config.head_dim)
    caches = [torch.rand(shape) for _ in range(config.num_hidden_layers)]
    mask, packed, weights = (
        torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH),
        packed_weights(model),
        weights_between_products(model),
    )
    batch, length, capacity = (torch.export.Dim(name, min=least) for name, least in DIMENSIONS.items())
    compile_to(
        path,
        StepOfBatchWithWeights(model),
        (torch.zeros(EXAMPLE_BATCH, dtype=torch.long), cos, sin, mask, caches, packed, weights),
        (
            *({0: batch}, {0: batch}, {0: batch}, {0: batch, 1: length}, [{1: batch, 2: capacity}] * len(caches)),
            *(dict.fromkeys(packed), dict.fromkeys(weights)),
        ),
    )


def compile_to(path: Path, step: nn.Module, example: tuple, dynamic_shapes: tuple) -> None:
    """Exports a step with an example of its arguments, and compiles it to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        exported = torch.export.export(step, example, dynamic_shapes=dynamic_shapes)
        written = torch._inductor.aoti_compile_and_package(exported, package_path=os.path.join(folder, path.name))
        os.replace(written, path)
