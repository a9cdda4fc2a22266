"""The samples that a model writes during training."""

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from .data.corpus import Corpus


def write_samples(
    model: PreTrainedModel, corpus: Corpus, prompts: list[tuple[str, list[int]]], max_length: int, seed: int
) -> list[dict[str, str]]:
    """A sample for each prompt, of at most `max_length` tokens with the prompt. The model does not change."""
    samples = []
    was_training = model.training
    model.eval()
    # A compiled model would compile again for the shape of each prompt.
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
            # In a conversation, special tokens show who speaks.
            text = corpus.tokenizer.decode(output[0], skip_special_tokens=not corpus.is_chat)
            samples.append({"prompt": prompt, "text": text})
    model.train(was_training)
    return samples
