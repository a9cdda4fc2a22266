"""
What a GPU computes in other ways than a CPU, held to what is known. The tests run on the GPU if there is one, and on
the CPU otherwise, so that they themselves are known to work. `benchmarks/gpu.py` runs them where there is a GPU.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from files_mini import find_checkpoint
from helpers.programs import free_port, run_program
from helpers.random_models import make_model
from helpers.runs import QUICK, losses, train_here, weights
from modeling_mini.loading.checkpoints import load_checkpoint
from training_mini.arguments import parse_arguments
from training_mini.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# cuBLAS reads it when it is first used; without it, its products are not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
IDS = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kinds_of_attention_agree(dtype: torch.dtype) -> None:
    """With padding, and with two documents in one sequence; a document of a sequence is as it is alone."""
    model = make_model().to(DEVICE, dtype)
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    packed = torch.tensor([[*range(9), *range(15)]], device=DEVICE)
    results = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            padded = model(IDS, attention_mask=mask).logits[mask.bool()]
            together = model(IDS[:1], position_ids=packed, use_cache=False).logits[0]
            apart = torch.cat([model(part).logits[0] for part in IDS[:1].split([9, 15], dim=1)])
            results[attention] = torch.cat([model(IDS).logits.flatten(0, 1), padded, together, apart])
            assert difference(together, apart) < (1e-4 if dtype == torch.float32 else 0.03), attention
    assert difference(results["sdpa"], results["eager"]) < (1e-4 if dtype == torch.float32 else 0.03)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The size of what differs, as a share."""
    return ((actual - expected).float().norm() / expected.float().norm()).item()


def test_loss_and_gradients_in_bfloat16() -> None:
    model = make_model(initializer_range=0.05).to(DEVICE).train()
    found = {}
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        found[enabled] = loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    assert found[True][0] == pytest.approx(found[False][0], rel=0.01)
    assert found[True][0] != found[False][0], "it was not computed in bfloat16"
    assert difference(found[True][1], found[False][1]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("8bit", 0.05), ("4bit", 0.35)])
def test_quantized_weights(quick_run: Path, tmp_path: Path, kind: str, bound: float) -> None:
    """They give about the logits of the exact ones, and an adapter beside them learns."""
    ids, folder = IDS + 8, find_checkpoint(str(quick_run))
    logits = {}
    for quantization in (None, kind):
        model, _ = load_checkpoint(folder, device=DEVICE.type, dtype=torch.float32, quantization=quantization)
        with torch.no_grad():
            logits[quantization] = model(ids).logits
    assert 0 < difference(logits[kind], logits[None]) < bound
    place = ["--model", str(quick_run), "--dataset", "sample", "--output_dir", str(tmp_path / "run")]
    settings = [*place, "--lora_r", "4", f"--load_in_{kind}", "true", "--max_steps", "3", "--warmup_steps", "0"]
    settings += ["--max_eval_tokens", "2048"]
    trainer = Trainer(parse_arguments(settings))
    trainer.train()
    learned = [p for name, p in trainer.run.unwrapped_model.named_parameters() if "lora_B" in name]
    assert learned and all(parameter.abs().max() > 0 for parameter in learned)


@pytest.mark.slow
def test_fsdp_on_one_process_equals_none(tmp_path: Path) -> None:
    settings = [*QUICK, "--max_steps", 4, "--bf16", "false", "--tf32", "false"]
    one_process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**one_process, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    found = {}
    for name, variables in (("plain", {}), ("FSDP2", {**environment, "MASTER_PORT": str(free_port())})):
        done = run_program(
            "train_accelerate.py", *settings, "--output_dir", name, cwd=tmp_path, OMP_NUM_THREADS="1", **variables
        )
        assert done.returncode == 0, done.stderr
        assert ("(FSDP2)" in done.stdout) == (name == "FSDP2"), done.stdout
        found[name] = losses(tmp_path / name)
    assert found["FSDP2"] == pytest.approx(found["plain"], rel=1e-4)


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = ["--max_steps", 6, "--save_steps", 3]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train_here(whole, *settings)
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / "checkpoints" / "step_6")
        trainer, _ = train_here(resumed, "--resume")
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer.state.step == 6 and len(losses(resumed)) == 6
    assert losses(resumed) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
