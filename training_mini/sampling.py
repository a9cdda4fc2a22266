"""What a model in training writes, and from which prompts."""

import torch
from accelerate.utils import set_seed
from tokenization import encode_messages
from transformers import PreTrainedModel

from .data.corpus import Corpus
from .evaluation import HeldOut

HELD_OUT_PROMPTS = 2  # examples that a model answers where no prompt was given


def make_prompts(corpus: Corpus, held_out: HeldOut, given: list[str]) -> list[tuple[str, list[int]]]:
    """The text and the ids of each prompt: those that were given, the first held-out examples, or the dataset's own."""
    tokenizer = corpus.tokenizer
    if corpus.kind is not None and not given:
        count = min(HELD_OUT_PROMPTS, len(corpus.validation))
        prompts = [held_out.rows.prompt(number) for number in range(count)]
        return [(tokenizer.decode(ids, skip_special_tokens=True), ids.tolist()) for ids in prompts]
    if corpus.kind == "messages":
        conversations = [[{"role": "user", "content": prompt}] for prompt in given]
        ids = [encode_messages(tokenizer, messages, add_generation_prompt=True)[0] for messages in conversations]
        return list(zip(given, ids, strict=True))
    default = "def " if corpus.name == "python-stdlib" else "\n"
    return [(prompt, tokenizer(prompt).input_ids) for prompt in given or [default]]


def write_samples(
    model: PreTrainedModel, corpus: Corpus, prompts: list[tuple[str, list[int]]], max_length: int, seed: int
) -> list[dict[str, str]]:
    """What the model makes of each prompt, up to `max_length` tokens with the prompt. The model is left as it was."""
    samples = []
    was_training = model.training
    model.eval()
    # Prompts have other shapes than batches, and would be compiled one by one.
    with torch.compiler.set_stance("force_eager"):
        for prompt, prompt_ids in prompts:
            set_seed(seed)
            ids = torch.tensor([prompt_ids[: max_length - 1]], device=model.device)  # (1, prompt)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_length=max_length,
                min_new_tokens=(max_length - ids.shape[1]) // 2 if corpus.kind is None else None,
            )
            # The form of a conversation is in its special tokens.
            text = corpus.tokenizer.decode(output[0], skip_special_tokens=corpus.kind != "messages")
            samples.append({"prompt": prompt, "text": text})
    model.train(was_training)
    return samples
