"""
Makes models as one process of a mesh does, without the other processes, and compares its parts with whole models.

    python start_worker.py RANK SHARDS TENSOR_SIZE FOLDER

A store that answers by itself stands for the other processes. It serves where nothing is exchanged, as in a start: so
only what a process computes and reads by itself is compared.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import set_seed
from configuration_mini import MiniConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from training_mini.distributed import blocks_of, share_products
from training_mini.muon import shared_out
from training_mini.sharded_start import ShardedStart
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: list[PreTrainedConfig] = [
    MiniConfig(**SMALL, intermediate_size=96, qk_norm=True, norm_type="rmsnorm"),
    MiniConfig(**SMALL, intermediate_size=90, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    LlamaConfig(**SMALL, vocab_size=50, intermediate_size=90, pad_token_id=3),  # it fills a row of its embedding anew
    GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2),
]


def shard(model: PreTrainedModel, shards: int, tensor_size: int) -> None:
    mesh = init_device_mesh("cpu", (shards, tensor_size), mesh_dim_names=("dp_shard", "tp"))
    if tensor_size > 1:
        share_products(model, mesh["tp"])
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])


def check_parts(model: PreTrainedModel, whole: PreTrainedModel) -> None:
    expected = dict(whole.named_parameters())
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        part = parameter.to_local()
        assert 0 < part.numel() < expected[name].numel() or parameter.shape[0] < 4, f"{name} is sharded"
        assert torch.equal(part, shared_out(expected[name].detach(), parameter).to_local()), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, whole.get_buffer(name)), name
    is_tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied


def main(rank: int, shards: int, tensor_size: int, folder: Path) -> None:
    dist.init_process_group("fake", rank=rank, world_size=shards * tensor_size, store=FakeStore())
    dcp.load = functools.partial(dcp.load, no_dist=True)  # it asks the others which files there are
    for number, config in enumerate(CONFIGS):
        if tensor_size > 1 and not config.base_model_tp_plan:
            continue
        set_seed(42)
        whole = AutoModelForCausalLM.from_config(config)
        state = torch.get_rng_state()
        start = ShardedStart(functools.partial(AutoModelForCausalLM.from_config, config))
        assert all(p.is_meta for p in start.model.parameters() if p.ndim > 1), "a matrix has no memory yet"
        shard(start.model, shards, tensor_size)
        start.materialize(torch.device("cpu"))
        start.fill(42)
        check_parts(start.model, whole)
        assert torch.equal(torch.get_rng_state(), state), "the next draws are the same"
        # From a checkpoint, in another type and in several files.
        place = folder / str(number)
        if rank == 0:
            whole.to(torch.bfloat16).save_pretrained(place, max_shard_size="40KB")
        start = ShardedStart.of_checkpoint(str(place))
        assert len(list(place.glob("*.safetensors"))) > 1 and start is not None
        shard(start.model, shards, tensor_size)
        start.materialize(torch.device("cpu"))
        start.fill(7)
        check_parts(start.model, AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32))
        print(type(config).__name__)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
