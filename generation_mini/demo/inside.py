"""What happens within a model before it writes one token: where it looks, and what each layer would have said."""

from typing import Any

import torch
from modeling_mini.analysis.attention import eager_attention
from modeling_mini.analysis.lens import logit_lens

from ..text_generation import context_of
from .writing import Author, pieces_of


@torch.inference_mode()
def look_inside(author: Author, ids: list[int], token_id: int) -> dict[str, Any]:
    """
    One forward over what came before a token, ready for JSON.

    Returns:
        `pieces`: the text that the model read, with the number of tokens of each; `attention`: the weights of the last
        position on all, (layers, heads, tokens), or nothing for a model that returns none; `lens`: for the embedding
        and each layer the likeliest token, its probability, and that of `token_id`; `notice`: what is missing and why.
    """
    model = author.model
    ids = ids[-context_of(model) :]
    with author.lock, eager_attention(model):
        outputs = model(
            input_ids=torch.tensor([ids], device=model.device), output_attentions=True, output_hidden_states=True,
            use_cache=False,
        )  # fmt: skip
        notice, lens = "", []
        try:
            probabilities = logit_lens(model, outputs.hidden_states, outputs.logits).exp()
            best, best_ids = probabilities.max(dim=-1)
            columns = best_ids.tolist(), best.tolist(), probabilities[:, token_id].tolist()
            lens = [
                {"text": author.label(i), "probability": round(p, 6), "chosen": round(chosen, 6)}
                for i, p, chosen in zip(*columns, strict=True)
            ]
        except ValueError as error:
            notice = str(error)
    maps = getattr(outputs, "attentions", None) or ()  # recurrent models have none
    weights = [layer[0, :, -1].float() for layer in maps if layer is not None]
    if not weights:
        notice = f"{type(model).__name__} returns no attention weights."
    tokens = [{"id": each, "text": author.label(each)} for each in ids]
    return {
        "pieces": [
            {"text": piece["text"] or piece["tokens"][-1]["text"], "tokens": len(piece["tokens"])}
            | ({} if piece["text"] else {"special": True})
            for piece in pieces_of(author, tokens)
        ],
        "attention": [[[round(w, 4) for w in head] for head in layer.tolist()] for layer in weights],
        "lens": lens,
        "notice": notice,
    }
