"""Settings from flags, YAML files and earlier runs."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from configuration_mini import MiniConfig
from entry_points_mini import ArgumentParser, optional_settings
from helpers.shapes import EVERY_FIELD
from modeling_mini import MiniForCausalLM
from shape_mini import PRESETS, MiniShape, option
from training_mini.arguments import SHAPE as SHAPE_FIELDS
from training_mini.arguments import Arguments, default_run_name, parse_arguments

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_no_arguments_is_the_tiny_configuration_file() -> None:
    assert parse_arguments([]) == parse_arguments(["--config", str(CONFIGS[-1].with_name("tiny.yaml"))])


def test_there_is_a_configuration_for_each_size() -> None:
    assert {path.stem for path in CONFIGS if not path.stem.startswith("shakespeare")} == set(PRESETS)


def test_the_recipes_for_tiny_shakespeare_have_the_size_of_nanogpts() -> None:
    """0.80M and 10.65M parameters; a context of at most 256, and all that is held out is evaluated."""
    for name, most in (("shakespeare_char", 0.80e6), ("shakespeare_char_gpu", 10.66e6)):
        arguments = parse_arguments(["--config", str(CONFIGS[0].with_name(f"{name}.yaml"))])
        config = arguments.model.model_config(vocab_size=73)
        parameters = MiniForCausalLM(config).num_parameters()
        assert 0.8 * most < parameters < most and config.max_position_embeddings <= 256
        assert arguments.monitoring.max_eval_tokens == 0 and arguments.data.validation_ratio == 0.1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_files(path: Path) -> None:
    arguments = parse_arguments(["--config", str(path)])
    assert arguments.model.size == path.stem or path.stem.startswith("shakespeare")


def test_every_setting_of_a_file_is_explained_where_it_stands() -> None:
    for path in (*CONFIGS, *CONFIGS[0].parent.glob("accelerate/*.yaml")):
        for line in path.read_text().splitlines():
            assert not line or "# " in line, f"{path.name}: a setting without its reason: {line}"


def test_a_folder_does_not_hide_the_configuration_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()  # a run, say
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["--config", "small"]).model.size == "small"


def test_small_configuration_is_the_full_default_run() -> None:
    arguments = parse_arguments(["--config", str(CONFIGS[-1].with_name("small.yaml"))])
    config = arguments.model.model_config()
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (6, 256, 8)
    assert config.max_position_embeddings == 256
    assert (arguments.optimization.train_batch_size, arguments.optimization.max_steps) == (32, 10_000)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('learning_rate: 1e-3\nqk_norm: true\nsample_prompts: ["x\\ny", "z"]\n')
    arguments = parse_arguments(["--config", str(tmp_path / "a.yaml"), "--learning_rate", "5e-4"])
    assert arguments.optimization.learning_rate == 5e-4 and arguments.model.qk_norm is True
    assert arguments.monitoring.sample_prompts == ["x\ny", "z"]


def test_saved_settings_are_read_back(tmp_path: Path) -> None:
    flags = ["--size", "small", "--qk_norm", "--dataset", "päth:x.txt", "--bf16", "false"]
    flags += ["--sample_prompts", "one", "two words", "--report_to", "tensorboard"]
    arguments = parse_arguments(flags)
    arguments.save(tmp_path / "config.yaml")
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")]) == arguments


def test_settings_that_cannot_be_written_leave_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, or killed just before the file is complete."""
    path = tmp_path / "config.yaml"
    parse_arguments(["--seed", "1"]).save(path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        parse_arguments(["--seed", "2"]).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_settings_that_were_cut_short_are_refused_on_resume(share: float, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    parse_arguments(["--max_steps", "40", "--warmup_steps", "2"]).save(path)
    text = path.read_text()
    assert parse_arguments(["--resume", "--output_dir", str(tmp_path)]).optimization.max_steps == 40
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(ValueError, match=r"config\.yaml is empty or cut short"):
        parse_arguments(["--resume", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "warmup", "decay"),
    [("--max_steps 1200", 100, 240), ("--max_steps 20", 2, 4), ("--max_steps 1", 0, 0)]
    + [("--max_steps 20 --warmup_steps 18", 18, 2), ("--max_steps 3 --warmup_steps 2", 2, 1)],
)
def test_settings_that_nobody_gave_fit_the_length_of_the_run(flags: str, warmup: int, decay: int) -> None:
    optimization = parse_arguments([*flags.split(), "--lr_scheduler_type", "wsd"]).optimization
    assert (optimization.warmup_steps, optimization.decay_steps) == (warmup, decay)


def test_model_settings_reach_the_configuration() -> None:
    flags = "--size small --hidden_size 128 --norm_type rmsnorm --qk_norm --attention_dropout 0.1 --head_dim 64"
    config = parse_arguments(flags.split()).model.model_config(vocab_size=300)
    expected = MiniConfig.preset(
        "small", hidden_size=128, norm_type="rmsnorm", qk_norm=True, attention_dropout=0.1, head_dim=64, vocab_size=300
    )
    assert config == expected


SHAPE = {name: EVERY_FIELD[name] for name in SHAPE_FIELDS}


@pytest.mark.parametrize("source", ["flags", "yaml"])
def test_every_field_of_the_shape_is_a_flag_that_arrives_in_the_configuration(source: str, tmp_path: Path) -> None:
    default = MiniConfig.preset("tiny")
    if source == "flags":
        argv = [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in SHAPE.items()]
    else:
        (tmp_path / "shape.yaml").write_text(yaml.safe_dump(SHAPE))
        argv = ["--config", str(tmp_path / "shape.yaml")]
    arguments = parse_arguments(argv)
    arguments.model.model_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name, value in SHAPE.items():
        assert getattr(default, name) != value == saved[name], name
    arguments.save(tmp_path / "config.yaml")
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")]) == arguments


def test_a_field_added_to_the_shape_becomes_a_flag_with_its_help_and_its_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @dataclass(kw_only=True)
    class Stranger(MiniShape):
        num_eyes: int = option(2, "how many eyes it has", at_least=1)
        is_blue: bool = option(False, "whether it is blue")

    parser = ArgumentParser(optional_settings("StrangeSettings", Stranger), prog="p")
    (given,) = parser.parse(["--num_eyes", "3", "--is_blue"])
    assert (given.num_eyes, given.is_blue, given.hidden_size) == (3, True, None)
    with pytest.raises(ValueError, match=r"^num_eyes must be at least 1, got 0\.$"):
        parser.parse(["--num_eyes", "0"])
    with pytest.raises(SystemExit):
        parser.parse(["--help", "all"])
    assert "how many eyes it has (default: 2)" in " ".join(capsys.readouterr().out.split())


def test_a_seed_that_numpy_does_not_take_is_refused() -> None:
    assert parse_arguments(["--seed", str(2**32 - 1)]).run.seed == 2**32 - 1
    with pytest.raises(ValueError, match=r"^seed must be .*4294967296.*, got 4294967296\.$"):
        parse_arguments(["--seed", str(2**32)])


def test_rope_parameters_are_read_as_a_mapping() -> None:
    for text in (
        "{rope_type: linear, rope_theta: 1e4, factor: 2}",
        '{"rope_type":"linear","rope_theta":1E4,"factor":2}',
    ):
        rope = parse_arguments(["--rope_parameters", text]).model.model_config().rope_parameters
        assert rope == {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2}
    for text in ("linear", "[1, 2]", "{a", "3"):
        with pytest.raises(ValueError, match="expected a mapping"):
            parse_arguments(["--rope_parameters", text])
    with pytest.raises(ValueError, match=r"rope_parameters: factor must be finite, got nan\.$"):
        parse_arguments(["--rope_parameters", "{rope_type: linear, rope_theta: 1e4, factor: .nan}"])


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("python-stdlib", "tiny-python-stdlib"), ("a/b/data.txt.gz", "tiny-data"), ("x/", "tiny-x"), ("*", "tiny-data")],
)
def test_default_run_name(dataset: str, name: str) -> None:
    arguments = parse_arguments(["--dataset", dataset])
    assert isinstance(arguments, Arguments) and default_run_name(arguments) == name


