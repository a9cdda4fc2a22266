"""The heads beside the causal one: what they compute, and that every checkpoint loads as every class."""

import os
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from configuration_mini import MiniConfig
from helpers import fork_server
from modeling_mini import (
    MiniForCausalLM,
    MiniForQuestionAnswering,
    MiniForSequenceClassification,
    MiniForTokenClassification,
    MiniModel,
    MiniPreTrainedModel,
)
from modeling_mini.remote_code import AUTO_MAP
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

CLASSES = {
    AutoModel: MiniModel,
    AutoModelForCausalLM: MiniForCausalLM,
    AutoModelForSequenceClassification: MiniForSequenceClassification,
    AutoModelForTokenClassification: MiniForTokenClassification,
    AutoModelForQuestionAnswering: MiniForQuestionAnswering,
}
# What each class has on top of MiniModel; the head of the causal model is tied to the embedding, so never missing.
HEADS = {
    "MiniModel": set(),
    "MiniForCausalLM": set(),
    "MiniForSequenceClassification": {"score.weight"},
    "MiniForTokenClassification": {"score.weight", "score.bias"},
    "MiniForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
}
LENGTH = 6


def tiny_config(**fields) -> MiniConfig:
    return MiniConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **fields)


def random_ids(batch: int) -> torch.Tensor:
    """Ids without padding, (batch, LENGTH)."""
    return torch.randint(8, 264, (batch, LENGTH))


def test_every_class_has_its_auto_class() -> None:
    for auto_class, model_class in CLASSES.items():
        assert type(auto_class.from_config(tiny_config())) is model_class
        assert AUTO_MAP[auto_class.__name__] == f"modeling_mini.{model_class.__name__}"


@pytest.mark.parametrize("model_class", CLASSES.values(), ids=lambda model_class: model_class.__name__)
def test_body_is_the_same_model(model_class: type[MiniPreTrainedModel]) -> None:
    model = model_class(tiny_config()).eval()
    ids = random_ids(2)
    alone = MiniModel(model.config).eval()
    alone.load_state_dict(model.base_model.state_dict())
    with torch.no_grad():
        expected = alone(ids, output_hidden_states=True).hidden_states
        actual = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_reads_the_last_token(side: str) -> None:
    model = MiniForSequenceClassification(tiny_config(num_labels=3)).eval()
    ids = random_ids(2)
    padding = torch.full((2, 3), model.config.pad_token_id)
    tensors = (padding, ids) if side == "left" else (ids, padding)
    padded, mask = torch.cat(tensors, dim=1), torch.cat([(t != model.config.pad_token_id).long() for t in tensors], 1)
    with torch.no_grad():
        expected = model.score(model.model(ids).last_hidden_state[:, -1])
        torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, expected)
    assert expected.shape == (2, 3)


def test_losses_are_those_of_the_task() -> None:
    cross_entropy = torch.nn.functional.cross_entropy
    ids = random_ids(3)

    sequence = MiniForSequenceClassification(tiny_config(num_labels=3)).eval()
    labels = torch.tensor([0, 2, 1])
    output = sequence(ids, labels=labels)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits, labels))

    token = MiniForTokenClassification(tiny_config(num_labels=3)).eval()
    labels = torch.randint(0, 3, ids.shape)
    labels[:, 0] = -100
    output = token(ids, labels=labels)
    assert output.logits.shape == (3, LENGTH, 3)
    torch.testing.assert_close(output.loss, cross_entropy(output.logits.flatten(0, 1), labels.flatten()))

    answer = MiniForQuestionAnswering(tiny_config()).eval()
    start, end = torch.tensor([0, 1, 2]), torch.tensor([2, 3, 5])
    output = answer(ids, start_positions=start, end_positions=end)
    assert output.start_logits.shape == output.end_logits.shape == (3, LENGTH)
    expected = (cross_entropy(output.start_logits, start) + cross_entropy(output.end_logits, end)) / 2
    torch.testing.assert_close(output.loss, expected)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint from each class, under its name, all with the same body."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    body = MiniModel(tiny_config(num_labels=3))
    for model_class in CLASSES.values():
        model = model_class(body.config)
        model.base_model.load_state_dict(body.state_dict())
        model.save_pretrained(folder / model_class.__name__)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("saved", CLASSES.values(), ids=lambda model_class: f"saved {model_class.__name__}")
@pytest.mark.parametrize("auto_class", CLASSES, ids=lambda auto_class: f"loaded {auto_class.__name__}")
def test_every_checkpoint_loads_as_every_class(checkpoints: Path, saved: type, auto_class: type) -> None:
    model, report = auto_class.from_pretrained(checkpoints / saved.__name__, output_loading_info=True)
    assert type(model) is CLASSES[auto_class]
    new, old = HEADS[type(model).__name__], HEADS[saved.__name__]
    # Both classifications call their layer `score`; where one has a bias and the other none, that is the difference.
    assert set(report["missing_keys"]) == new - old
    assert set(report["unexpected_keys"]) == old - new
    body = MiniModel.from_pretrained(checkpoints / "MiniModel").state_dict()
    torch.testing.assert_close(model.base_model.state_dict(), body, rtol=0, atol=0)


LOAD_ALL = """
    import importlib.util
    import os
    import sys
    from pathlib import Path

    import torch
    import transformers.generation.utils
    import transformers.modeling_layers
    import transformers.models.auto.modeling_auto

    assert importlib.util.find_spec("modeling_mini") is None and importlib.util.find_spec("configuration_mini") is None
    checkpoints, again, saved_names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split()
    ids = torch.tensor([[1, 80, 81, 82]])
    for saved in saved_names:
        # Each in a process of its own, in which nothing has been loaded; the imports are the same for all.
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0, saved
            continue
        hidden_states = []
        for name, expected in zip(sys.argv[4::2], sys.argv[5::2]):
            auto_class = getattr(transformers, name)
            model = auto_class.from_pretrained(checkpoints / saved, trust_remote_code=True)
            assert type(model).__name__ == expected, type(model)
            # What was loaded saves itself the same way, and loads once more.
            model.save_pretrained(again / saved)
            model = auto_class.from_pretrained(again / saved, trust_remote_code=True).eval()
            with torch.no_grad():
                hidden_states.append(model(ids, output_hidden_states=True).hidden_states[-1])
            print(saved, "loaded as", expected)
        assert all(torch.equal(hidden_states[0], other) for other in hidden_states[1:])
        break
"""


@pytest.mark.slow
def test_every_checkpoint_loads_where_mini_is_not_installed(checkpoints: Path, tmp_path: Path) -> None:
    pairs = [name for auto_class, cls in CLASSES.items() for name in (auto_class.__name__, cls.__name__)]
    classes = [model_class.__name__ for model_class in CLASSES.values()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        # -I: neither the current folder nor the user's packages; what pip installed remains.
        [fork_server.python(), "-I", "-c", textwrap.dedent(LOAD_ALL), checkpoints, tmp_path, " ".join(classes), *pairs],
        env={**environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{saved} loaded as {cls}" for saved in classes for cls in classes]
