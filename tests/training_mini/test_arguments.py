"""Settings from flags, YAML files and earlier runs."""

import errno
import os
from pathlib import Path

import pytest
from configuration_mini import PRESETS, MiniConfig
from training_mini.arguments import Arguments, default_run_name, parse_arguments

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_no_arguments_is_the_tiny_configuration_file() -> None:
    assert parse_arguments([]) == parse_arguments(["--config", str(CONFIGS[-1].with_name("tiny.yaml"))])


def test_there_is_a_configuration_for_each_size() -> None:
    assert {path.stem for path in CONFIGS} == set(PRESETS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_files(path: Path) -> None:
    arguments = parse_arguments(["--config", str(path)])
    assert arguments.model.size == path.stem
    for line in path.read_text().splitlines():
        is_common = line.split(":")[0] in {"dataset", "tokenizer"} or line.split(":")[0] in repeated_names()
        assert not line or "#" in line or is_common, f"{path.name}: a setting without its reason: {line}"


def repeated_names() -> set[str]:
    """Settings that tiny.yaml explains."""
    return {line.split(":")[0] for line in CONFIGS[-1].with_name("tiny.yaml").read_text().splitlines() if ":" in line}


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


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("python-stdlib", "tiny-python-stdlib"), ("a/b/data.txt.gz", "tiny-data"), ("x/", "tiny-x"), ("*", "tiny-data")],
)
def test_default_run_name(dataset: str, name: str) -> None:
    arguments = parse_arguments(["--dataset", dataset])
    assert isinstance(arguments, Arguments) and default_run_name(arguments) == name
