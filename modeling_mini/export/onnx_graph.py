"""
A Mini as an ONNX graph: prefill and decoding with a cache in one, for any batch and any length.

The graph is built operator by operator from the weights, in the order of modeling_mini.py; each function has its
counterpart there. Since opset 23, ONNX has the operators Attention, RotaryEmbedding and RMSNormalization, so the graph
is short and can be read in a viewer. A graph that is traced through torch.export has four times as many nodes, runs at
half the speed, and takes 20 seconds of a core in place of 0.1 (docs/LOG.md).

    input_ids, position_ids (batch, length)
    attention_mask (batch, past + length): 1 for tokens, 0 for padding
    past_key_values.N.key, .value (batch, key_value_heads, past, head_dim), where past may be 0
      -> logits (batch, length, vocab_size)
         present.N.key, .value (batch, key_value_heads, past + length, head_dim)

transformers.js and optimum expect these names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from configuration_mini import unknown_norm
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..modeling_mini import MiniForCausalLM, MiniRotaryEmbedding

OPSET = 23
IR_VERSION = 10  # of the file format: the oldest with this opset, so that as many runtimes as possible read it
# The norms that have an operator: its name, and the weights that it takes.
NORMS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.LayerNorm: ("LayerNormalization", ("weight", "bias")),
    nn.RMSNorm: ("RMSNormalization", ("weight",)),
}
BATCH, LENGTH, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class Builder:
    """Appends operators to a graph, and keeps its inputs and outputs."""

    def __init__(self) -> None:
        self.tape = ir.tape.Tape()
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._constants: dict[tuple[str, Any], ir.Value] = {}

    def __call__(self, op_type: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> Any:
        """Adds an operator; gives its output, or a tuple if it has several."""
        if outputs > 1:
            return tuple(self.tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs))
        return self.tape.op(op_type, inputs, attributes)

    def read(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        """An input of the graph; a dimension that may vary has a name."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def give(self, value: ir.Value, name: str, *shape: int | str) -> None:
        """Makes a value an output of the graph, in float32."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.outputs.append(value)

    def weight(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """A tensor of the model, in float32."""
        return self.tape.initializer(ir.tensor(tensor.detach().float().contiguous().numpy(), name=name), name)

    def integers(self, *values: int) -> ir.Value:
        """A constant (len(values),) in int64."""
        return self._constant("integers", values, np.array(values, dtype=np.int64))

    def scalar(self, value: int | float) -> ir.Value:
        """A constant () in float32 or int64, by the type of the number."""
        dtype = np.float32 if isinstance(value, float) else np.int64
        return self._constant(dtype.__name__, value, np.array(value, dtype=dtype))

    def _constant(self, kind: str, value: Any, array: np.ndarray) -> ir.Value:
        if (kind, value) not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[kind, value] = self.tape.initializer(ir.tensor(array, name=name), name)
        return self._constants[kind, value]

    def model(self, name: str) -> ir.Model:
        """The graph with all that was added to it."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": OPSET},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="mini")


def times_sigmoid(op: Builder, x: ir.Value, factor: float = 1.0) -> ir.Value:
    """x * sigmoid(factor * x): SiLU, and with 1.702 an approximation of GELU."""
    return op("Mul", x, op("Sigmoid", x if factor == 1 else op("Mul", x, op.scalar(factor))))


def squared_relu(op: Builder, x: ir.Value) -> ir.Value:
    """max(x, 0) squared."""
    positive = op("Relu", x)
    return op("Mul", positive, positive)


def operator(op_type: str, **attributes: Any) -> Callable[[Builder, ir.Value], ir.Value]:
    """An activation that ONNX has as an operator."""
    return lambda op, x: op(op_type, x, **attributes)


GELU, GELU_TANH = operator("Gelu"), operator("Gelu", approximate="tanh")
# By their names in transformers.
ACTIVATIONS: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {
    "gelu": GELU,
    "gelu_accurate": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_new": GELU_TANH,
    "gelu_python": GELU,
    "gelu_python_tanh": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "hardswish": operator("HardSwish"),
    "leaky_relu": operator("LeakyRelu", alpha=0.01),
    "linear": lambda op, x: x,
    "mish": operator("Mish"),
    "quick_gelu": lambda op, x: times_sigmoid(op, x, 1.702),
    "relu": operator("Relu"),
    "relu2": squared_relu,
    "relu6": lambda op, x: op("Clip", x, op.scalar(0.0), op.scalar(6.0)),
    "sigmoid": operator("Sigmoid"),
    "silu": times_sigmoid,
    "swish": times_sigmoid,
    "tanh": operator("Tanh"),
}


