"""Training from a checkpoint, as a user types it: in full, by an adapter, and by an adapter over rounded weights."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from cards_mini import CARD, read_card
from datasets import Dataset
from helpers.programs import ROOT, run_program
from helpers.runs import forked, losses, metrics
from modeling_mini import MiniForCausalLM
from modeling_mini.loading.checkpoints import load_checkpoint
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from training_mini import distributed
from training_mini.arguments import parse_arguments
from training_mini.checkpoints import states_of
from training_mini.evaluation import Evaluation
from training_mini.model_folders import save_model
from training_mini.result import TrainingResult
from training_mini.trainer import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

LEARNED = 0.005  # nats that validation falls at least by, in runs of seconds
FLAGS = "--dataset sample --train_batch_size 8 --warmup_steps 2 --logging_steps 1 --learning_rate 1e-2".split()
FLAGS += ["--max_eval_tokens", "8192"]  # as for the run that they start from


def tune(folder: Path, base: Path, *flags: object) -> tuple[Trainer, TrainingResult]:
    """A run in this process."""
    arguments = ["--model", base, *FLAGS, "--output_dir", folder, *flags]
    trainer = Trainer(parse_arguments([*map(str, arguments)]))
    return trainer, trainer.train()


def validation_loss(run: Path) -> float:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(8, 264).remainder(97).add(8).view(4, 64)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.slow
def test_from_a_checkpoint_in_full(quick_run: Path, tmp_path: Path) -> None:
    trainer, result = tune(
        tmp_path / "run", quick_run, "--max_steps", 6, "--learning_rate", 1e-3, "--residual_dropout", 0.1
    )
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(quick_run)[-1], abs=0.3), "it begins where that ended"
    assert type(trainer.run.unwrapped_model) is MiniForCausalLM
    assert trainer.run.unwrapped_model.model.layers[1].residual_dropout.p == trainer.run.config.residual_dropout == 0.1
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert "`tiny-sample`, a small decoder-only language model, fine-tuned on `sample`." in card
    before, after = (load_file(run / "best" / "model.safetensors") for run in (quick_run, tmp_path / "run"))
    assert all(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert result.run.folder.name == "run"


def test_no_mfu_is_claimed_for_an_adapter(quick_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The formula counts the gradients of all weights."""
    tune(tmp_path / "run", quick_run, "--lora_r", 4, "--max_steps", 3, "--peak_tflops", 0.5)
    assert not any("mfu" in line for line in metrics(tmp_path / "run"))
    assert "MFU" not in capsys.readouterr().out


@pytest.mark.slow
def test_adapter_as_a_user_types_it(quick_run: Path, tmp_path: Path) -> None:
    flags = "--lora_r 4 --max_steps 12 --eval_steps 6 --save_steps 6 --merge".split()
    result = run_program("train_accelerate.py", "--model", quick_run, *FLAGS, *flags, cwd=tmp_path)
    assert result.returncode == 0 and "warn" not in result.stderr.lower(), result.stderr
    run = tmp_path / "runs" / "tiny-sample-sample-lora"
    # 7 matrices in each of 2 blocks: (64 + 64, 64 + 32, 64 + 32, 64 + 64 and three of 64 + 64) x 4.
    trainable = 2 * 4 * (5 * 128 + 2 * 96)
    learns = rf"From \S*tiny-sample/best: {trainable:,} of [\d,]+ parameters learn \(\d+\.\d%\), "
    needs = r"about [\d.]+ MiB of memory for 8 x 64 tokens; in full, [\d.]+ MiB\.\n"
    assert re.search(learns + needs, result.stdout), result.stdout
    assert f"python {ROOT}/generate.py --model runs/tiny-sample-sample-lora" in result.stdout
    assert f"Merged       {run.relative_to(tmp_path)}/merged" in result.stdout
    for name in ("best", "final"):
        assert {path.name for path in (run / name).iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
            "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        assert (run / name / "adapter_model.safetensors").stat().st_size < 4 * trainable + 5000
    card = (run / "best" / "README.md").read_text()
    for words in (
        "library_name: peft", "A LoRA adapter for `tiny-sample`, trained on `sample`.", "AutoPeftModelForCausalLM",
        "| base | tiny-sample |", "LoRA of rank 4, alpha 8, on all linear layers of the blocks",
    ):  # fmt: skip
        assert words in card, words
    assert str(tmp_path) not in card and "base_model:" not in card, "a folder of this disk is nothing to share"
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "best")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert type(merged) is MiniForCausalLM and merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=0, atol=1e-5)
    assert not torch.allclose(logits_of(merged), logits_of(load_checkpoint(str(quick_run / "best"))[0]), atol=1e-2)
    assert (run / "merged" / "modeling_mini.py").is_file() and "merged into it" in (
        run / "merged" / "README.md"
    ).read_text()
    assert merged.generation_config.to_dict() == adapted.base_model.model.generation_config.to_dict()
    written = run_program("generate.py", "--model", run, "--prompt", "the", "--temperature", 0, cwd=tmp_path)
    of_merged = run_program(
        "generate.py", "--model", run / "merged", "--prompt", "the", "--temperature", 0, cwd=tmp_path
    )
    assert written.returncode == 0 and written.stdout == of_merged.stdout, written.stderr


