"""The settings of a run as one typed object."""

import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.programs import ROOT
from training_mini import TrainingSettings
from training_mini.arguments import GROUPS, parse_arguments


def test_what_is_given_is_what_the_flags_say() -> None:
    settings = TrainingSettings(
        dataset="a.txt", max_steps=50, learning_rate=1e-3, bf16=False, qk_norm=False,
        sample_prompts=["one", "two words"],
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    )  # fmt: skip
    flags = "--dataset a.txt --max_steps 50 --learning_rate 1e-3 --bf16 false --qk_norm false".split()
    flags += ["--sample_prompts", "one", "two words"]
    flags += ["--rope_parameters", "{rope_type: linear, rope_theta: 10000.0, factor: 2.0}"]
    assert settings.arguments() == parse_arguments(flags)
    assert TrainingSettings().arguments() == parse_arguments([])


def test_a_list_is_no_value_of_a_setting_that_takes_one(tmp_path: Path) -> None:
    sentence = r"^dataset takes one value, got \['a.txt', 'b.txt'\]\.$"
    with pytest.raises(ValueError, match=sentence):
        TrainingSettings(dataset=["a.txt", "b.txt"]).arguments()
    (tmp_path / "a.yaml").write_text("dataset: [a.txt, b.txt]\n")
    with pytest.raises(ValueError, match=sentence):
        TrainingSettings(config=str(tmp_path / "a.yaml")).arguments()


def test_a_file_gives_way_to_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-3\nmax_steps: 70\n")
    optimization = TrainingSettings(config=str(tmp_path / "a.yaml"), max_steps=80).arguments().optimization
    assert (optimization.learning_rate, optimization.max_steps) == (1e-3, 80)


def test_a_wrong_name_or_value_is_one_sentence() -> None:
    with pytest.raises(TypeError, match=r"^TrainingSettings has no setting 'lr', did you mean 'learning_rate'\?$"):
        TrainingSettings(lr=1e-3)
    for wrong in ({"max_steps": "many"}, {"dropout_start": 0.1}, {"learning_rate": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainingSettings(**wrong).arguments()


def test_every_setting_is_typed_and_explained() -> None:
    names = {"config", *(field.name for group in GROUPS for field in dataclasses.fields(group))}
    assert {field.name for field in dataclasses.fields(TrainingSettings)} == names
    assert set(inspect.signature(TrainingSettings).parameters) == names
    lines = [line for line in TrainingSettings.__doc__.splitlines() if line.startswith("    ") and "): " in line]
    assert [line.split(" (")[0].strip() for line in lines] == list(inspect.signature(TrainingSettings).parameters)
    assert "    seed (int): decides the initial weights, the order of the data, and dropout (default: 42)" in lines


def test_it_can_be_changed_copied_and_shown() -> None:
    settings = TrainingSettings(size="small", max_steps=3)
    assert repr(settings) == "TrainingSettings(size='small', max_steps=3)"
    assert dataclasses.replace(settings, max_steps=4) == TrainingSettings(size="small", max_steps=4)
    assert pickle.loads(pickle.dumps(settings)) == settings
    settings.max_steps = 5
    assert settings.given() == {"size": "small", "max_steps": 5}


def test_importing_the_package_and_making_settings_loads_no_torch() -> None:
    code = (
        "import sys, training_mini; training_mini.TrainingSettings(size='small').arguments(); "
        "print(training_mini.__all__, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "['TrainingResult', 'TrainingSettings', 'train'] False\n"
