"""
Runs on each of two processes, under torchrun: shards a saved model in every way that its plans describe, and writes
down what came out, for test_plans.py to compare with one process.

    torchrun --nproc-per-node 2 plan_worker.py OUTPUT_FOLDER MODEL_FOLDER...
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from modeling_mini import MiniForCausalLM
from torch import nn
from transformers.distributed import DistributedConfig

IDS = torch.randint(8, 264, (2, 12), generator=torch.Generator().manual_seed(2))
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def sharded(kind: str, folder: Path) -> MiniForCausalLM:
    return MiniForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{f"{kind}_size": 2})).eval()


def native(kind: str, folder: Path, output: Path) -> dict[str, Any]:
    """Tensor, pipeline and fully sharded data parallelism as transformers applies them when it loads a model."""
    model = sharded(kind, folder)
    local = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in model.named_parameters()}
    result: dict[str, Any] = {"local_shapes": {name: tuple(value.shape) for name, value in local.items()}}
    with torch.no_grad():
        result["logits"] = whole(model(IDS, use_cache=False).logits)
    result["generated"] = model.generate(IDS, **GREEDY)
    if kind != "pp":  # transformers' pipeline is for inference
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        result["gradients"] = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        model.save_pretrained(output / f"{folder.name}-{kind}-saved")
    return result


class ElsewhereOnThePipeline(nn.Module):
    """Stands for a part that another stage holds: what goes in comes out."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def pipeline_by_plan(folder: Path) -> dict[str, Any]:
    """
    The pipeline as an inference engine builds it from `base_model_pp_plan` alone: what the plan lists before the one
    list of blocks goes to the first stage, what it lists after to the last, and the blocks are split between the two.
    """
    model = MiniForCausalLM.from_pretrained(folder).eval()
    base, rank = model.model, dist.get_rank()
    plan = list(model.config.base_model_pp_plan)
    (blocks,) = (i for i, name in enumerate(plan) if isinstance(getattr(base, name), nn.ModuleList))
    foreign = plan[blocks + 1 :] if rank == 0 else plan[:blocks]
    for name in foreign:
        setattr(base, name, ElsewhereOnThePipeline())
    layers = getattr(base, plan[blocks])
    for i in range(len(layers)):
        if (i < len(layers) // 2) != (rank == 0):
            layers[i] = ElsewhereOnThePipeline()
    states = torch.empty(*IDS.shape, model.config.hidden_size)
    with torch.no_grad():
        if rank == 0:
            states = base(input_ids=IDS, use_cache=False).last_hidden_state.contiguous()
            dist.send(states, dst=1)
        else:
            dist.recv(states, src=0)
            states = base(inputs_embeds=states, use_cache=False).last_hidden_state
        logits = model.lm_head(states)
        # The head stands on the last stage.
        dist.broadcast(logits, src=1)
    held = sum(p.numel() for name, p in base.named_parameters() if "layers" in name)
    return {"logits": logits, "parameters_of_blocks": held}


def main(output: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    results = {}
    for folder in folders:
        for kind in ("tp", "pp", "fsdp"):
            results[folder.name, kind] = native(kind, folder, output)
        results[folder.name, "pp_plan"] = pipeline_by_plan(folder)
    torch.save(results, output / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