@pytest.mark.slow
def test_state_holds_what_learns_and_resumes_bit_by_bit(quick_run: Path, tmp_path: Path) -> None:
    flags = ["--lora_r", 4, "--lora_dropout", 0.1, "--ema_decay", 0.5, "--max_steps", 8, "--save_steps", 4]
    whole, _ = tune(tmp_path / "whole", quick_run, *flags)
    tune(tmp_path / "parts", quick_run, *flags)
    first, last = states_of(tmp_path / "parts")
    for path in last.iterdir():
        path.unlink()
    resumed = Trainer(parse_arguments(["--resume", "--output_dir", str(tmp_path / "parts")]))
    resumed.train()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, tensor in whole.run.unwrapped_model.state_dict().items():
        assert torch.equal(tensor, resumed.run.unwrapped_model.state_dict()[name]), name
    saved = FileSystemReader(first).read_metadata().state_dict_metadata
    assert any("lora_A" in name for name in saved)
    assert not any("base_layer" in name or "embed_tokens" in name for name in saved), "the base is not in it"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--use_dora"],
        ["--use_rslora", "--lora_alpha", 4],
        ["--lora_target_modules", "gate_proj", "up_proj", "down_proj"],
        ["--lora_modules_to_save", "embed_tokens"],
        ["--gradient_checkpointing"],
    ],
    ids=lambda flags: flags[0],
)
def test_kinds_of_adapters_learn_and_merge(flags: list[object], quick_run: Path, tmp_path: Path) -> None:
    trainer, result = tune(tmp_path / "run", quick_run, "--lora_r", 4, "--max_steps", 20, "--merge", *flags)
    assert isinstance(trainer.run.unwrapped_model, PeftModel)
    assert result.evaluation.loss < validation_loss(quick_run) - LEARNED
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(trainer.run.unwrapped_model), rtol=0, atol=2e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight, "tied as before"
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "best")
    torch.testing.assert_close(logits_of(again), logits_of(trainer.run.unwrapped_model), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "run" / "best" / "adapter_config.json").read_text())
    assert config["use_dora"] == ("--use_dora" in flags) and config["use_rslora"] == ("--use_rslora" in flags)
    assert config["base_model_name_or_path"] == f"{quick_run}/best"
    if "--use_rslora" in flags:
        layer = trainer.run.unwrapped_model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == 4 / 4**0.5
    changed = not torch.equal(merged.lm_head.weight, load_checkpoint(f"{quick_run}/best")[0].lm_head.weight)
    assert changed == ("--lora_modules_to_save" in flags)
    # A worse end of the run is not what the card of the merged model, which has the best adapter, is about.
    trainer.state.step += 5
    save_model(trainer.run, "merged", Evaluation(result.evaluation.loss * 2, result.evaluation.bits_per_byte * 2))
    best, of_merged = (read_card(tmp_path / "run" / name / CARD) for name in ("best", "merged"))
    assert of_merged.facts.step == best.facts.step and of_merged.facts.sequences == best.facts.sequences
    figures = [card.metadata["model-index"][0]["results"][0]["metrics"] for card in (best, of_merged)]
    assert [m["value"] for m in figures[1]] == pytest.approx([m["value"] for m in figures[0]])


@pytest.mark.slow
def test_rounded_base_learns_nearly_as_well_and_evaluation_does_not_end_it(quick_run: Path, tmp_path: Path) -> None:
    settings = ["--lora_r", 8, "--max_steps", 80, "--eval_steps", 20]
    _, full = tune(tmp_path / "lora", quick_run, *settings)
    trainer, rounded = tune(tmp_path / "qlora", quick_run, *settings, "--load_in_4bit")
    assert rounded.evaluation.loss == pytest.approx(full.evaluation.loss, rel=0.02)
    assert full.evaluation.loss < 0.95 * validation_loss(quick_run), "which 2 % could not hide"
    layer = trainer.run.unwrapped_model.base_model.model.model.layers[0].mlp.down_proj.base_layer
    assert type(layer).__name__ == "Linear4bit" and layer.weight.dtype == torch.uint8


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    batch = next(trainer.run.batches.micro_batches(0))
    trainer.run.model.train()
    trainer.run.model.zero_grad()
    trainer.loss(batch, batch.targets.numel())[0].backward()
    named = trainer.run.unwrapped_model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