def check_exportable(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: if the graph would not compute the same as the model, with the reason.
    """
    if type(model) is not MiniForCausalLM:
        raise ValueError(
            f"The format onnx takes Mini, and this model is a {type(model).__name__}: make it a Mini first, by the "
            f"format mini."
        )
    for name, module in model.named_modules():
        if model.plain_modules.get(type(module)) is not type(module).forward or "forward" in module.__dict__:
            raise ValueError(
                f"The format onnx takes a plain Mini, and {name!r} is a {type(module).__name__} that it does not know, "
                f"or has another forward."
            )
    if model.config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"There is no ONNX for hidden_act {model.config.hidden_act!r}; there is for {', '.join(ACTIVATIONS)}."
        )


def build_graph(model: MiniForCausalLM, share_embedding: bool = True) -> ir.Model:
    """
    The graph of a model, always in float32.

    Args:
        share_embedding: whether a tied embedding and head are one matrix. For quantization the head must be a constant
            of its own.

    Raises:
        ValueError: see `check_exportable`.
    """
    check_exportable(model)
    config, op = model.config, Builder()
    input_ids = op.read("input_ids", ir.DataType.INT64, BATCH, LENGTH)
    attention_mask = op.read("attention_mask", ir.DataType.INT64, BATCH, TOTAL)
    position_ids = op.read("position_ids", ir.DataType.INT64, BATCH, LENGTH)

    embedding = op.weight("model.embed_tokens.weight", model.model.embed_tokens.weight)
    hidden_states = op("Gather", embedding, input_ids)
    rotary_table = rotary_embedding(op, model, position_ids)
    mask = causal_mask(op, input_ids, attention_mask)
    for i, layer in enumerate(model.model.layers):
        name = f"model.layers.{i}"
        normed = norm(op, f"{name}.input_layernorm", layer.input_layernorm, hidden_states)
        hidden_states = op(
            "Add", hidden_states, attention(op, f"{name}.self_attn", layer.self_attn, normed, rotary_table, mask)
        )
        normed = norm(op, f"{name}.post_attention_layernorm", layer.post_attention_layernorm, hidden_states)
        hidden_states = op("Add", hidden_states, mlp(op, f"{name}.mlp", layer.mlp, normed, config.hidden_act))
    normed = norm(op, "model.norm", model.model.norm, hidden_states)
    if share_embedding and model.lm_head.weight is model.model.embed_tokens.weight:
        logits = op("MatMul", normed, op("Transpose", embedding, perm=[1, 0]))  # runtimes fold it when loading
    else:
        logits = linear(op, "lm_head", model.lm_head, normed)
    # The logits are the first output, as in other graphs.
    op.give(logits, "logits", BATCH, LENGTH, config.vocab_size)
    op.outputs.insert(0, op.outputs.pop())
    return op.model("mini")


def linear(op: Builder, name: str, module: nn.Linear, x: ir.Value) -> ir.Value:
    """(..., in_features) to (..., out_features)."""
    product = op("MatMul", x, op.weight(f"{name}.weight", module.weight.T))
    return product if module.bias is None else op("Add", product, op.weight(f"{name}.bias", module.bias))


def norm(op: Builder, name: str, module: nn.Module, x: ir.Value) -> ir.Value:
    """Raises ValueError for a norm that is not in `NORMS`."""
    if type(module) not in NORMS:
        raise unknown_norm("The format onnx", type(module).__name__)
    op_type, weights = NORMS[type(module)]
    weights = [op.weight(f"{name}.{weight}", getattr(module, weight)) for weight in weights]
    return op(op_type, x, *weights, axis=-1, epsilon=module.eps)


class RotaryTable(NamedTuple):
    """Cosine and sine, each (batch, length, rotary_dim / 2)."""

    cos: ir.Value
    sin: ir.Value
    rotary_dim: int


def rotary_embedding(op: Builder, model: MiniForCausalLM, position_ids: ir.Value) -> RotaryTable:
    """Cosine and sine at `position_ids` (batch, length), for the RoPE type of the model."""
    # A new module, because the model's own may have changed its frequencies for a long text.
    rotary = MiniRotaryEmbedding(model.config)
    rope, rotary_dim = model.config.rope_parameters, 2 * len(rotary.original_inv_freq)
    frequencies = short = op.weight("inv_freq", rotary.original_inv_freq)
    if rotary.rope_type in ("longrope", "dynamic"):
        length = op("Add", op("ReduceMax", position_ids, keepdims=0), op.scalar(1))
        if rotary.rope_type == "longrope":
            limit = rope["original_max_position_embeddings"]
            inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](model.config, seq_len=limit + 1)
            long = op.weight("long_inv_freq", inv_freq)
            frequencies = op("Where", op("Greater", length, op.scalar(limit)), long, short)
        else:
            # Beyond the context, the base theta is multiplied by (factor * length / context - (factor - 1)) to the
            # power of dim / (dim - 2). Frequencies are powers of the base, so each is multiplied by a power of this
            # growth.
            context, factor = model.config.max_position_embeddings, float(rope["factor"])
            length = op("Cast", op("Max", length, op.scalar(context)), to=ir.DataType.FLOAT)
            growth = op("Sub", op("Mul", length, op.scalar(factor / context)), op.scalar(factor - 1))
            powers = -torch.arange(0, rotary_dim, 2) / (rotary_dim - 2)
            frequencies = op("Mul", short, op("Pow", growth, op.weight("growth_powers", powers)))
    positions = op("Unsqueeze", op("Cast", position_ids, to=ir.DataType.FLOAT), op.integers(2))
    angles = op("Mul", positions, frequencies)
    cos, sin = op("Cos", angles), op("Sin", angles)
    if rotary.attention_scaling != 1:
        factor = op.scalar(float(rotary.attention_scaling))
        cos, sin = op("Mul", cos, factor), op("Mul", sin, factor)
    return RotaryTable(cos, sin, rotary_dim)


def causal_mask(op: Builder, input_ids: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """
    The mask that is added to the scores, (batch, 1, length, past + length): 0 where a query may see a key, otherwise
    the smallest number. Minus infinity would turn a row that is all padding into NaN.
    """
    total = op("Squeeze", op("Shape", attention_mask, start=1, end=2))
    length = op("Squeeze", op("Shape", input_ids, start=1, end=2))
    keys = op("Range", op.scalar(0), total, op.scalar(1))
    queries = op("Unsqueeze", op("Range", op("Sub", total, length), total, op.scalar(1)), op.integers(1))
    is_token = op("Unsqueeze", op("Cast", attention_mask, to=ir.DataType.BOOL), op.integers(1, 2))
    may_look = op("And", op("LessOrEqual", keys, queries), is_token)
    return op("Where", may_look, op.scalar(0.0), op.scalar(float(np.finfo(np.float32).min)))


def attention(
    op: Builder, name: str, module: nn.Module, x: ir.Value, rotary_table: RotaryTable, mask: ir.Value
) -> ir.Value:
    """
    `MiniAttention`, (batch, length, hidden_size) to the same; its cache becomes an input and an output of the graph.

    Args:
        mask: as `causal_mask` makes it.
    """
    config = module.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    states = {}
    for each, number in heads.items():
        states[each] = linear(op, f"{name}.{each}_proj", getattr(module, f"{each}_proj"), x)
        if each == "v":
            continue
        if config.qk_norm:
            per_head = op("Reshape", states[each], op.integers(0, 0, number, config.head_dim))
            normed = norm(op, f"{name}.{each}_norm", getattr(module, f"{each}_norm"), per_head)
            states[each] = op("Reshape", normed, op.integers(0, 0, number * config.head_dim))
        part = {"rotary_embedding_dim": rotary_table.rotary_dim} if rotary_table.rotary_dim < config.head_dim else {}
        states[each] = op("RotaryEmbedding", states[each], rotary_table.cos, rotary_table.sin, num_heads=number, **part)
    cache_shape = (BATCH, config.num_key_value_heads, PAST, config.head_dim)
    past = [
        op.read(f"past_key_values.{module.layer_idx}.{kind}", ir.DataType.FLOAT, *cache_shape)
        for kind in ("key", "value")
    ]
    output, *present = op(
        "Attention",
        *states.values(),
        mask,
        *past,
        q_num_heads=heads["q"],
        kv_num_heads=heads["k"],
        scale=module.scaling,
        outputs=3,
    )
    for kind, value in zip(("key", "value"), present, strict=True):
        op.give(value, f"present.{module.layer_idx}.{kind}", BATCH, config.num_key_value_heads, TOTAL, config.head_dim)
    return linear(op, f"{name}.o_proj", module.o_proj, output)


def mlp(op: Builder, name: str, module: nn.Module, x: ir.Value, hidden_act: str) -> ir.Value:
    """`MiniMLP`, (batch, length, hidden_size) to the same."""
    gate = linear(op, f"{name}.gate_proj", module.gate_proj, x)
    up = linear(op, f"{name}.up_proj", module.up_proj, x)
    return linear(op, f"{name}.down_proj", module.down_proj, op("Mul", ACTIVATIONS[hidden_act](op, gate), up))
