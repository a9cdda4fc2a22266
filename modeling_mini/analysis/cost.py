"""What a Llama-shaped model costs by formulas: parameters, FLOPs and memory. peak_memory.py measures the memory."""

import bisect
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from configuration_mini import unknown_norm
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOAT32_BYTES = 4

# Every parameter of a Llama-shaped model, by its part. A norm of queries and keys counts as a norm.
PARTS = {
    "embedding": re.compile(r"model\.embed_tokens\.weight"),
    "attention": re.compile(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.(weight|bias)"),
    "mlp": re.compile(r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.(weight|bias)"),
    "norms": re.compile(
        r"model\.(norm|layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm))\.(weight|bias)"
    ),
    "head": re.compile(r"lm_head\.weight"),
}


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes while a model generates."""

    weights: int
    kv_cache: int
    working: int  # the largest set of intermediate results while a prompt of the full length is read

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.working


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes while a model trains with AdamW."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # what the backward pass needs
    working: int  # the largest set of gradients that exist for a moment

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


class ModelCost:
    """
    The cost of a configuration. No weights are made or loaded.

    It works for every model whose parts have Llama's names and shapes: Mini, Llama, Qwen3, Mistral, ... A sliding
    window is counted as full attention.

    Args:
        config: the configuration of a causal language model.

    Attributes:
        parameters: how many there are in each of `PARTS`; a tied head counts as part of the embedding.
        matrix_parameters: how many are in the matrices that every token is multiplied with, a tied head among them.
        largest_matrix: how many are in the largest of these.
        query_size, key_value_size: numbers for each token and layer, all heads together.

    Raises:
        ValueError: if the model is not Llama-shaped, naming a parameter that Llama does not have.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(f"{type(config).__name__} is not the configuration of a causal language model.") from None
        self.config = config
        try:
            self._read_sizes(model)
        except AttributeError as error:  # names of Llama in another kind of block
            raise ValueError(f"The shape of {type(model).__name__} is not Llama's: {error}.") from None

    def _read_sizes(self, model: PreTrainedModel) -> None:
        """Reads the sizes off a model on the meta device."""
        self.parameters = parameters_by_part(model)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        # A tied head is one of them; an embedding is only read from.
        self.matrix_parameters = sum(module.weight.numel() for module in linear)
        self.largest_matrix = max(module.weight.numel() for module in linear)
        block, final_norm = model.model.layers[0], model.model.norm
        self._saved_by_norm, self._statistics_of_norm = saved_by(final_norm)
        self._has_qk_norm = any(True for _ in getattr(block.self_attn, "q_norm", nn.Identity()).parameters())
        self.layers = self.config.num_hidden_layers
        self.heads = self.config.num_attention_heads
        self.query_size = block.self_attn.q_proj.out_features
        self.key_value_size = block.self_attn.k_proj.out_features
        self.hidden_size = self.config.hidden_size
        self.intermediate_size = block.mlp.gate_proj.out_features
        self.vocab_size = model.lm_head.out_features

    @property
    def num_parameters(self) -> int:
        """All parameters. A tied head counts once, as the embedding."""
        return sum(self.parameters.values())

    def attention_flops_per_token(self, length: int) -> int:
        """The part of `forward_flops_per_token` that grows with the length: queries by keys, and weights by values."""
        return 4 * self.layers * self.query_size * length

    def forward_flops_per_token(self, length: int) -> int:
        """
        Floating-point operations for one token in a context of `length` tokens: 2 M + 4 L H Q T.

        M is the number of parameters in the matrices that a token is multiplied with; each gives a multiplication and
        an addition. The head is one of them, and the embedding is not, because it is only read from. There are L layers
        and H heads of size Q, and T is `length`. The formula is that of Kaplan et al. 2020
        (https://arxiv.org/abs/2001.08361, table 1), with two matrix products of H Q T per layer as in Chowdhery et al.
        2022 (https://arxiv.org/abs/2204.02311, appendix B). Attention counts in full, as MFU counts it by convention; a
        causal kernel may skip up to half of it. Norms, the activation function, the softmax and the rotary embedding
        are left out.
        """
        return 2 * self.matrix_parameters + self.attention_flops_per_token(length)

    def training_flops_per_token(self, length: int) -> int:
        """
        Three times the forward pass: for each matrix product the backward pass has two, for the gradient of the weights
        and for that of the inputs (6 N + 12 L H Q T, Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix
        B). What gradient checkpointing computes again is left out, as in MFU.
        """
        return 3 * self.forward_flops_per_token(length)

    def inference_memory(self, batch_size: int, length: int, dtype: str = "float32") -> InferenceMemory:
        """
        Bytes to generate for `batch_size` sequences of `length` tokens, with the weights in `dtype`.

        The cache holds a key and a value for every layer and token: 2 L (key/value heads) (head size) T numbers for
        each sequence. The working set is the larger of two. In the MLP these tensors exist at once: the embeddings, the
        residual stream before and after attention, the output of attention, a norm, and three tensors of SwiGLU. In
        attention: the embeddings, the residual stream, a norm, keys, values, the queries, and three copies of the
        queries that the rotary embedding makes. Attention is assumed to be a fused kernel.

        The result is within 10 % of the peak measured on a CPU for Mini, Llama and Qwen3. It does not count the memory
        of the process and of the device's libraries (about 0.5 GB on a GPU), nor the gaps in an allocator's memory.

        Raises:
            ValueError: if a size is below 1 or `dtype` is not one of `DTYPES`.
        """
        check_sizes(batch_size, length, dtype)
        size = DTYPES[dtype].itemsize
        in_mlp = 5 * self.hidden_size + 3 * self.intermediate_size
        in_attention = 3 * self.hidden_size + 4 * self.query_size + 2 * self.key_value_size
        return InferenceMemory(
            weights=self.num_parameters * size,
            kv_cache=2 * self.layers * self.key_value_size * batch_size * length * size,
            working=max(in_mlp, in_attention) * batch_size * length * size,
        )

    def training_memory(
        self, batch_size: int, length: int, dtype: str = "float32", gradient_checkpointing: bool = False
    ) -> TrainingMemory:
        """
        Bytes to train on `batch_size` sequences of `length` tokens at once, with AdamW.

        Weights, gradients and the two moments of AdamW are float32 for both values of `dtype`. `"bfloat16"` is
        autocast, which adds a copy of the matrices and keeps norms and residual stream in float32. The total is the
        peak when gradients are accumulated over several batches. With one batch for each step, gradients grow while
        activations are freed, and the peak is lower by up to the smaller of the two.

        Activations are what the model's code saves for the backward pass, counted as in Korthikanti et al. 2022
        (https://arxiv.org/abs/2205.05198, section 4). For each token and layer these are the inputs of two norms
        (RMSNorm also saves its result, except where a GPU fuses it), the inputs of the matrices after the norms, the
        queries, keys, values and output of attention, and four tensors of SwiGLU. The final norm and the
        log-probabilities in float32 are saved once. Attention is fused, and there is no dropout. With gradient
        checkpointing, they are the input of every layer, and the activations of either one layer or the head (Chen et
        al. 2016, https://arxiv.org/abs/1604.06174).

        The working set is the largest of three: the gradients of logits and log-probabilities; the gradients within a
        layer and one new gradient of the largest matrix; and, at the end, the two gradients of a tied matrix and their
        sum. What is not counted is the same as for `inference_memory`.

        The result is within 6 % of the peak measured on a CPU for Mini, Llama and Qwen3, and within 10 % with gradient
        checkpointing.

        Raises:
            ValueError: if a size is below 1 or `dtype` is not one of `DTYPES`.
        """
        check_sizes(batch_size, length, dtype)
        tokens, size = batch_size * length, DTYPES[dtype].itemsize
        autocast = dtype != "float32"
        hidden, query, key_value = self.hidden_size, self.query_size, self.key_value_size
        norm = (self._saved_by_norm * hidden + self._statistics_of_norm) * FLOAT32_BYTES
        # Autocast converts the result of a norm once for each matrix that reads it.
        matrix_inputs = hidden * (3 + 2) * size if autocast else hidden * 2 * size
        attention = (2 * query + 2 * key_value) * size + self.heads * FLOAT32_BYTES
        if self._has_qk_norm:
            attention += self._saved_by_norm * (query + key_value) * FLOAT32_BYTES
        layer = 2 * norm + matrix_inputs + attention + 4 * self.intermediate_size * size
        head = norm + hidden * size + self.vocab_size * FLOAT32_BYTES
        # From here on in bytes: (activations, working set), at the loss and in a layer.
        at_loss = head * tokens, 2 * self.vocab_size * FLOAT32_BYTES * tokens
        working_in_layer = 2 * hidden * FLOAT32_BYTES + 2 * self.intermediate_size * size
        in_layer = layer * tokens, working_in_layer * tokens + self.largest_matrix * FLOAT32_BYTES
        copies = self.matrix_parameters * size if autocast else 0
        if gradient_checkpointing:
            # At the end of the forward pass there are copies of all matrices. In the backward pass there are those of
            # the head and of one layer, and the head is finished before a layer is computed again.
            head_parameters = self.vocab_size * hidden
            all_copies = copies
            if autocast:
                copies = (head_parameters + (self.matrix_parameters - head_parameters) // self.layers) * size
            at_end_of_forward = at_loss[0], at_loss[1] // 2 + all_copies - copies
            activations, working = max(at_end_of_forward, at_loss, in_layer, key=sum)
            activations += self.layers * hidden * FLOAT32_BYTES * tokens
        else:
            activations = self.layers * in_layer[0] + at_loss[0]
            working = max(in_layer[1], at_loss[1])
        if self.config.tie_word_embeddings:
            # At the end of the backward pass, activations and copies have been freed.
            working = max(working, 3 * self.parameters["embedding"] * FLOAT32_BYTES - activations - copies)
        float32_weights = self.num_parameters * FLOAT32_BYTES
        return TrainingMemory(
            weights=float32_weights + copies,
            gradients=float32_weights,
            optimizer=2 * float32_weights,
            activations=activations,
            working=working,
        )

    def largest_inference_batch(self, device_memory: int, length: int, dtype: str = "float32") -> int:
        """How many sequences of `length` tokens can be generated at once in `device_memory` bytes; 0 if none."""
        return largest_batch(device_memory, lambda batch: self.inference_memory(batch, length, dtype).total)

    def largest_training_batch(
        self, device_memory: int, length: int, dtype: str = "float32", gradient_checkpointing: bool = False
    ) -> int:
        """How many sequences of `length` tokens can be trained on at once in `device_memory` bytes; 0 if none."""
        return largest_batch(
            device_memory, lambda batch: self.training_memory(batch, length, dtype, gradient_checkpointing).total
        )


def largest_batch(device_memory: int, memory_of_batch: Callable[[int], int]) -> int:
    """The largest batch whose memory, in bytes, fits into `device_memory`; 0 if none does."""
    # A binary search: memory grows with the batch, and a sequence needs more than one byte, so the range is large
    # enough.
    return bisect.bisect_right(range(1, device_memory + 1), device_memory, key=memory_of_batch)


def parameters_by_part(model: PreTrainedModel) -> dict[str, int]:
    """
    The number of parameters in each of `PARTS`. A tied head counts as part of the embedding.

    Raises:
        ValueError: if a parameter belongs to no part.
    """
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in PARTS.items() if pattern.fullmatch(name)), None)
        if part is None:
            raise ValueError(f"{type(model).__name__} is not Llama-shaped: Llama has no parameter {name}.")
        counts[part] += parameter.numel()
    return counts


def saved_by(norm: nn.Module) -> tuple[int, int]:
    """
    What the backward pass of a norm needs: how many tensors of its size, and how many numbers for each token.

    Raises:
        ValueError: if it is neither a LayerNorm nor an RMSNorm (of any library).
    """
    if isinstance(norm, nn.LayerNorm):
        return 1, 2  # its input; mean and standard deviation
    if type(norm).__name__.endswith("RMSNorm"):
        return 2, 1  # its input and its result before the weight; the root of the mean square
    raise unknown_norm("The estimate of memory", type(norm).__name__)


def check_sizes(batch_size: int, length: int, dtype: str) -> None:
    """Raises ValueError if a size is below 1 or `dtype` is not one of `DTYPES`."""
    for name, value in (("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