@pytest.mark.slow
def test_gradients_over_4_bits_are_the_same_after_an_evaluation(quick_run: Path, tmp_path: Path) -> None:
    """Also where a CPU has AVX512-BF16, for which bitsandbytes packs weights anew and then passes no gradient on."""
    flags = ["--lora_r", 4, "--load_in_4bit", "--max_steps", 3]
    trainer, _ = tune(tmp_path / "run", quick_run, *flags)
    model = trainer.run.unwrapped_model
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = gradients(trainer)
    logits_of(model)
    after = gradients(trainer)
    assert len(after) == 28 and all(torch.equal(before[name], gradient) for name, gradient in after.items())
    assert all(gradient.abs().sum() > 0 for gradient in after.values())


@pytest.mark.slow
def test_merging_into_rounded_weights(quick_run: Path, tmp_path: Path) -> None:
    """The merged model is the one that was trained, rounding and all, and full in size."""
    flags = ["--lora_r", 4, "--load_in_4bit", "--merge", "--merge_quantized", "--max_steps", 10]
    trainer, _ = tune(tmp_path / "run", quick_run, *flags)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert merged.dtype == torch.float32 and not getattr(merged, "is_quantized", False)
    torch.testing.assert_close(logits_of(merged), logits_of(trainer.run.unwrapped_model), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_8_bits(quick_run: Path, tmp_path: Path) -> None:
    trainer, result = tune(tmp_path / "run", quick_run, "--lora_r", 4, "--load_in_8bit", "--max_steps", 20)
    assert result.evaluation.loss < validation_loss(quick_run) - LEARNED
    layer = trainer.run.unwrapped_model.base_model.model.model.layers[0].mlp.down_proj.base_layer
    assert type(layer).__name__ == "Linear8bitLt"


WRONG = {
    "--lora_r 4": "An adapter belongs to a trained model: name it by --model",
    "--model {base} --hidden_size 64 --size small": "leave out size and hidden_size",
    "--model {base} --tokenizer char": "has a tokenizer of its own: leave out --tokenizer",
    "--model {base} --load_in_4bit": "rounded weights cannot be trained: give --lora_r 8 too",
    "--model {base} --use_dora --lora_alpha 3": "lora_alpha and use_dora: this belongs to an adapter",
    "--model {base} --lora_r 4 --load_in_4bit --load_in_8bit": "Give load_in_8bit or load_in_4bit, not both",
    "--model {base} --lora_r 4 --load_in_4bit --merge": "keeps the rounding of the weights for good",
    "--model {base} --lora_r 4 --merge_quantized": "merge_quantized goes with merge",
    "--model {base} --lora_r -1": "lora_r must be at least 0",
    "--model {base} --lora_r 4 --lora_dropout 1": "lora_dropout must be in [0, 1)",
    "--model nothing/here/at/all": "There is no run or checkpoint folder",
}


@pytest.mark.parametrize("flags", WRONG)
def test_settings_that_cannot_work(flags: str, quick_run: Path) -> None:
    with pytest.raises(ValueError) as error:
        parse_arguments(flags.format(base=quick_run).split())
    assert WRONG[flags] in str(error.value) and "\n" not in str(error.value)


WRONG_FOR_THE_MODEL = {
    "--lora_r 4 --lora_target_modules q_porj": "lora_target_modules 'q_porj' matches no layer of the model; there are "
    "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, did you mean 'q_proj'?",
    "--lora_r 4 --lora_modules_to_save head": "lora_modules_to_save 'head' matches nothing in the model; there are ",
    "--lora_r 33": "lora_r 33 is larger than model.layers.0.self_attn.k_proj (32 x 64)",
    "--lora_r 4 --use_dora --load_in_8bit": "peft has no DoRA over weights in INT8 on a CPU: take INT4",
    "--lora_r 4 --lora_target_modules lm_head": "train it in full by --lora_modules_to_save embed_tokens",
    "--assistant_only_loss": "assistant_only_loss needs records with messages",
    "--label_smoothing 0.1 --dataset missing.jsonl": "There is no file or directory 'missing.jsonl'",
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", WRONG_FOR_THE_MODEL)
def test_what_does_not_fit_the_model(flags: str, quick_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        tune(tmp_path / "run", quick_run, *flags.split())
    assert WRONG_FOR_THE_MODEL[flags] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def rounded_copy(run: Path, folder: Path) -> Path:
    model, tokenizer = load_checkpoint(f"{run}/best", quantization="4bit")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_quantized_checkpoint_is_not_trained_in_full(quick_run: Path, tmp_path: Path) -> None:
    rounded = rounded_copy(quick_run, tmp_path / "rounded")
    with pytest.raises(ValueError, match="are quantized and cannot be trained: give --lora_r 8"):
        tune(tmp_path / "run", rounded)
    tune(tmp_path / "adapted", rounded, "--lora_r", 4, "--max_steps", 3)
    assert len(losses(tmp_path / "adapted")) == 3


def test_what_sharding_cannot_do(quick_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(distributed, "check_launch", lambda: None)  # it wants a GPU for that, before anything else
    with pytest.raises(ValueError, match="--lora_r does not work with DeepSpeed here"):
        tune(tmp_path / "run", quick_run, "--lora_r", 4)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    for model, flags, words in (
        (quick_run, ["--load_in_4bit"], "load_in_4bit does not work with FSDP2 here"),
        (rounded_copy(quick_run, tmp_path / "rounded"), [], "Quantized weights do not work with FSDP2 here"),
    ):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        with pytest.raises(ValueError, match=words):
            tune(tmp_path / "run", model, "--lora_r", 4, *flags)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_run_goes_on_with_the_adapter_and_the_base_that_it_began_with(quick_run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model, tokenizer = load_checkpoint(f"{quick_run}/best")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    tune(tmp_path / "run", base, "--lora_r", 4, "--max_steps", 3)
    resume = ["--resume", "--output_dir", str(tmp_path / "run"), "--max_steps", "5"]
    with pytest.raises(ValueError, match=r"cannot go on with other methods .*: lora_r \(was 4, now 8\)"):
        Trainer(parse_arguments([*resume, "--lora_r", "8"]))
    with pytest.raises(ValueError, match=r"cannot go on with other methods .*: lora_r \(was 4, now None\)"):
        Trainer(parse_arguments([*resume, "--lora_r", "0"]))
    base = base.rename(tmp_path / "moved")
    Trainer(parse_arguments([*resume, "--model", str(base)])).train()
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert len(losses(tmp_path / "run")) == 5 and adapted.peft_config["default"].base_model_name_or_path == str(base)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(base)
    with pytest.raises(ValueError, match=r"cannot go on with other methods .*: weights of --model \(was "):
        Trainer(parse_arguments(resume))


@pytest.mark.slow
def test_adapter_is_no_base(quick_run: Path, tmp_path: Path) -> None:
    tune(tmp_path / "run", quick_run, "--lora_r", 4, "--max_steps", 3)
    with pytest.raises(ValueError, match=r"is an adapter for .*tiny-sample/best.*--resume --merge"):
        parse_arguments(["--model", str(tmp_path / "run")])


@pytest.mark.slow
def test_adapter_on_two_processes_and_its_state_on_one(quick_run: Path, tmp_path: Path) -> None:
    """In shards of FSDP2, from conversations: whichever process has more to say, the losses are those of one."""
    lesson = ["--dataset", "chats.jsonl", "--lora_r", 4, "--save_steps", 3, "--lr_scheduler_type", "constant"]
    chats = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * length}] for length in range(1, 40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    flags = ["--model", quick_run, *FLAGS, *lesson]
    for config, name in (("cpu_fsdp2.yaml", "two"), (None, "one")):
        output = forked(config, tmp_path, *flags, "--max_steps", 3, "--merge", "--output_dir", name)
        assert ("2 x cpu" in output and "FSDP2" in output) == (name == "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for name in ("two", "one"):
        forked(None, tmp_path, "--resume", "--output_dir", name, "--max_steps", 6)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    merged = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "merged") for name in ("two", "one")]
    torch.testing.assert_close(logits_of(merged[0]), logits_of(merged[1]), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_trainers_that_people_have_take_an_adapter(quick_run: Path, tmp_path: Path) -> None:
    """transformers' Trainer through TRL's SFTTrainer, with the default modules and no word on them."""
    model = AutoModelForCausalLM.from_pretrained(quick_run / "best")
    conversation = [{"role": "user", "content": "say yes"}, {"role": "assistant", "content": "yes"}]
    settings = SFTConfig(
        output_dir=str(tmp_path), max_steps=15, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, max_length=64, disable_tqdm=True,
        assistant_only_loss=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"messages": [conversation] * 8}),
        processing_class=AutoTokenizer.from_pretrained(quick_run / "best"),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    assert isinstance(trainer, transformers.Trainer)
    trainer.train()
    reported = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert reported[-1] < reported[0]
    trainer.save_model(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] and set(config["target_modules"]) == {"q_proj", "v_proj"}
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), logits_of(trainer.model), rtol=0, atol=1e-5)
