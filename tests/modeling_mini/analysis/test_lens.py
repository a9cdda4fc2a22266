"""What each layer would have said."""

import pytest
import torch
from helpers.random_models import make_model
from modeling_mini.analysis.lens import final_norm, logit_lens
from torch.nn import functional as F


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_reads_the_residual_stream_after_each_layer(tied: bool) -> None:
    model = make_model(num_hidden_layers=3, tie_word_embeddings=tied)
    ids = torch.randint(8, 97, (1, 7))
    outputs = model(ids, output_hidden_states=True)
    found = logit_lens(model, outputs.hidden_states, outputs.logits, position=4)
    assert found.shape == (4, 97)
    torch.testing.assert_close(found[-1], F.log_softmax(outputs.logits[0, 4], dim=-1))
    for layers in range(3):
        shorter = make_model(num_hidden_layers=3, tie_word_embeddings=tied)
        shorter.load_state_dict(model.state_dict())
        shorter.config.num_hidden_layers = layers  # the model then leaves out the other layers
        expected = F.log_softmax(shorter(ids).logits[0, 4], dim=-1)
        torch.testing.assert_close(found[layers], expected, atol=1e-5, rtol=1e-5)


def test_a_model_whose_norm_is_not_known() -> None:
    model = make_model()
    model.model.norm_of_another_name = model.model.norm
    del model.model.norm
    with pytest.raises(ValueError, match="MiniModel has no final norm under a known name"):
        final_norm(model)