def test_default_run_name_of_the_box() -> None:
    """As the card of the box names it."""
    arguments = parse_arguments(["--model", "box", "--dataset", "python-questions", "--lora_r", "8"])
    assert default_run_name(arguments) == "box-python-questions-lora"


def test_new_models_are_made_for_learning_and_older_runs_go_on_as_they_were(tmp_path: Path) -> None:
    model = parse_arguments([]).model
    assert (model.norm_type, model.qk_norm) == ("rmsnorm", True)
    assert parse_arguments(["--norm_type", "layernorm", "--qk_norm", "false"]).model.norm_type == "layernorm"
    path = tmp_path / "config.yaml"
    parse_arguments(["--seed", "1"]).save(path)
    resume = ["--resume", "--output_dir", str(tmp_path)]
    assert parse_arguments(resume).model == model
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith(("norm_type", "qk_norm"))))
    older = parse_arguments(resume).model
    assert (older.norm_type, older.qk_norm) == ("layernorm", False)


def test_a_prompt_that_is_no_text_is_refused_before_anything_is_learned() -> None:
    """As the shell hands over what was typed in another encoding."""
    with pytest.raises(ValueError, match=r"^sample_prompts has 'gr\\udcfcn', which is not valid UTF-8\.$"):
        parse_arguments(["--sample_prompts", "red", os.fsdecode(b"gr\xfcn")])
