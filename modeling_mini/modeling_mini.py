"""
The Mini language model: a decoder-only transformer in one file. The classes are in the order of the forward pass.

    input_ids (batch, length)
      -> embedding -> [ norm -> attention -> + -> norm -> SwiGLU -> + ] x num_hidden_layers -> norm -> head
      -> logits (batch, length, vocab_size)

Names are Llama's, so that adapters, parallelism plans, exporters and people find every part where they expect it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from configuration_mini import MiniConfig, unknown_norm
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .fast_generation import FastGenerationMixin, forwards_of
from .integrations import CheckpointMixin

# The norms that `norm_type` can name. Other code that computes or estimates a Mini has a list of the norms that it
# knows and refuses all others: decoding.py (generate then takes transformers' loop), export/ and analysis/cost.py.
NORM_CLASSES: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def make_norm(config: MiniConfig, size: int) -> nn.Module:
    """The norm that `config.norm_type` names, over a last dimension of `size`; ValueError for an unknown name."""
    if config.norm_type not in NORM_CLASSES:
        raise unknown_norm("The model", config.norm_type)
    return NORM_CLASSES[config.norm_type](size, eps=config.norm_eps)


class MiniRotaryEmbedding(nn.Module):
    """
    Cosines and sines of the rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    The feature pair i of a head is rotated by `position * rope_theta ** (-2i / head_dim)` radians. So the product of a
    query and a key depends only on their distance. The other RoPE types of transformers rescale these frequencies.
    """

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        # `dynamic_rope_update` and `PreTrainedModel._init_weights` look for these attribute names.
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute_frequencies = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute_frequencies(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MiniConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """The frequencies `(rotary_dim / 2,)` in radians per position, and the factor on cosine and sine (1)."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn: Callable, recurse: bool = True) -> "MiniRotaryEmbedding":
        """`model.to(torch.bfloat16)` leaves the frequencies in float32: rounded, they would be off by whole turns."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `position_ids` (batch, length) to cosine and sine, each (batch, length, rotary_dim). They are computed in
        float32, because in bfloat16 neighbouring positions beyond 256 are the same number.
        """
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def apply_rotary_embedding(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotates the feature pairs (i, i + rotary_dim / 2) of queries or keys.

    Args:
        states: (batch, heads, length, head_dim).
        cos, sin: (batch, length, rotary_dim). If rotary_dim is less than head_dim, the other features do not change.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotary_dim = cos.shape[-1]
    rotated, rest = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention in plain operations. It is the reference for the faster kernels, and the only one that returns weights.

    Args:
        query: (batch, heads, query_length, head_dim).
        key, value: (batch, key_value_heads, key_length, head_dim).
        attention_mask: added to the scores, broadcast over heads. With `None`, every query sees every key.

    Returns:
        The output (batch, query_length, heads, head_dim) and the weights (batch, heads, query_length, key_length).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (batch, heads, query_length, key_length)
    if attention_mask is not None:
        scores = scores + attention_mask
    # At least float32, because the softmax adds many terms. And at least the type of the scores: the smallest float64,
    # which a mask uses, would become -inf in float32, and a row that is all padding would become NaN.
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=softmax_dtype).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MiniAttention(nn.Module):
    """
    Causal self-attention. The number of key/value heads decides whether it is MHA, GQA or MQA (Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245). With `qk_norm`, the queries and keys of each head are normalised (Dehghani et al.
    2023, https://arxiv.org/abs/2302.05442).
    """

    def __init__(self, config: MiniConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.o_proj.init_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
        self.q_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]  # (batch, length)
        head_shape = (*input_shape, -1, self.head_dim)
        # (batch, length, heads * head_dim) to (batch, heads, length, head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        query = apply_rotary_embedding(query, *position_embeddings)
        key = apply_rotary_embedding(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class MiniMLP(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): the gate decides how much of `up_proj` passes."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.init_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MiniDecoderLayer(GradientCheckpointingLayer):
    """
    One pre-norm block. Attention and MLP each read a normalised copy of the residual stream, and add to the stream.
    `hidden_states` are (batch, length, hidden_size).
    """

    def __init__(self, config: MiniConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = MiniAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.mlp = MiniMLP(config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.residual_dropout(attention_output)
        mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.residual_dropout(mlp_output)


class MiniPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """The base of every Mini model: initial weights, and what transformers may do with it. Saving: integrations.py."""

    config: MiniConfig
    config_class = MiniConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MiniDecoderLayer, "attentions": MiniAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        Matrices are normal with standard deviation `initializer_range`, biases are 0, and norms are 1. Some modules
        have an attribute `init_scale`, by which the standard deviation is multiplied:

        - The two projections that write to the residual stream have 1 / sqrt(2 * layers), as in GPT-2. The stream is a
          sum of 2 * layers such outputs, so it starts at the same size for any number of layers.
        - Embedding and head have sqrt(64 / hidden_size). The logits of a normalised state then have standard deviation
          sqrt(64) * initializer_range = 0.16 at any width, which keeps the first loss within 2 % of ln(vocab_size), on
          random tokens and on text. With sqrt(256 / hidden_size) a narrow tied model first predicts the token that it
          has just read, and starts at 102.4 %.
        """
        # The scale is on the linear layer itself, because transformers does not pass MiniAttention or MiniMLP to this
        # method.
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range * getattr(module, "init_scale", 1.0))
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class MiniModel(MiniPreTrainedModel):
    """Embedding, blocks and final norm: `input_ids` (batch, length) to hidden states (batch, length, hidden_size)."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config)
        # No padding_idx: the row of the pad token is trained as part of the tied head, and padding is masked anyway.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.init_scale = math.sqrt(64 / config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([MiniDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config, config.hidden_size)
        self.rotary_emb = MiniRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (batch, length); or `inputs_embeds` (batch, length, hidden_size), exactly one of them.
            attention_mask: (batch, past + length), 1 for tokens and 0 for padding; or a prepared 4D mask.
            position_ids: (batch, length). By default they count on from the length of the cache. Where positions start
                again at 0 within a sequence, a new document begins, and documents do not see each other. That needs a
                call with neither `attention_mask` nor `past_key_values`.
            past_key_values: the cache that this call reads and extends.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # The mask is made before the cache and the default positions. transformers looks for packed documents only
        # where there is no cache; and when it compiles, it makes a mask for packed documents whenever it gets
        # positions.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)

        hidden_states = self.embedding_dropout(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        # A slice, because drafting with an early exit (`assistant_early_exit`) lowers `num_hidden_layers` meanwhile.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MiniForCausalLM(FastGenerationMixin, MiniPreTrainedModel, GenerationMixin):
    """The language model: `MiniModel` and a head that gives a logit for each token of the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config)
        self.model = MiniModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.init_scale = math.sqrt(64 / config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (batch, length), the same tokens as `input_ids`. They are shifted here. Labels of -100 are ignored,
                and so is the label after a position that `attention_mask` leaves out. If `shift_labels` is given too,
                those targets are used without a shift.
            logits_to_keep: the number of last positions whose logits are computed; 0 computes all.

        Returns:
            `loss`: mean cross-entropy in nats per token, or the sum divided by `num_items_in_batch` if that is given;
            `logits`: (batch, kept length, vocab_size).
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            if "shift_labels" not in kwargs and attention_mask is not None and attention_mask.shape == labels.shape:
                labels = ignore_predictions_of_padding(labels, attention_mask, kwargs)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def ignore_predictions_of_padding(
    labels: torch.LongTensor, attention_mask: torch.Tensor, loss_arguments: dict[str, Any]
) -> torch.LongTensor:
    """
    Labels (batch, length) with -100 in place of those that are predicted from padding: where a collator pads on the
    left, the first token of each shorter text has such a label. `num_items_in_batch` in `loss_arguments` counts them
    too, so it is lowered by their share.
    """
    kept = labels.masked_fill(nn.functional.pad(attention_mask[:, :-1] == 0, (1, 0)), -100)
    if (number := loss_arguments.get("num_items_in_batch")) is not None:
        counts = [(targets[:, 1:] != -100).sum().clamp(min=1) for targets in (kept, labels)]
        loss_arguments["num_items_in_batch"] = number * counts[0] / counts[1]
    return kept


# The classes whose computation decoding.py repeats in one function.
MiniForCausalLM.plain_modules = forwards_of(
    MiniForCausalLM, MiniModel, MiniDecoderLayer, MiniAttention, MiniMLP, MiniRotaryEmbedding
)


class MiniForSequenceClassification(GenericForSequenceClassification, MiniPreTrainedModel):
    """
    `MiniModel` and a linear layer over the last token that is not padding: logits (batch, `config.num_labels`).

    `labels` (batch,) are class indices, or numbers where `num_labels` is 1; see `config.problem_type`.
    """


class MiniForTokenClassification(GenericForTokenClassification, MiniPreTrainedModel):
    """
    `MiniModel` and a linear layer over every token: logits (batch, length, `config.num_labels`).

    A token sees only the tokens before it. `labels` (batch, length) are class indices; -100 is ignored.
    """


class MiniForQuestionAnswering(GenericForQuestionAnswering, MiniPreTrainedModel):
    """
    `MiniModel` and a linear layer that scores every token as the start and as the end of the answer: start and end
    logits, each (batch, length). The question must come first, because a token sees only the tokens before it.
    """


# The three heads above make their `MiniModel` through AutoModel. It is registered here and not in the package's
# `__init__`, because the copy of this file in a checkpoint folder is not in a package.
AutoModel.register(MiniConfig, MiniModel, exist_ok=True)

__all__ = [
    "MiniForCausalLM",
    "MiniForQuestionAnswering",
    "MiniForSequenceClassification",
    "MiniForTokenClassification",
    "MiniModel",
    "MiniPreTrainedModel",
]
