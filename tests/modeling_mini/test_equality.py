"""
The same text gives the same logits on every path: with a cache and without, padded, packed, chunked, compiled and
exported, and as a reference written without the model's own code. Mostly in float64, where only a mistake is visible.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from configuration_mini import MiniConfig
from modeling_mini import MiniForCausalLM, MiniModel
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LENGTH = 12
# Three documents in one row.
DOCUMENTS = (3, 1, 8)
PACKED_POSITIONS = torch.cat([torch.arange(length) for length in DOCUMENTS])

# What a model can be made of. Every path is tested with every one of these.
SHAPES: dict[str, dict[str, Any]] = {
    "mha-layernorm": {"num_key_value_heads": 4},
    "gqa-rmsnorm": {"num_key_value_heads": 2, "norm_type": "rmsnorm"},
    "mqa-layernorm-untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "gqa-layernorm-qknorm-biases": {
        "num_key_value_heads": 2,
        "qk_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mqa-rmsnorm-qknorm-partial": {
        "num_key_value_heads": 1,
        "norm_type": "rmsnorm",
        "qk_norm": True,
        "head_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
}


def make_config(**fields: Any) -> MiniConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return MiniConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 64, **fields})


def make_model(attention: str = "sdpa", dtype: torch.dtype = torch.float64, **fields: Any) -> MiniForCausalLM:
    """A model far from its initial state: large random matrices, norms that are not 1, biases that are not 0."""
    model = MiniForCausalLM(make_config(**fields)).to(dtype).eval()
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(dtype)
        with torch.no_grad():
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(8, 264, shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=SHAPES)
def fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SHAPES[request.param]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# The reference: the formulas of the papers on plain tensors, one head and one position pair at a time.


def reference_norm(
    states: torch.Tensor, weights: dict[str, torch.Tensor], name: str, config: MiniConfig
) -> torch.Tensor:
    if config.norm_type == "layernorm":
        states = states - states.mean(-1, keepdim=True)
    scaled = states / (states.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    scaled = scaled * weights[f"{name}.weight"]
    return scaled + weights[f"{name}.bias"] if config.norm_type == "layernorm" else scaled


def reference_rotation(vector: torch.Tensor, position: int, rotary_dim: int, theta: float) -> torch.Tensor:
    turned = vector.clone()
    half = rotary_dim // 2
    for i in range(half):
        # In float32, as the model does: the angles, not the turning.
        angle = torch.tensor(float(position)) * torch.tensor(theta) ** -torch.tensor(2.0 * i / rotary_dim)
        cos, sin = angle.cos().double(), angle.sin().double()
        turned[i] = vector[i] * cos - vector[i + half] * sin
        turned[i + half] = vector[i + half] * cos + vector[i] * sin
    return turned


def reference_logits(model: MiniForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """`(length,)` to `(length, vocab_size)`, with nothing of the model but its weights."""
    config, weights = model.config, {name: value.detach() for name, value in model.state_dict().items()}
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    theta = config.rope_parameters["rope_theta"]

    def linear(states: torch.Tensor, name: str) -> torch.Tensor:
        has_bias = config.mlp_bias if "mlp" in name else config.attention_bias
        assert (f"{name}.bias" in weights) is has_bias
        return states @ weights[f"{name}.weight"].T + (weights[f"{name}.bias"] if has_bias else 0.0)

    def heads_of(states: torch.Tensor, norm: str) -> torch.Tensor:
        states = states.view(len(ids), -1, config.head_dim)
        if config.qk_norm:
            states = reference_norm(states, weights, norm, config)
        rows = [[reference_rotation(head, t, rotary_dim, theta) for head in row] for t, row in enumerate(states)]
        return torch.stack([torch.stack(row) for row in rows])

    stream = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed = reference_norm(stream, weights, f"{layer}.input_layernorm", config)
        q = heads_of(linear(normed, f"{layer}.self_attn.q_proj"), f"{layer}.self_attn.q_norm")
        k = heads_of(linear(normed, f"{layer}.self_attn.k_proj"), f"{layer}.self_attn.k_norm")
        v = linear(normed, f"{layer}.self_attn.v_proj").view(len(ids), -1, config.head_dim)
        attended = torch.empty_like(q)
        for t in range(len(ids)):
            for h in range(heads):
                scores = k[: t + 1, h // groups] @ q[t, h] / math.sqrt(config.head_dim)
                attended[t, h] = (scores.exp() / scores.exp().sum()) @ v[: t + 1, h // groups]
        stream = stream + linear(attended.flatten(1), f"{layer}.self_attn.o_proj")
        normed = reference_norm(stream, weights, f"{layer}.post_attention_layernorm", config)
        gate = linear(normed, f"{layer}.mlp.gate_proj")
        gated = gate / (1 + (-gate).exp()) * linear(normed, f"{layer}.mlp.up_proj")
        stream = stream + linear(gated, f"{layer}.mlp.down_proj")
    return reference_norm(stream, weights, "model.norm", config) @ weights["lm_head.weight"].T


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_model_equals_the_formulas(fields: dict[str, Any], attention: str) -> None:
    model = make_model(attention, **fields)
    ids = random_ids(LENGTH)
    close(model(ids[None]).logits[0], reference_logits(model, ids), 1e-9)


@pytest.mark.slow
def test_flex_attention_runs_and_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    flex = ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return flex(*arguments, **keywords)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", counted)
    ids = random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    results = {}
    # Flex has no float64 kernel on the CPU.
    model = make_model("eager", torch.float32)
    for attention in ("eager", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            padded = model(ids, attention_mask=mask).logits[mask.bool()]
            results[attention] = (padded, model(ids, position_ids=PACKED_POSITIONS[None]).logits)
    assert len(calls) == 2 * model.config.num_hidden_layers
    for actual, expected in zip(results["flex_attention"], results["eager"], strict=True):
        close(actual, expected, 1e-4)


def test_steps_equal_one_forward(fields: dict[str, Any]) -> None:
    model, ids = make_model(**fields), random_ids(2, LENGTH)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        outputs = model(ids[:, :5], use_cache=True)
        assert outputs.past_key_values.get_seq_length() == 5
        pieces = [outputs.logits]
        for t in range(5, LENGTH):
            outputs = model(ids[:, t : t + 1], past_key_values=outputs.past_key_values)
            pieces.append(outputs.logits)
    close(torch.cat(pieces, dim=1), full)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("chunks", [(5, 7), (1, 4, 1, 6), (12,)], ids=str)
def test_chunked_prefill_equals_one_forward(
    fields: dict[str, Any], attention: str, cache_class: type, chunks: tuple[int, ...]
) -> None:
    model, ids = make_model(attention, **fields), random_ids(2, LENGTH)
    # A static cache longer than the text has empty slots, which must not be seen.
    cache = StaticCache(model.config, max_cache_len=20) if cache_class is StaticCache else DynamicCache()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        pieces = [model(chunk, past_key_values=cache).logits for chunk in ids.split(chunks, dim=1)]
    close(torch.cat(pieces, dim=1), full)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_each_row_alone(fields: dict[str, Any], attention: str, side: str) -> None:
    model, ids = make_model(attention, **fields), random_ids(3, LENGTH)
    lengths = [LENGTH, 7, 1]
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(LENGTH - length, None) if side == "left" else slice(0, length)] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions).logits
        # Without positions the distances are the same, but the angles are rounded at other places.
        unpositioned = model(ids, attention_mask=mask).logits
        other_padding = model(ids.where(mask.bool(), 8), attention_mask=mask, position_ids=positions).logits
        assert torch.isfinite(padded).all()
        for row in range(3):
            tokens = mask[row].bool()
            alone = model(ids[row][tokens][None]).logits[0]
            close(padded[row][tokens], alone)
            close(unpositioned[row][tokens], alone, 1e-4)
            close(other_padding[row][tokens], alone)


def test_padded_batch_steps_equal_each_row_alone(fields: dict[str, Any]) -> None:
    model, ids = make_model(**fields), random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, pieces = DynamicCache(), []
    with torch.no_grad():
        for start, end in [(0, 6), *((t, t + 1) for t in range(6, LENGTH))]:
            outputs = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
            pieces.append(outputs.logits)
        logits = torch.cat(pieces, dim=1)
        close(logits[0], model(ids[:1]).logits[0])
        close(logits[1, 4:], model(ids[1:, 4:]).logits[0])


@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_equal_each_alone(fields: dict[str, Any], attention: str, use_cache: bool) -> None:
    model, ids = make_model(attention, **fields), random_ids(2, LENGTH)
    with torch.no_grad():
        # One row of positions for the whole batch, and one for each row.
        for positions in (PACKED_POSITIONS[None], PACKED_POSITIONS.expand(2, -1)):
            packed = model(ids, position_ids=positions, use_cache=use_cache).logits
            alone = torch.cat([model(document).logits for document in ids.split(DOCUMENTS, dim=1)], dim=1)
            close(packed, alone)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_gradient_crosses_documents_or_time(attention: str, use_cache: bool) -> None:
    model = make_model(attention)
    embeddings = model.get_input_embeddings()(random_ids(1, LENGTH)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, position_ids=PACKED_POSITIONS[None], use_cache=use_cache).logits
    # The sixth token of the row is the second of the last document, which begins at 4.
    logits[0, 5].sum().backward()
    seen = embeddings.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [False] * 4 + [True] * 2 + [False] * 6


def test_packed_documents_differ_from_plain_text() -> None:
    """So that the tests above cannot pass on a model that sees no context at all."""
    model, ids = make_model(), random_ids(1, LENGTH)
    with torch.no_grad():
        difference = model(ids).logits - model(ids, position_ids=PACKED_POSITIONS[None]).logits
    close(difference[:, :3], torch.zeros_like(difference[:, :3]))
    assert (difference[:, 3:].abs().amax(-1) > 1e-3).all()


def test_attention_depends_on_distance_alone() -> None:
    model, ids = make_model(), random_ids(1, LENGTH)
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        close(model(ids, position_ids=positions + 40).logits, model(ids).logits, 1e-4)
        doubled = model(ids, position_ids=positions * 2, attention_mask=torch.ones_like(ids)).logits
    assert (doubled - model(ids).logits).abs().max() > 1e-2


def test_prepared_mask_is_used_as_it_stands() -> None:
    model, ids = make_model("eager"), random_ids(1, LENGTH)
    allowed = torch.ones(LENGTH, LENGTH).tril().bool()
    allowed[7:, :7] = False
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    with torch.no_grad():
        close(model(ids, attention_mask=mask).logits[:, 7:], model(ids[:, 7:]).logits, 1e-4)


def test_inputs_embeds_equal_input_ids(fields: dict[str, Any]) -> None:
    model, ids = make_model(**fields), random_ids(2, LENGTH)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        close(model(inputs_embeds=embeddings).logits, model(ids).logits, 0)


@pytest.mark.parametrize("arguments", [{}, {"input_ids": random_ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 64)}])
def test_exactly_one_kind_of_input(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^Give exactly one of input_ids and inputs_embeds\.$"):
        make_model(dtype=torch.float32)(**arguments)


def test_logits_to_keep() -> None:
    model, ids = make_model(), random_ids(2, LENGTH)
    with torch.no_grad():
        full = model(ids).logits
        close(model(ids, logits_to_keep=1).logits, full[:, -1:])
        close(model(ids, logits_to_keep=3).logits, full[:, -3:])
        close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])


def test_loss_is_the_mean_cross_entropy_of_the_next_token() -> None:
    model, ids = make_model(), random_ids(2, LENGTH)
    labels = ids.clone()
    labels[0, :6] = -100
    outputs = model(ids, labels=labels)
    log_probabilities = outputs.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    # The loss is computed in float32, whatever the model is in.
    close(outputs.loss.double(), -log_probabilities[counted].mean(), 1e-5)
    summed = model(ids, labels=labels, num_items_in_batch=5).loss
    close(summed.double(), -log_probabilities[counted].sum() / 5, 1e-5)
    shifted = model(ids, labels=labels, shift_labels=nn.functional.pad(labels[:, 1:], (0, 1), value=-100)).loss
    close(shifted, outputs.loss, 1e-6)


def test_nothing_is_predicted_from_padding() -> None:
    model, ids = make_model(), random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    expected = labels.clone()
    expected[1, 4] = -100  # the first token behind the padding
    outputs = model(ids, attention_mask=mask, labels=labels)
    close(outputs.loss, model.loss_function(outputs.logits, expected, model.config.vocab_size))
    # What a trainer counts by the labels, it counts with that token.
    number = (labels[:, 1:] != -100).sum()
    close(model(ids, attention_mask=mask, labels=labels, num_items_in_batch=number).loss, outputs.loss, 1e-6)
    summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=int(number)).loss
    close(summed, outputs.loss, 1e-6)
    nothing = torch.full_like(ids, -100)
    assert model(ids, attention_mask=mask, labels=nothing, num_items_in_batch=3).loss == 0
    # Padding on the right changes nothing.
    right = mask.flip(1)
    labels = ids.masked_fill(right == 0, -100)
    outputs = model(ids, attention_mask=right, labels=labels)
    close(outputs.loss, model.loss_function(outputs.logits, labels, model.config.vocab_size))


def test_hidden_states_and_attentions() -> None:
    model, ids = make_model("eager"), random_ids(2, LENGTH)
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True, output_attentions=True)
        base = model.model(ids)
    assert len(outputs.hidden_states) == 3 + 1
    close(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    close(outputs.hidden_states[-1], base.last_hidden_state)
    assert len(outputs.attentions) == 3
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, LENGTH, LENGTH)
        close(weights.sum(-1), torch.ones(2, 4, LENGTH, dtype=torch.float64))
        assert (weights.triu(1) == 0).all()
        assert (weights.tril() > 0).sum() == 2 * 4 * LENGTH * (LENGTH + 1) // 2


def test_tuple_output() -> None:
    model, ids = make_model(), random_ids(1, 4)
    with torch.no_grad():
        outputs = model(ids)
        close(model(ids, return_dict=False)[0], outputs.logits, 0)
        close(model.model(ids, return_dict=False)[0], model.model(ids).last_hidden_state, 0)


# Saving and loading.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_is_exact(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(dtype=dtype, tie_word_embeddings=tied, qk_norm=True, attention_bias=True, mlp_bias=True)
    model.save_pretrained(tmp_path)
    loaded, report = MiniForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # Nothing is initialised anew over what was loaded, and nothing is left out.
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], value), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_base_model_and_head_load_from_each_other(tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "causal")
    base = MiniModel.from_pretrained(tmp_path / "causal").eval()
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    # Tied, so the head comes back with the embedding.
    again = MiniForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_missing_weights_alone_are_initialised(tmp_path: Path) -> None:
    model = make_model(dtype=torch.float32, attention_bias=True)
    matrix, bias = "model.layers.1.self_attn.o_proj.weight", "model.layers.2.self_attn.q_proj.bias"
    state = {name: value for name, value in model.state_dict().items() if name not in (matrix, bias, "lm_head.weight")}
    model.save_pretrained(tmp_path, state_dict=dict(state))  # which is emptied
    loaded, report = MiniForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {matrix, bias}
    assert loaded.get_parameter(matrix).std().item() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.1)
    assert (loaded.get_parameter(bias) == 0).all()
    # And not what stands beside them in the same layer.
    assert len(state) > 40
    for name, value in state.items():
        assert torch.equal(loaded.state_dict()[name], value), name


# Training.


def gradients(model: MiniForCausalLM, ids: torch.Tensor, **arguments: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **arguments).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_equal(fields: dict[str, Any], reentrant: bool) -> None:
    # Dropout is on: the recomputation has to draw the same masks.
    model, ids = make_model(**fields, attention_dropout=0.2, residual_dropout=0.2).train(), random_ids(2, LENGTH)
    torch.manual_seed(3)
    plain = gradients(model, ids)
    assert all(value.abs().sum() > 0 for value in plain.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    checkpointed = gradients(model, ids)
    hook.remove()
    assert len(calls) == 2, "the first block was not computed again in the backward pass"
    for name, value in plain.items():
        close(checkpointed[name], value)


def test_gradients_equal_finite_differences() -> None:
    model, ids = make_model("eager", num_hidden_layers=1, qk_norm=True), random_ids(1, 5)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: model(inputs_embeds=x, use_cache=False).logits, embeddings, fast_mode=True
    )


@pytest.mark.parametrize("name", ["embedding_dropout", "attention_dropout", "residual_dropout"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_dropout_acts_in_training_alone(name: str, attention: str) -> None:
    plain, ids = make_model(attention), random_ids(2, LENGTH)
    model = make_model(attention, **{name: 0.5})
    with torch.no_grad():
        expected = plain(ids).logits
        close(model(ids).logits, expected, 0)
        close(plain.train()(ids).logits, expected, 0)
        model.train()
        first, second = model(ids).logits, model(ids).logits
        assert not torch.equal(first, second)
        assert (first - expected).abs().max() > 1e-3
        close(model.eval()(ids).logits, expected, 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropouts_act_where_their_names_say(attention: str) -> None:
    """A dropout of nearly 1 silences its place altogether, and the rest of the model shows which place that was."""
    ids, silent = random_ids(1, LENGTH), 0.999999
    with torch.no_grad():
        # No branch writes to the stream: what is left is the embedding.
        model = make_model(attention, residual_dropout=silent).train()
        close(model.model(ids).last_hidden_state, model.model.norm(model.get_input_embeddings()(ids)), 1e-9)
        # No attention weight is left: no token sees another.
        model = make_model(attention, attention_dropout=silent).train()
        swapped = ids.clone()
        swapped[0, 0] = 263 if ids[0, 0] != 263 else 262
        close(model(swapped).logits[:, 1:], model(ids).logits[:, 1:], 0)
        assert not torch.equal(model(swapped).logits[:, 0], model(ids).logits[:, 0])
        # Nothing of the embedding is left: all texts are the same.
        model = make_model(attention, embedding_dropout=silent).train()
        close(model(ids).logits, model(random_ids(1, LENGTH).flip(1)).logits, 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_stays_near(fields: dict[str, Any], attention: str) -> None:
    exact, ids = make_model(attention, **fields), random_ids(2, LENGTH)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    with torch.no_grad():
        expected, actual = exact(ids).logits, model(ids).logits
    assert actual.dtype == torch.bfloat16
    # One rounding to 8 bits is 0.2 %. Through three blocks with matrices that enlarge it, 2.0 to 2.6 % were measured.
    assert (actual.double() - expected).std() < 0.04 * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_positions_stay_apart_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """bfloat16 has no 257, and frequencies rounded to it are off by whole turns after a thousand positions."""
    cast = make_model(dtype=dtype, max_position_embeddings=2048).model
    cast.save_pretrained(tmp_path)
    loaded = MiniModel.from_pretrained(tmp_path, dtype=dtype)
    positions = torch.arange(2048)[None]
    angles = torch.arange(2048)[:, None] * 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    for model in (cast, loaded, copy.deepcopy(loaded).to(torch.float32).to(dtype)):
        cos, sin = model.rotary_emb(torch.zeros(1, 1, dtype=dtype), position_ids=positions)
        assert cos.dtype == sin.dtype == dtype
        # Half a step of bfloat16 at 1 is 2^-9; float32 angles of up to 2048 add 2^-13 or less.
        assert (cos[0, :, :8].float() - angles.cos()).abs().max() < 2**-8
        assert (sin[0, :, :8].float() - angles.sin()).abs().max() < 2**-8


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_padding_gives_no_nan(attention: str) -> None:
    model, ids = make_model(attention, torch.bfloat16), random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.train()
    loss = model(ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# The initial state.


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("preset", ["tiny", "small", "medium"])
def test_first_loss_is_that_of_a_uniform_guess(preset: str, norm_type: str, tied: bool) -> None:
    model = MiniForCausalLM(MiniConfig.preset(preset, norm_type=norm_type, tie_word_embeddings=tied)).eval()
    ids = random_ids(4, 128)
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(264), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("preset", ["large", "gpt2"])
def test_first_loss_of_the_large_presets(preset: str, norm_type: str) -> None:
    model = MiniForCausalLM(MiniConfig.preset(preset, norm_type=norm_type)).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 64))
    with torch.no_grad():
        assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(model.config.vocab_size), rel=0.02)


@pytest.mark.parametrize("made_by", ["constructor", "from_config", "post_init of a subclass"])
@pytest.mark.parametrize("norm_type", ["layernorm", "rmsnorm"])
def test_initial_weights_have_the_stated_sizes(norm_type: str, made_by: str) -> None:
    config = make_config(
        hidden_size=256,
        num_hidden_layers=8,
        norm_type=norm_type,
        initializer_range=0.05,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        qk_norm=True,
    )
    if made_by == "constructor":
        model = MiniForCausalLM(config)
    elif made_by == "from_config":
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = type("Swapped", (MiniForCausalLM,), {})(config)
    residual = 1 / math.sqrt(2 * 8)
    width = math.sqrt(64 / 256)
    scales = {"o_proj": residual, "down_proj": residual, "embed_tokens": width, "lm_head": width}
    matrices = 0
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in module:
            assert (parameter == 1).all(), name
        else:
            matrices += 1
            expected = 0.05 * scales.get(module, 1.0)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * expected, name
    assert matrices == 7 * 8 + 2
    frequencies = model.model.rotary_emb
    assert torch.equal(frequencies.inv_freq, frequencies.original_inv_freq)
    assert frequencies.inv_freq[0] == 1


def test_the_residual_stream_starts_at_the_same_size_at_any_depth() -> None:
    growth = []
    for layers in (2, 16):
        # 12 times the usual range, so that the branches weigh more than the embedding.
        model = MiniModel(make_config(num_hidden_layers=layers, initializer_range=0.24)).eval()
        model.norm.register_forward_pre_hook(lambda _, arguments: growth.append(arguments[0].std().item()))
        with torch.no_grad():
            model(random_ids(4, 64))
    assert growth[1] == pytest.approx(growth[0], rel=0.2)


def test_a_seed_gives_the_same_model() -> None:
    torch.manual_seed(5)
    first = MiniForCausalLM(make_config()).state_dict()
    torch.manual_seed(5)
    second = MiniForCausalLM(make_config()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# Changing a model.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [300, 200])
def test_resize_token_embeddings(tied: bool, size: int, tmp_path: Path) -> None:
    model, ids = make_model(dtype=torch.float32, tie_word_embeddings=tied), random_ids(1, LENGTH).clamp(max=199)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.vocab_size == size
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (size, 64)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    kept = min(size, 264)
    with torch.no_grad():
        close(model(ids).logits[..., :kept], before[..., :kept], 1e-5)
    assert math.isfinite(model(ids, labels=ids).loss.item())
    model.save_pretrained(tmp_path)
    loaded = MiniForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_ties_hold_through_training_steps() -> None:
    model = make_model(dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = random_ids(2, LENGTH)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert sum(1 for name, _ in model.named_parameters() if "lm_head" in name or "embed_tokens" in name) == 1


# Compiling and exporting.


# The default backend costs 10 s for one layer; what breaks a graph shows with the cheap one, which traces as it does.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "backend", "shape", "layers"),
    [
        ("sdpa", "inductor", "gqa-layernorm-qknorm-biases", 1),
        ("sdpa", "aot_eager", "mqa-rmsnorm-qknorm-partial", 2),
        ("eager", "aot_eager", "gqa-rmsnorm", 2),
    ],
)
def test_compiled_model_equals_eager_without_a_graph_break(
    attention: str, backend: str, shape: str, layers: int
) -> None:
    torch.compiler.reset()
    model = make_model(attention, torch.float32, **{**SHAPES[shape], "num_hidden_layers": layers}).train()
    ids = random_ids(2, LENGTH)
    expected = gradients(model, ids, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    close(loss.detach(), model(ids, labels=ids).loss.detach(), 1e-5)
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], 1e-4)


@pytest.mark.slow
def test_compiled_decoding_step_equals_eager() -> None:
    """One compiled graph serves every step: the position is data, not a constant of the graph."""
    torch.compiler.reset()
    model, ids = make_model(dtype=torch.float32), random_ids(2, LENGTH)
    with torch.no_grad():
        full = model(ids).logits
    cache = StaticCache(model.config, max_cache_len=16)
    graphs = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        pieces = [model(ids[:, :4], past_key_values=cache).logits]
        for t in range(4, LENGTH):
            positions = torch.full((1, 1), t)
            pieces.append(step(ids[:, t : t + 1], position_ids=positions, past_key_values=cache).logits)
    close(torch.cat(pieces, dim=1), full, 1e-4)
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_compiled_packed_documents_stay_apart() -> None:
    torch.compiler.reset()
    model, ids = make_model(dtype=torch.float32), random_ids(1, LENGTH)
    positions = PACKED_POSITIONS[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(compiled(ids, position_ids=positions, use_cache=False).logits, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", ["default", "yarn"])
def test_export_with_dynamic_batch_and_length(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0}
    if rope_type == "yarn":
        rope |= {"factor": 2.0, "original_max_position_embeddings": 32}
    model = make_model(dtype=torch.float32, rope_parameters=rope)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model,
        (),
        {"input_ids": random_ids(2, 5), "use_cache": False},
        dynamic_shapes={"input_ids": {0: batch, 1: length}, "use_cache": None},
        strict=False,
    )
    exported = program.module()
    for shape in ((2, 5), (1, 2), (3, LENGTH)):
        ids = random_ids(*shape)
        with torch.no_grad():
            close(exported(input_ids=ids, use_cache=False).logits, model(ids).logits, 1e-4)
