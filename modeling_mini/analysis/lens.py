"""What each layer would have said: the head, applied to the residual stream on its way through the layers."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

# What the decoders of transformers call the norm before the head.
FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """
    The norm that a model applies before its head.

    Raises:
        ValueError: if it has none under a name that is known here.
    """
    decoder = model.get_decoder()
    for name in FINAL_NORMS:
        if isinstance(getattr(decoder, name, None), nn.Module):
            return getattr(decoder, name)
    raise ValueError(f"{type(decoder).__name__} has no final norm under a known name ({', '.join(FINAL_NORMS)}).")


@torch.no_grad()
def logit_lens(
    model: PreTrainedModel, hidden_states: tuple[torch.Tensor, ...], logits: torch.Tensor, position: int = -1
) -> torch.Tensor:
    """
    The log-probabilities, `(layers + 1, vocab_size)` in nats, of the token after one position, as the embedding and
    each layer would have them: final norm and head on the residual stream there (the "logit lens" of nostalgebraist,
    2020). The last row is what the model itself says.

    Args:
        hidden_states: of a call with `output_hidden_states=True` on one text: `(1, length, hidden_size)` each.
        logits: of the same call, `(1, length, vocab_size)`.

    Raises:
        ValueError: see `final_norm`.
    """
    # transformers' last hidden state has been through the norm already.
    streams = torch.stack([states[0, position] for states in hidden_states[:-1]])
    early = model.get_output_embeddings()(final_norm(model)(streams))
    return F.log_softmax(torch.cat((early.float(), logits[:1, position].float())), dim=-1)
