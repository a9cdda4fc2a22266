"""What a model in training writes."""

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from .data.corpus import Corpus


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
                min_new_tokens=corpus.min_new_tokens(max_length - ids.shape[1]),
            )
            # The form of a conversation is in its special tokens.
            text = corpus.tokenizer.decode(output[0], skip_special_tokens=not corpus.is_chat)
            samples.append({"prompt": prompt, "text": text})
    model.train(was_training)
    return samples
