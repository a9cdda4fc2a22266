"""Comparing runs: which are one setting, what differs, and what has to be said beside the figures."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import save_file
from training_mini import compare as compare_module
from training_mini.compare import RunRecord, differing_settings, grouped, main, notes_on, table_of

SETTINGS = {"size": "tiny", "dataset": "sample", "max_steps": 40, "learning_rate": 0.02, "save_steps": 10}


def make_run(folder: Path, *bits: float, parameters: int | None = 1000, **settings: object) -> Path:
    """A run of 40 steps with evaluations after 20 and 40; without `parameters`, one of an older version."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "seed": 1, **settings}))
    lines = [{"step": 0, "seconds": 0.5, "parameters": parameters}] if parameters is not None else []
    for step, value in zip((20, 40), bits, strict=False):
        line = {"step": step, "loss": 1.0, "tokens_per_second": 100.0 + step}
        if parameters is not None:
            line |= {"tokens": step * 64, "seconds": step / 2}
        lines += [line, {"step": step, "eval_bits_per_byte": value}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def shown(*folders: Path) -> tuple[str, list[str]]:
    groups = grouped([RunRecord(folder) for folder in folders])
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table_of(groups))
    return console.export_text(), notes_on(groups)


def test_seeds_of_one_setting_are_one_row_with_mean_and_spread(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", 3.0, bits, seed=seed) for seed, bits in ((1, 2.0), (2, 2.2), (3, 2.4))]
    # What is logged or kept is no other setting.
    runs.append(make_run(tmp_path / "b", 2.1, 2.5, learning_rate=0.04, save_steps=20))
    groups = grouped([RunRecord(run) for run in runs])
    assert [len(group.runs) for group in groups] == [3, 1]
    assert differing_settings(groups) == ["learning_rate"]
    table, notes = shown(*runs)
    assert "a1 (seeds 1, 2, 3)" in table and "2.2000 ± 0.2000" in table
    assert "learning_rate 0.02" in table and "learning_rate 0.04" in table and "max_steps" not in table
    row = next(line for line in table.splitlines() if line.strip().startswith("b "))
    assert "2.5000" in row and "2.1000" in row, "the last and the best"
    assert "130" in row and "0:20" in row and "0.00M" in row
    assert notes == []


@pytest.mark.slow
def test_runs_of_one_seed_are_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions of Mini with the settings of one file, say: their mean says nothing, and their spread even less."""
    runs = [make_run(tmp_path / "old" / f"a-seed-{seed}", 2.0 + seed / 10, seed=seed) for seed in (1, 2)]
    runs += [make_run(tmp_path / "new" / f"a-seed-{seed}", 1.0 + seed / 10, seed=seed) for seed in (1, 2)]
    runs += [make_run(tmp_path / "old" / "b", 3.0)]
    console = Console(width=200, record=True, file=io.StringIO())
    monkeypatch.setattr(compare_module, "console", console)
    monkeypatch.chdir(tmp_path)
    main([*(str(run.relative_to(tmp_path)) for run in runs), str(runs[0]), "old/../old/b"])
    rows = [" ".join(line.split()) for line in console.export_text().splitlines()]
    for name, figure in (("old/a", "2.1500"), ("new/a", "1.1500")):
        (row,) = (row for row in rows if row.startswith(f"{name} (seeds 1, 2) "))
        assert f" {figure} ± 0.0707" in row
    (row,) = (row for row in rows if row.startswith("b "))
    assert " 3.0000" in row and "±" not in row


def test_what_makes_figures_incomparable_is_said(tmp_path: Path) -> None:
    small = make_run(tmp_path / "small", 3.0, 2.0)
    large = make_run(tmp_path / "large", 3.0, 1.9, parameters=1500, size="small")
    other = make_run(tmp_path / "other", 3.0, dataset="python-stdlib")
    _, notes = shown(small, large)
    assert notes == ["The models are of different sizes: large has 1.50 times the parameters of small."]
    _, notes = shown(small, other)
    assert "different text (dataset differ)" in notes[0] and "cannot be compared" in notes[0]
    assert notes[1] == "other stands at step 20 of 40."
    _, notes = shown(make_run(tmp_path / "new"))
    assert notes == ["new has no evaluation yet."]


def test_an_older_run_lacks_fields_and_is_shown(tmp_path: Path) -> None:
    older = make_run(tmp_path / "older", 3.0, 2.0, parameters=None)
    table, _ = shown(older, make_run(tmp_path / "new", 3.0, 1.9, norm_type="rmsnorm"))
    row = next(line for line in table.splitlines() if line.strip().startswith("older"))
    below = table.splitlines()[table.splitlines().index(row) + 1]
    assert below.split() == ["norm_type", "-"] and row.split()[1] == "-" and "2.0000" in row
    assert RunRecord(older).curve("eval_bits_per_byte", "step") == [(20, 3.0), (40, 2.0)]
    assert RunRecord(older).curve("eval_bits_per_byte", "seconds") == []
    (older / "best").mkdir()
    save_file({"a": np.zeros((3, 4)), "b": np.zeros(5)}, older / "best" / "model.safetensors")
    assert RunRecord(older).parameters == 17, "counted in the weights that it left"
    (older / "best" / "model.safetensors").write_bytes(b"cut short")
    assert RunRecord(older).parameters is None


@pytest.mark.slow
def test_many_settings_and_seeds_fit_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"usual": {}, "also-usual": {"hidden_size": 64}, "large-batch": {"train_batch_size": 32}, "plain": {}}
    changes["plain"] = {"optimizer": "adamw", "learning_rate": 0.002, "lr_scheduler_type": "cosine"}
    common = {"optimizer": "muon", "learning_rate": 0.02, "train_batch_size": 16, "hidden_size": 128}
    runs = []
    for name, change in changes.items():
        for seed in (1, 2):
            folder = tmp_path / f"{name}-seed-{seed}"
            runs.append(make_run(folder, 3.0, 2.0 + seed / 10, seed=seed, **{**common, **change}))
    console = Console(width=72, record=True, file=io.StringIO())
    monkeypatch.setattr(compare_module, "console", console)
    main([*map(str, runs), "--out", str(tmp_path / "curves.svg")])
    text = console.export_text()
    assert text.count("2.1500 ± 0.0707") == 4, "each row has its figure"
    assert text.count("learning_rate 0.002") == 1 and text.count("train_batch_size 32") == 1
    assert "large-batch (seeds" in text and "-seed-" not in text
    caption = " ".join(text[text.index("Where a setting is not named:") :].split())
    assert "hidden_size 128, learning_rate 0.02, optimizer muon, train_batch_size 16, lr_scheduler_type -." in caption


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_table_and_picture(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / name, 3.0, 2.0, seed=seed) for seed, name in enumerate("ab")]
    runs.append(make_run(tmp_path / "older", 3.0, 2.0, parameters=None))
    console = Console(width=100, record=True, file=io.StringIO())
    monkeypatch.setattr(compare_module, "console", console)
    out = tmp_path / "pictures" / f"curves.{suffix}"
    main([*map(str, runs), "--out", str(out)])
    assert f"curves.{suffix}" in console.export_text()
    assert out.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert list(out.parent.iterdir()) == [out]


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no run in .*nothing': it has no config\.yaml"):
        main([str(tmp_path / "nothing")])
    run = make_run(tmp_path / "run", 3.0)
    (run / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml does not hold the settings of a run"):
        main([str(run)])
    with pytest.raises(ValueError, match=r"out must end in \.png or \.svg, got 'a\.gif'"):
        main([str(run), "--out", "a.gif"])


def test_names_that_mean_something_to_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are markup for rich, and dollars are formulas for matplotlib, of which some cannot be read."""
    runs = [make_run(tmp_path / "a[bold]", 3.0), make_run(tmp_path / "$b_$", 2.0, dataset="[/c]")]
    main([*map(str, runs), "--out", str(tmp_path / "curves.png")])
    output = capsys.readouterr().out
    assert "a[bold]" in output and "$b_$" in output and "dataset [/c]" in output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_settings_that_somebody_has_changed_by_hand(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 3.0, 2.0), make_run(tmp_path / "b", 3.0, float("nan"), max_steps="many")]
    runs.append(make_run(tmp_path / "c", 3.0, 2.0, dataset=["d"]))
    table, notes = shown(*runs)
    assert "nan" not in table and "max_steps many" in table
    (note,) = notes
    assert note.startswith("These runs were evaluated on different text (dataset differ)")
    (runs[0] / "config.yaml").write_text("5: 3\nseed: 1\n")
    with pytest.raises(ValueError, match="does not hold the settings of a run"):
        RunRecord(runs[0])
