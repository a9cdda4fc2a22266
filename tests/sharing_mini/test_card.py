"""The card says what is known, and nothing else."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import sharing_mini.card
import yaml
from cards_mini import Facts, read_card, render
from helpers.exports import write_adapter
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from modeling_mini.export import quantized
from modeling_mini.loading.checkpoints import load_model
from modeling_mini.remote_code import ROOT_FILES, remote_code_files
from sharing_mini.arguments import SharingArguments
from sharing_mini.pushing import prompt_of, push
from sharing_mini.staging import Staged, find_source, stage
from sharing_mini.verification import SEED, Proof
from transformers import set_seed


def card_of(source: Path, **settings: object) -> str:
    arguments = SharingArguments(**{"dry_run": True, "no_verify": True, **settings})
    return push(str(source), "user/my-model", arguments, lambda sentence: None).card


def test_every_figure_is_that_of_the_run(quick_run: Path) -> None:
    card = ModelCard(card_of(quick_run, license="apache-2.0"))
    lines = [json.loads(line) for line in (quick_run / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "eval_loss" in line), key=lambda line: line["eval_loss"])
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {
        "bits_per_byte": best["eval_bits_per_byte"], "perplexity": best["eval_perplexity"], "loss": best["eval_loss"],
    }  # fmt: skip
    assert {(each.dataset_type, each.task_type) for each in card.data.eval_results} == {("sample", "text-generation")}
    assert card.data.model_name == "my-model" and card.data.license == "apache-2.0"
    assert (card.data.library_name, card.data.pipeline_tag, card.data.tags) == (
        "transformers",
        "text-generation",
        ["mini"],
    )
    tokens = next(line["tokens"] for line in lines if line["step"] == best["step"] and "tokens" in line)
    assert f"It has read {tokens:,} tokens" in card.text
    for words in (
        f"| Bits per byte, sample, held out | {best['eval_bits_per_byte']:.4f} |", "![Bits per byte", "(curves.png)",
        "| hidden_size | 64 |", "| num_key_value_heads | 1 |", "| training | 40 steps of 8 x 64 tokens, ",
        "## License\n\napache-2.0", "It sees at most 64 tokens", "Its tokens are bytes",
    ):  # fmt: skip
        assert words in card.text, words
    settings = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    config = yaml.safe_load((quick_run / "config.yaml").read_text())
    assert settings.items() <= config.items() and "max_steps" in settings and "cache_dir" not in settings


def test_an_adapter_of_a_run_names_the_merged_model_beside_it(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_adapter(saved, run / "best")
    (run / "config.yaml").write_text("dataset: sample\n")
    arguments = SharingArguments(dry_run=True, no_verify=True, license="mit")
    with pytest.raises(ValueError, match=r"by --base_model user/name\.$"):
        push(str(run), "user/name", arguments, lambda sentence: None)
    shutil.copytree(saved, run / "merged")
    with pytest.raises(ValueError, match=r"user/name\. Or push the merged model instead, .*: '.*run/merged'\.$"):
        push(str(run), "user/name", arguments, lambda sentence: None)
    arguments.base_model = "user/base"
    (notice,) = push(str(run), "user/name", arguments, lambda sentence: None).notices
    assert notice.startswith("This is the adapter alone.") and f"{str(run / 'merged')!r} is the whole model" in notice
    assert push(str(run / "merged"), "user/name", SharingArguments(dry_run=True, no_verify=True, license="mit")).sizes


def test_the_step_of_a_checkpoint_and_no_figure_finds_its_metrics(quick_run: Path, tmp_path: Path) -> None:
    """Two evaluations may give the same loss, and a figure may be rounded on its way."""
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    step = read_card(run / "best" / "README.md").facts.step
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, "eval_loss": 3.0} if "eval_loss" in line else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tokens = next(line["tokens"] for line in lines if line["step"] == step and "tokens" in line)
    assert f"It has read {tokens:,} tokens" in card_of(run)
    facts = ModelCard(card_of(run)).data.to_dict()["mini"]
    assert (facts["step"], facts["tokens"]) == (step, tokens) == (40, 40 * 8 * 64)


@pytest.mark.parametrize(("name", "step"), [("best", 20), ("final", 40)])
def test_a_run_from_before_cards_held_facts(quick_run: Path, tmp_path: Path, name: str, step: int) -> None:
    """Its settings and metrics say what the facts would; the words that somebody added stay."""
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    lines = [{**line, "eval_loss": 1.0} if line["step"] == 20 and "eval_loss" in line else line for line in lines]
    assert {20, 40} <= losses.keys()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    old = "---\nlicense: mit\n---\n# Mini\n\nUse PATH_OR_REPOSITORY.\n\n| training | 7 steps |\n\n## Notes\n\nBaa.\n"
    (run / name / "README.md").write_text(old)
    card = card_of(run / name)
    assert f"| training | {step} steps of 8 x 64 tokens, {settings['optimizer']}, " in card and "7 steps" not in card
    assert f"It has read {step * 8 * 64:,} tokens" in card and "## Notes\n\nBaa." in card and "license: mit" in card


def test_metadata_is_what_the_hub_makes_of_it(quick_run: Path) -> None:
    front = yaml.safe_load(card_of(quick_run).split("---")[1])
    assert "license" not in front and "datasets" not in front and "language" not in front
    name, results = model_index_to_eval_results(front["model-index"])
    assert name == "my-model" and len(results) == 3


def test_missing_facts_are_left_out(model: Path) -> None:
    """A folder that nobody trained, with no card and no run: configuration and code are all that is known."""
    card = card_of(model)
    for absent in (
        "## Data",
        "## Training",
        "## Evaluation",
        "## A sample",
        "## License",
        "## How to rep",
        "None",
        "nan",
    ):
        assert absent not in card, absent
    assert "model-index" not in card and "license" not in card
    assert "## Architecture" in card and "## How to use" in card and "trained on" not in card


def test_parts_of_a_run_that_are_missing(quick_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    (run / "curves.png").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    card = card_of(run)
    assert "curves.png" not in card and "It has read" not in card
    assert "Bits per byte, sample" in card  # that is in the trainer's card
    (run / "best" / "README.md").unlink()
    card = card_of(run)
    assert "## Evaluation" not in card and "## Training" not in card and "Trained on `sample`" in card


def test_no_place_on_a_disk_and_no_name_of_a_person(quick_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    private = {
        "dataset": "/home/user/secret-project/books.txt",
        "tokenizer": "~/private/tokenizer",
        "sample_prompts": ["/home/user/prompt", "def "],
        "cache_dir": "/home/user",
    }
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, **private}))
    card = card_of(run)
    assert "/home" not in card and "~" not in card and "secret-project" not in card
    assert "Trained on `books.txt`" in card and "dataset: books.txt" in card and "`tokenizer`" in card


def test_card_that_was_pushed_and_comes_back(quick_run: Path, tmp_path: Path) -> None:
    """Whoever downloads a model and pushes it elsewhere keeps its facts, and does not get them twice."""
    first = card_of(quick_run, license="mit")
    folder = Path(shutil.copytree(quick_run / "best", tmp_path / "downloaded"))
    (folder / "README.md").write_text(first)
    second = card_of(folder)
    assert ModelCard(second).data.license == "mit"
    assert len(ModelCard(second).data.eval_results) == 3
    assert second.count("Bits per byte, sample") == 1 == second.count("| hidden_size |")
    assert "| training | 40 steps" in second


OWN = "# Counting sheep\n\nI made this for my class.\n\n## How to use\n\nAsk me.\n"


def test_a_card_written_by_hand_stays(model: Path) -> None:
    (model / "README.md").write_text(f"---\ntags: sheep\nlanguage: en\n---\n{OWN}")
    card = ModelCard(card_of(model, license="MIT "))
    assert card.text.strip() == OWN.strip()
    assert (card.data.license, card.data.language, card.data.tags) == ("mit", "en", ["mini", "sheep"])
    arguments = SharingArguments(dry_run=True, no_verify=True)
    notices = push(str(model), "user/my-model", arguments, lambda sentence: None).notices
    assert "README.md is somebody's own: its text stays, and its metadata are completed." in notices


def test_sections_that_somebody_added_stay(quick_run: Path, tmp_path: Path) -> None:
    """To a card of the trainer, and once more to what a push made of it; figures in them are no facts of the model."""
    folder = Path(shutil.copytree(quick_run / "best", tmp_path / "model"))
    note = "## Notes\n\n| sheep | 7 |\n\n```text\n## How to use\n```\n\nBaa."
    (folder / "README.md").write_text(f"{(folder / 'README.md').read_text()}\n{note}\n")
    for _ in range(2):
        card = card_of(folder)
        assert card.count(note) == 1 and card.count("| sheep | 7 |") == 1
        assert card.count("\n## How to use\n\n") == 1 and card.count("## Limits") == 1
        (folder / "README.md").write_text(card)


def test_a_quantized_copy_does_not_pass_on_figures_without_a_word(quick_run: Path, tmp_path: Path) -> None:
    quantized.run([str(quick_run), str(tmp_path / "int8"), "--load_in_8bit"])
    card = card_of(tmp_path / "int8")
    assert "| Bits per byte, sample, held out |" in card
    assert card.index("Figures above are those of the model before.") > card.index("| Bits per byte, sample")


def test_an_export_that_was_pushed_and_comes_back(quick_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    first = card_of(quick_run, format="gguf", license="mit")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text(first)
    second = card_of(tmp_path)
    for heading in ("## License", "## Evaluation", "# Mini for llama.cpp"):
        assert first.count(heading) == second.count(heading) == 1, heading


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("best/README.md", b"---\na: [\n---\n", r"The metadata of .*best/README\.md cannot be read"),
        ("best/README.md", b"---\nmodel-index: 3\n---\n", r"The metadata of .*model_index.*not iterable\.$"),
        ("best/README.md", b"\xff", r"best/README\.md is not valid UTF-8 \(invalid start byte at byte 0\)"),
        ("config.yaml", b": [", r"config\.yaml is not valid YAML"),
        ("config.yaml", b"- a", r"config\.yaml must hold lines of the form"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    quick_run: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        card_of(run)


def test_damaged_lines_of_a_run_are_passed_over(quick_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    before = card_of(run)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n3\n\n{"step": 40, "eval_loss": NaN}\n{"loss": 1}\n\xff\n{"step": 41, "lo')
    assert card_of(run) == before and "It has read" in before
    (run / "samples.jsonl").write_bytes(b'{"prompt": "A"}\n[1]\n3\n{"prompt": 3}\n\xff')
    assert prompt_of(run) == "A"
    (run / "samples.jsonl").write_text('{"prompt": "A"}\n{"prompt": "B\u2028C"}\n')
    assert prompt_of(run) == "B\u2028C", "which is no end of a line"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {},
            "; a share of 0.1 of it was held out for the evaluation below, which reads at most the first 8,192 tokens",
        ),
        ({"max_eval_tokens": 0}, "; a share of 0.1 of it was held out for the evaluation below. It has read"),
        (
            {"streaming": True},
            "; its first documents, of 8,192 tokens together, were held out for the evaluation below.",
        ),
    ],
)
def test_what_was_held_out(quick_run: Path, tmp_path: Path, fields: dict[str, object], words: str) -> None:
    run = Path(shutil.copytree(quick_run, tmp_path / "run"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**settings, **fields}))
    assert words in card_of(run)


def test_a_folder_beside_somebody_elses_configuration_is_no_run(model: Path) -> None:
    (model.parent / "config.yaml").write_text("dataset: other\n")
    assert "other" not in card_of(model)


def test_sample_is_quoted_whatever_is_in_it(quick_run: Path, tmp_path: Path) -> None:
    source = find_source(str(quick_run))
    staged = stage(source, tmp_path)
    gathered = sharing_mini.card.gather(source, staged)
    proof = Proof("def ", [1], [0.0], "def f():\n```\n# Not a heading\n````\n", 66_688)
    sharing_mini.card.write_card(gathered, staged, "user/name", None, proof, None)
    card = (tmp_path / "README.md").read_text()
    assert "`````text\ndef f():\n```\n# Not a heading\n````\n\n`````" in card
    assert "of 66,688 parameters" in card and "Written by these weights after 'def ', with seed 42" in card


@pytest.mark.slow
def test_the_sample_of_a_model_that_answers_is_an_answer(model: Path) -> None:
    facts = Facts(is_chat=True, prompts=["Who?"])
    (model / "README.md").write_text(render(facts, {}, {}))
    loaded, tokenizer = load_model(str(model))
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    set_seed(SEED)
    ids = loaded.generate(**inputs, do_sample=True, max_length=64)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True).replace("\r", "")
    card = card_of(model, no_verify=False)
    assert f"A user's message, and the answer of these weights, with seed {SEED}:" in card
    assert f"text\nuser: Who?\nassistant: {answer}\n```" in card and len(answer) > 5


def test_commit_of_the_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named only where the files are those of the commit."""
    root = tmp_path / "repository"
    (root / "sharing_mini").mkdir(parents=True)
    (root / "modeling_mini").mkdir()
    for name, content in remote_code_files().items():
        place = root / name if name in ROOT_FILES else root / "modeling_mini" / name
        place.write_text(content)
    monkeypatch.setattr(sharing_mini.card, "__file__", str(root / "sharing_mini" / "card.py"))
    staged = Staged(model, "model", {"auto_map": {}})
    assert sharing_mini.card.commit_of_code(staged) is None
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b.c commit -q -m first"):
        subprocess.run(["git", *command.split()], cwd=root, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True)
    assert sharing_mini.card.commit_of_code(staged) == head.stdout.strip()
    (root / "modeling_mini" / "decoding.py").write_text("changed")
    assert sharing_mini.card.commit_of_code(staged) is None
    (root / "modeling_mini" / "decoding.py").write_text(remote_code_files()["decoding.py"])
    (model / "decoding.py").write_text("# older\n")
    assert sharing_mini.card.commit_of_code(staged) is None


def test_license_is_asked_for_where_somebody_can_answer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharing_mini.pushing.sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sharing_mini.pushing.sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sharing_mini.pushing.console.input", lambda question: " CC-BY-4.0 ")
    assert ModelCard(card_of(model)).data.license == "cc-by-4.0"
    monkeypatch.setattr("sharing_mini.pushing.console.input", lambda question: "foo bar")
    with pytest.raises(ValueError, match=r"license must be a name that the Hub knows, .*, got 'foo bar'"):
        card_of(model)
    monkeypatch.setattr("sharing_mini.pushing.console.input", lambda question: "")
    assert ModelCard(card_of(model)).data.license is None
    monkeypatch.setattr("sharing_mini.pushing.sys.stdin", None)  # closed
    monkeypatch.setattr("sharing_mini.pushing.console.input", None)
    assert ModelCard(card_of(model)).data.license is None
