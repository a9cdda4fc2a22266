"""What the adapters of a run keep in memory, and the names that their layers have."""

import pytest
import torch
from modeling_mini import MiniConfig, MiniForCausalLM
from modeling_mini.analysis.cost import ModelCost
from training_mini.arguments import AdapterArguments
from training_mini.lora import add_lora, describe_training, in_mib, kept_by_adapters
from transformers import GPT2Config, GPT2LMHeadModel

ROWS, LENGTH = 4, 256


def adapted(**settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = MiniConfig.preset("tiny", num_hidden_layers=2, num_key_value_heads=2, intermediate_size=192)
    return add_lora(MiniForCausalLM(config), AdapterArguments(lora_r=4, **settings)).train()


def bytes_kept(model: torch.nn.Module) -> int:
    """Of all that one forward pass keeps for the backward pass beside weights, each piece of memory once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(ROWS * LENGTH).remainder(256).add(8).view(ROWS, LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_memory_that_is_shown_is_kept(settings: dict[str, object]) -> None:
    model = adapted(**settings)
    full = ModelCost(model.config).training_memory(ROWS, LENGTH, "float32")
    by_adapters = kept_by_adapters(model, ROWS * LENGTH) * torch.float32.itemsize
    # A peak is more than what is kept; the formula was fitted to peaks (docs/LOG.md).
    assert 0.95 < (full.activations + by_adapters) / bytes_kept(model) < 1.25
    shown = describe_training(model, ROWS, LENGTH, bf16=False, gradient_checkpointing=False)
    learns = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    needed = model.get_memory_footprint() + 3 * learns + full.activations + full.working + by_adapters
    assert f"about {needed / 2**20:.1f} MiB of memory for {ROWS} x {LENGTH} tokens" in shown


@pytest.mark.parametrize("targets", [[], ["c_attn"]])
@pytest.mark.filterwarnings("error::UserWarning")
def test_the_linear_layers_of_gpt2_have_a_class_of_their_own(targets: list[str]) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    model = add_lora(GPT2LMHeadModel(config), AdapterArguments(lora_r=4, lora_target_modules=targets))
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == (set(targets) or {"c_attn", "c_proj", "c_fc"})
    with pytest.raises(ValueError, match=r"^lora_r 33 is larger than transformer.h.0.attn.c_attn \(96 x 32\)"):
        add_lora(GPT2LMHeadModel(config), AdapterArguments(lora_r=33, lora_target_modules=["c_attn"]))


@pytest.mark.parametrize(("length", "saves_memory"), [(64, True), (1024, False)])
def test_an_adapter_is_praised_for_what_it_saves(length: int, saves_memory: bool) -> None:
    with torch.device("meta"):
        model = MiniForCausalLM(MiniConfig.preset("tiny"))
        weights = sum(weight.nbytes for weight in model.parameters())
        in_full = describe_training(model, 8, length, bf16=False, gradient_checkpointing=False)
        model = add_lora(model, AdapterArguments(lora_r=4))
        shown = describe_training(model, 8, length, bf16=False, gradient_checkpointing=False)
    assert "learn (100.0%), about " in in_full and "; in full" not in in_full
    line, *hints = shown.split("\n")
    assert "; in full, " in line and bool(hints) != saves_memory
    if hints:
        learns = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
        assert hints[0].endswith(f"a checkpoint of {in_mib(learns)} in place of {in_mib(weights)}")


def test_all_linear_is_the_name_that_peft_has_for_the_default() -> None:
    by_name, by_default = adapted(lora_target_modules=["all-linear"]), adapted()
    assert by_name.state_dict().keys() == by_default.state_dict().keys()
