"""
What the model says about itself to those who take it apart: plans for many devices, tied weights, attention kernels,
and the serving engines that put their own parts in place of the model's. Each claim is tested by acting on it.
"""

import inspect
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from configuration_mini import MiniConfig
from helpers import fork_server
from modeling_mini import MiniForCausalLM, MiniModel
from modeling_mini import modeling_mini as source
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.distributed.fsdp import ALL_FSDP_STYLES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

ROOT = Path(__file__).parents[2]
IDS = torch.randint(8, 264, (2, 12), generator=torch.Generator().manual_seed(2))
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {
        "tie_word_embeddings": False,
        "norm_type": "rmsnorm",
        "qk_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}


def make_model(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **fields: Any) -> MiniForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = MiniForCausalLM(MiniConfig(**{**sizes, "max_position_embeddings": 64, **fields})).to(dtype).eval()
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
        with torch.no_grad():
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Two processes.


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """What plan_worker.py found on each rank; all of it in one launch, because a launch costs seconds."""
    folder = tmp_path_factory.mktemp("plans")
    for name, fields in MODELS.items():
        make_model(**fields).save_pretrained(folder / name)
    worker = ROOT / "tests" / "helpers" / "plan_worker.py"
    launch = [
        fork_server.python(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        worker,
        folder,
    ]
    result = subprocess.run(
        [str(part) for part in (*launch, *(folder / name for name in MODELS))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


Results = tuple[Path, list[dict]]
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.slow
@each_model
@pytest.mark.parametrize("kind", ["tp", "pp", "fsdp", "pp_plan"])
def test_sharded_logits_equal_those_of_one_process(two_processes: Results, name: str, kind: str) -> None:
    with torch.no_grad():
        expected = make_model(**MODELS[name])(IDS).logits
    for rank in two_processes[1]:
        close(rank[name, kind]["logits"], expected)


@pytest.mark.slow
@each_model
@pytest.mark.parametrize("kind", ["tp", "pp", "fsdp"])
def test_sharded_generation_equals_that_of_one_process(two_processes: Results, name: str, kind: str) -> None:
    expected = make_model(**MODELS[name]).generate(IDS, **GREEDY)
    for rank in two_processes[1]:
        assert torch.equal(rank[name, kind]["generated"], expected)


@pytest.mark.slow
@each_model
@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_sharded_gradients_equal_those_of_one_process(two_processes: Results, name: str, kind: str) -> None:
    model = make_model(**MODELS[name])
    model(IDS, labels=IDS).loss.backward()
    for rank in two_processes[1]:
        gradients = rank[name, kind]["gradients"]
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for parameter_name, parameter in model.named_parameters():
            # Against the size of each gradient: the one of a norm can be a thousandth of that of a matrix.
            size = parameter.grad.abs().max().item()
            close(gradients[parameter_name] / size, parameter.grad / size, 1e-3)


@pytest.mark.slow
@each_model
@pytest.mark.parametrize("kind", ["tp", "fsdp"])
def test_a_sharded_model_saves_itself_whole(two_processes: Results, name: str, kind: str) -> None:
    saved = MiniForCausalLM.from_pretrained(two_processes[0] / f"{name}-{kind}-saved").state_dict()
    expected = make_model(**MODELS[name]).state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.slow
@each_model
def test_tensor_parallel_halves_every_matrix(two_processes: Results, name: str) -> None:
    whole = {key: tuple(value.shape) for key, value in make_model(**MODELS[name]).named_parameters()}
    for rank in two_processes[1]:
        shapes = rank[name, "tp"]["local_shapes"]
        for key, shape in whole.items():
            if len(shape) == 2:
                # The output projections take their halves of the input, all others give half of the output.
                half = (shape[0], shape[1] // 2) if "o_proj" in key or "down_proj" in key else (shape[0] // 2, shape[1])
                assert shapes[key] == half, key
            elif "norm" in key:
                assert shapes[key] == shape, key


@pytest.mark.slow
@each_model
def test_fully_sharded_halves_every_parameter(two_processes: Results, name: str) -> None:
    for key, parameter in make_model(**MODELS[name]).named_parameters():
        for rank in two_processes[1]:
            assert rank[name, "fsdp"]["local_shapes"][key] == (parameter.shape[0] // 2, *parameter.shape[1:]), key


@pytest.mark.slow
@each_model
def test_each_stage_of_the_pipeline_holds_its_part(two_processes: Results, name: str) -> None:
    whole = dict(make_model(**MODELS[name]).named_parameters())
    per_block = sum(value.numel() for key, value in whole.items() if "layers.0." in key)
    for rank, results in enumerate(two_processes[1]):
        assert results[name, "pp_plan"]["parameters_of_blocks"] == 2 * per_block
        held = results[name, "pp"]["local_shapes"]
        assert {key.split(".")[2] for key in held if "layers." in key} == ({"0", "1"} if rank == 0 else {"2", "3"})
        assert ("model.norm.weight" in held) is (rank == 1)
        # A tied head needs the embedding on its own stage too.
        assert ("model.embed_tokens.weight" in held) is (rank == 0 or name == "tied")


# The plans by themselves.


def matches(pattern: str, name: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


@pytest.mark.parametrize("make", [make_model, lambda **fields: make_model(**fields).model], ids=["head", "base"])
@each_model
def test_every_rule_names_a_module_and_every_matrix_has_a_rule(name: str, make: Any) -> None:
    model = make(**MODELS[name])
    modules = dict(model.named_modules())
    for plan in (model.tp_plan, model.fsdp_plan, model.pp_plan):
        assert plan
        for pattern in plan:
            assert any(matches(pattern, module) for module in modules), pattern
    assert set(model.fsdp_plan.values()) <= set(ALL_FSDP_STYLES)
    for module_name, module in modules.items():
        if isinstance(module, nn.Linear):
            assert any(matches(pattern, module_name) for pattern in model.tp_plan), module_name
    # Parameters that no rule of the plan covers would stay whole on every device.
    for parameter in dict(model.named_parameters()):
        covers = [p for p in model.fsdp_plan if any(matches(p, m) and parameter.startswith(f"{m}.") for m in modules)]
        assert covers, parameter


def test_pipeline_plan_speaks_of_names_in_the_code() -> None:
    plan = MiniConfig.base_model_pp_plan
    variables = set(inspect.signature(MiniModel.forward).parameters)
    variables |= set(inspect.unwrap(MiniModel.forward).__code__.co_varnames)
    for name, (inputs, outputs) in plan.items():
        assert hasattr(make_model().model, name)
        assert set(inputs) | set(outputs) <= variables, name
    block_inputs = set(inspect.signature(source.MiniDecoderLayer.forward).parameters)
    assert set(plan["layers"][0]) <= block_inputs
    # In the order of the data, each taking what the one before gives.
    assert list(plan) == ["embed_tokens", "layers", "norm"]
    assert MiniForCausalLM._pp_plan == {"lm_head": (["hidden_states"], ["logits"])}


def test_tied_weights_keys() -> None:
    model = make_model()
    for target, origin in model._tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(origin)
    untied = make_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings() is model.model.embed_tokens


# More than one device in one process.


def test_no_block_is_split_over_devices() -> None:
    model = make_model()
    layer_bytes = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    # Room for a block and a half: without the rule, the second would be cut in two.
    room = {"cpu": sum(p.numel() * 4 for p in model.model.embed_tokens.parameters()) + int(2.5 * layer_bytes)}
    kept = infer_auto_device_map(model, max_memory=room, no_split_module_classes=model._no_split_modules)
    cut = infer_auto_device_map(model, max_memory=room, no_split_module_classes=[])
    assert "disk" in kept.values()
    assert not any(name.count(".") > 2 for name in kept)
    assert any(name.count(".") > 2 for name in cut)


@pytest.mark.slow
@each_model
def test_offloaded_model_equals_the_whole_one(name: str, tmp_path: Path) -> None:
    model = make_model(**MODELS[name])
    model.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * 4 for p in model.parameters())
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": int(size * 0.7)}, offload_folder=tmp_path / "disk"
    ).eval()
    assert {"cpu", "disk"} == set(offloaded.hf_device_map.values())
    with torch.no_grad():
        close(offloaded(IDS).logits, model(IDS).logits, 0)
    assert torch.equal(offloaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


def test_device_map_by_hand(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk"}
    device_map |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    offloaded = MiniForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
    ).eval()
    with torch.no_grad():
        close(offloaded(IDS).logits, model(IDS).logits, 0)


# Attention kernels.


@pytest.mark.parametrize("model_class", [MiniModel, MiniForCausalLM])
def test_flags(model_class: type) -> None:
    for flag in (
        "_supports_flash_attn",
        "_supports_sdpa",
        "_supports_flex_attn",
        "_supports_attention_backend",
        "_can_compile_fullgraph",
        "supports_gradient_checkpointing",
    ):
        assert getattr(model_class, flag) is True, flag
    assert model_class.base_model_prefix == "model"
    assert model_class.config_class is MiniConfig
    assert model_class._skip_keys_device_placement == ["past_key_values"]


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is here, and tested on the GPU")
@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_lacks_only_its_package(version: int) -> None:
    # A class that does not claim support is refused with a ValueError about the class.
    with pytest.raises(ImportError, match=f"FlashAttention{version}"):
        make_model(f"flash_attention_{version}")


PACKED = torch.tensor([[*range(5), *range(7)]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_flash_attention_equals_sdpa() -> None:
    model, ids = make_model(dtype=torch.bfloat16).cuda(), IDS.cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    results = {}
    for attention in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            packed = model(ids[:1], position_ids=PACKED.cuda(), use_cache=False).logits
            results[attention] = (model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()], packed)
    for actual, expected in zip(results["flash_attention_2"], results["sdpa"], strict=True):
        assert (actual - expected).float().std() < 0.02 * expected.float().std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_flex_attention_trains_on_a_gpu() -> None:
    """Flex has no backward pass on the CPU."""
    gradients = {}
    for attention in ("sdpa", "flex_attention"):
        model = make_model(attention).cuda().train()
        model(IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss.backward()
        gradients[attention] = model.model.embed_tokens.weight.grad
    close(gradients["flex_attention"], gradients["sdpa"], 1e-3)


def test_flash_attention_gets_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the kernel replaced by plain sums, called through transformers' own way to it."""
    calls = []

    def plain_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **keywords: Any) -> Any:
        """(batch, length, heads, head_dim), causal from the end, documents apart where positions begin again."""
        calls.append(keywords)
        groups, positions = query.shape[2] // key.shape[2], keywords["position_ids"]
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * keywords["softmax_scale"]
        allowed = torch.ones(scores.shape[-2:]).tril(scores.shape[-1] - scores.shape[-2]).bool()[None, None]
        if mask is not None:
            assert mask.ndim == 2
            allowed = allowed & mask[:, None, None].bool()
        elif query.shape[1] == key.shape[1]:
            document = (positions == 0).cumsum(-1)
            allowed = allowed & (document[:, None, :, None] == document[:, None, None])
        # A row of padding attends to nothing.
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
        return torch.einsum("bhqk,bkhd->bqhd", weights, value)

    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", plain_kernel)
    model, flash = make_model(), make_model()
    flash.config._attn_implementation = "flash_attention_2"
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.no_grad():
        close(flash(IDS).logits, model(IDS).logits)
        close(flash(IDS, attention_mask=mask).logits[mask.bool()], model(IDS, attention_mask=mask).logits[mask.bool()])
        close(flash(IDS, position_ids=PACKED).logits, model(IDS, position_ids=PACKED).logits)
        cache = flash(IDS[:, :7]).past_key_values
        close(flash(IDS[:, 7:], past_key_values=cache).logits, model(IDS).logits[:, 7:])
    assert len(calls) == 5 * 4
    assert [call["layer_idx"] for call in calls[:4]] == [0, 1, 2, 3]
    for call in calls:
        assert call["is_causal"] is True
        assert call["softmax_scale"] == 16**-0.5
        assert call["dropout"] == 0.0


# Serving engines. vLLM and SGLang register an attention function under a name of their own, build the base model with
# AutoModel.from_config, put their own parts in place of the embedding and the matrices, and call it on one row that
# holds the tokens of all requests, with their cache handles among the keyword arguments.


class EngineCache:
    """The keys and values of one layer, for the requests of a batch together."""

    def __init__(self, requests: torch.Tensor) -> None:
        self.requests = requests
        self.scale: float | None = None


def engine_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, EngineCache] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert attention_mask is None, "the engine keeps requests apart itself"
    cache = attention_instances[module.layer_idx]
    cache.scale = scaling
    heads, tokens, head_dim = query.shape[1:]
    key = key[0].repeat_interleave(heads // key.shape[1], 0)
    value = value[0].repeat_interleave(heads // value.shape[1], 0)
    allowed = (cache.requests[:, None] == cache.requests) & torch.ones(tokens, tokens).tril().bool()
    weights = (query[0] @ key.mT * scaling).masked_fill(~allowed, -torch.inf).softmax(-1)
    # As engines do: flat, with neither a batch nor heads.
    return (weights @ value).transpose(0, 1).reshape(tokens, heads * head_dim), None


class EngineLinear(nn.Module):
    """Stands in for an engine's own matrix, which is no `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix, self.offset = linear.weight, linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.matrix, self.offset)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters without memory, buffers with their values: how engines build a model before they load it."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@each_model
def test_a_serving_engine_can_run_the_base_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", engine_attention)
    trained = make_model(**MODELS[name])
    config = MiniConfig(**trained.config.to_dict())
    config.get_text_config()._attn_implementation = "engine"
    with parameters_on_meta():
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
    assert isinstance(model, MiniModel)
    assert model.config._attn_implementation == "engine"
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(model.rotary_emb.inv_freq, trained.model.rotary_emb.inv_freq)
    model.load_state_dict(trained.model.state_dict(), assign=True)

    assert model.supports_tp_plan and model.supports_pp_plan
    replaced = 0
    for module_name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            (style,) = (style for pattern, style in model.tp_plan.items() if matches(pattern, module_name))
            assert style in ("colwise", "rowwise")
            parent, _, child = module_name.rpartition(".")
            setattr(model.get_submodule(parent), child, EngineLinear(module))
            replaced += 1
    assert replaced == 7 * 4
    embedding = nn.Embedding.from_pretrained(trained.model.embed_tokens.weight.detach())
    model.set_input_embeddings(embedding)

    lengths = [5, 12, 1]
    requests = [IDS[0, :5], IDS[1], IDS[0, 5:6]]
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    caches = {i: EngineCache(owners) for i in range(config.num_hidden_layers)}
    arguments = {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_instances": caches,
        "use_cache": False,
        "return_dict": False,
    }
    tokens = torch.cat(requests)[None]
    with torch.no_grad():
        states = model(input_ids=tokens, **arguments)[0][0]
        close(model(inputs_embeds=embedding(tokens), **arguments)[0][0], states, 0)
        for request, part in zip(requests, states.split(lengths), strict=True):
            close(part, trained.model(request[None]).last_hidden_state[0])
    assert all(cache.scale == 16**-0.5 for cache in caches.values())


def test_what_serving_engines_read() -> None:
    assert MiniModel.is_backend_compatible()
    assert MiniModel._supports_attention_backend
    config = MiniConfig()
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert getattr(config.get_text_config(), name) is not None, name
    # Every part between the model and the attention passes on what it does not know.
    for part in (MiniForCausalLM, MiniModel, source.MiniDecoderLayer, source.MiniAttention):
        kinds = [parameter.kind for parameter in inspect.signature(part.forward).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD in kinds, part
    # One list of blocks, and a decoder.
    base = make_model().model
    assert [name for name, child in base.named_children() if isinstance(child, nn.ModuleList)] == ["layers"]
    for i, layer in enumerate(base.layers):
        assert layer.self_attn.is_causal is True
        assert layer.self_attn.layer_idx == i
    # Engines replace what is called *RMSNorm and reads `weight` and `eps`.
    norm = make_model(norm_type="rmsnorm").model.norm
    assert type(norm).__name__.endswith("RMSNorm")
    assert norm.eps == config.norm_eps
    # The code asks for the kernel by the name in the configuration, and calls none by itself.
    text = inspect.getsource(source.MiniAttention.forward)
    assert "ALL_ATTENTION_FUNCTIONS" in text
    assert "scaled_dot_product_attention" not in inspect.getsource(source)
