"""Mini in the trainers that people have: transformers' Trainer and those of TRL, as their users type it."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from modeling_mini import MiniConfig, MiniForCausalLM
from tokenization import ByteTokenizer
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.slow


def make_model() -> MiniForCausalLM:
    set_seed(0)
    return MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2, hidden_size=64, intermediate_size=64))


def text_data(tokenizer: ByteTokenizer, rows: int = 160) -> Dataset:
    data = Dataset.from_dict({"text": [f"{i} and {i} is {2 * i}. " * 3 for i in range(rows)]})
    return data.map(lambda row: tokenizer(row["text"]), remove_columns="text")


def train(
    folder: Path, resume: str | None = None, padding_side: str = "left", **settings: object
) -> tuple[Trainer, float]:
    """A run of transformers' Trainer, and its mean training loss."""
    tokenizer = ByteTokenizer(padding_side=padding_side)
    arguments = {
        "output_dir": str(folder), "max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 3e-3,
        "logging_steps": 1, "save_steps": 10, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(**{**arguments, **settings}),
        train_dataset=text_data(tokenizer),
        eval_dataset=text_data(tokenizer, 8),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    return trainer, trainer.train(resume_from_checkpoint=resume).training_loss


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_learns_saves_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    assert losses(whole)[-1] < losses(whole)[0] - 1
    assert whole.evaluate()["eval_loss"] == pytest.approx(losses(whole)[-1], abs=0.5)
    resumed, _ = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-10"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    whole.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.randint(8, 264, (1, 20))
    assert type(again) is MiniForCausalLM
    assert torch.equal(again.eval()(ids).logits, whole.model.eval()(ids).logits)


def test_accumulation_and_checkpointing_in_trainer_change_nothing_but_rounding(tmp_path: Path) -> None:
    """Texts are of different lengths: this holds only because the loss honours num_items_in_batch."""
    settings = {"max_steps": 6, "save_strategy": "no", "padding_side": "right"}
    plain, _ = train(tmp_path / "plain", **settings)
    parts, _ = train(
        tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4,
        activation_checkpointing=True, **settings,
    )  # fmt: skip
    assert losses(parts) == pytest.approx(losses(plain), abs=2e-4)
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, rtol=0, atol=2e-4)


def test_padding_of_either_side_is_learned_from_alike(tmp_path: Path) -> None:
    """On the left, as generation has it, the first token of a shorter text stands behind padding, and is no target."""
    settings = {"max_steps": 6, "save_strategy": "no"}
    left, right = (train(tmp_path / side, padding_side=side, **settings)[0] for side in ("left", "right"))
    assert losses(left) == pytest.approx(losses(right), abs=2e-4)
    assert left.evaluate()["eval_loss"] == pytest.approx(right.evaluate()["eval_loss"], abs=2e-4)
    batch = left.data_collator([left.train_dataset[i] for i in (0, 150)])
    assert batch["labels"][0, 0] == -100 and (batch["labels"] == 1).sum() == 2, "the collator counts both bos"


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_learns_a_conversation(packing: bool, tmp_path: Path) -> None:
    conversations = [
        [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
        for word in ("yes", "no", "moon", "sun")
    ]
    tokenizer = ByteTokenizer()
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=8, learning_rate=5e-3, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, max_length=64, packing=packing,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=make_model(),
        args=arguments,
        train_dataset=Dataset.from_dict({"messages": conversations * 16}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] / 4
    trainer.save_model(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    prompt = tokenizer.apply_chat_template(
        conversations[2][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == "moon"


OF_TRL = {
    "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
    "bf16": False, "disable_tqdm": True,
}  # fmt: skip


def test_dpo_trainer_learns_which_answer_is_preferred(tmp_path: Path) -> None:
    words = ("moon", "sun", "tree", "sea")
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"say {word}"}],
                "chosen": [{"role": "assistant", "content": word}],
                "rejected": [{"role": "assistant", "content": "no"}],
            }
            for word in words
        ]
    )
    make_model().save_pretrained(tmp_path / "model")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"),  # the reference is loaded from there too
        args=DPOConfig(output_dir=str(tmp_path), max_steps=16, learning_rate=1e-3, **OF_TRL),
        train_dataset=data,
        processing_class=ByteTokenizer(),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693, abs=0.01), "it begins as its own reference: ln 2"
    assert losses(trainer)[-1] < 0.5
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    assert margins[-1] > margins[0] + 0.3


def test_grpo_trainer_is_rewarded_for_a_letter(tmp_path: Path) -> None:
    """The reward counts the letter a, whose share of random text is small."""

    def letters(completions: list[str], **columns: object) -> list[float]:
        return [float(text.count("a")) for text in completions]

    trainer = GRPOTrainer(
        model=make_model(),
        reward_funcs=letters,
        args=GRPOConfig(
            output_dir=str(tmp_path), max_steps=16, learning_rate=5e-3, num_generations=4, max_completion_length=12,
            **{**OF_TRL, "per_device_train_batch_size": 16},
        ),
        train_dataset=Dataset.from_dict({"prompt": ["say ", "write "] * 16}),
        processing_class=ByteTokenizer(),
    )  # fmt: skip
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 1, rewards
