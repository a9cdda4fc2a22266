"""Facts are data, one function makes Markdown of them, and what a person writes stays."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from cards_mini import (
    CARD,
    MARK,
    PLACEHOLDER,
    Card,
    Facts,
    checksum,
    parse_card,
    public_settings,
    read_card,
    render,
    split_sections,
)

CONFIG = {"model_type": "mini", "hidden_size": 64, "max_position_embeddings": 128}
FACTS = Facts(parameters=1000, context=128, dataset="books", step=5, settings={
    "train_batch_size": 8, "learning_rate": 0.01, "seed": 1, "optimizer": "lion",
})  # fmt: skip
# As the trainer wrote them before there were facts in the front matter.
OLD = """---
library_name: transformers
license: mit
---

# Mini, 0.1M parameters

A small decoder-only language model, trained from scratch on `books`.

```python
generator = pipeline("text-generation", model="PATH_OR_REPOSITORY", trust_remote_code=True)
```

| | |
|---|---|
| training | 7 steps of 8 x 64 tokens, AdamW, peak learning rate 0.002, seed 42 |
"""


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_facts_come_back(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(render(FACTS, {"license": "mit"}, CONFIG))
    card = read_card(tmp_path / CARD)
    assert card.metadata == {"license": "mit"} and card.words == {} and not card.is_own
    assert card.facts.written.keys() == card.sections.keys() and "Training" in card.sections
    assert Facts.from_dict({**card.facts.as_dict(), "written": {}}) == FACTS
    assert render(card.facts, card.metadata, CONFIG, card) == (tmp_path / CARD).read_text()
    assert read_card(tmp_path / "none.md") == Card()


def test_an_optimizer_without_a_name_of_its_own() -> None:
    assert "| training | 5 steps of 8 x 128 tokens, lion, peak learning rate 0.01, seed 1 |" in render(
        FACTS, {}, CONFIG
    )


def test_what_is_not_known_is_left_out() -> None:
    card = render(Facts(), {}, {})
    assert list(split_sections(card.split("---\n")[2])) == ["(title)", "How to use", "Limits"]
    assert "None" not in card and "nan" not in card
    unknown = Facts(dataset="books", settings={"seed": 1}, step=3)  # too little for a row of the training
    assert "## Training" not in render(unknown, {}, {})


def test_examples_ask_a_model_that_answers() -> None:
    facts = dataclasses.replace(FACTS, is_chat=True, prompts=["Who?"])
    card = render(facts, {}, CONFIG)
    assert "It answers in turns." in card and f"mini-generate --model {PLACEHOLDER} --interactive\n" in card
    assert card.count('messages = [{"role": "user", "content": "Who?"}]\n') == 2 and 'generator("Who?"' not in card
    for base in ({}, {"base_model_name_or_path": "user/base"}):
        card = render(dataclasses.replace(facts, kind="adapter"), {}, base)
        examples = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
        assert len(examples) == 1 + bool(base) and f"--adapter {PLACEHOLDER} --interactive\n" in card
        for example in examples:  # an answer ends by the settings of the adapter
            compile(example, CARD, "exec")
            assert f'GenerationConfig.from_pretrained("{PLACEHOLDER}")\n' in example and "messages, " in example


@pytest.mark.parametrize("heading", ["Limits", "Training", "(title)", "How to use"])
def test_a_section_that_a_person_changed_stays(heading: str) -> None:
    before = render(FACTS, {}, CONFIG)
    section = split_sections(before.split("---\n")[2])[heading]
    edited = before.replace(section, f"{section}\n\nMy words.")
    for step in (6, 7):
        card = parse_card(edited)
        assert list(card.words) == [heading]
        facts = Facts.from_dict({**card.facts.as_dict(), "step": step, "dataset": "letters"})
        edited = render(facts, card.metadata, CONFIG, card)
        assert edited.count(f"{section}\n\nMy words.") == 1 == edited.count(MARK)
        assert ("`letters`" in edited) and edited.count("| hidden_size |") == 1
        assert edited.count(f"\n## {heading}\n") == (heading != "(title)")


def test_spaces_and_ends_of_lines_change_nothing() -> None:
    card = render(FACTS, {}, CONFIG)
    text = parse_card(card).text.replace("\n", "  \r\n")
    assert parse_card(card.split("---\n\n")[0] + "---\n\n" + text).words == {}
    assert checksum("a\nb") != checksum("a\n\nb")


def test_a_card_that_is_all_a_persons() -> None:
    before = render(FACTS, {}, CONFIG)
    mine = parse_card(before.split("\n# ")[0] + "\nMine.\n\n\n## How to use\n\nAsk me.")
    assert mine.is_own and mine.facts.step == 5
    after = render(mine.facts, mine.metadata, CONFIG, mine)
    assert after.endswith("---\n\nMine.\n\n\n## How to use\n\nAsk me.\n") and front(after)["mini"]["dataset"] == "books"
    assert not parse_card("---\na: 1\n---\n# A title\n").is_own
    assert parse_card("No front matter").is_own
    for words in ("Mine.", "- mine"):
        ruled_off = f"---\n\n{words}\n\n---\n\nMore.\n"
        mine = parse_card(ruled_off)
        assert mine.is_own and mine.metadata == {} and mine.text == ruled_off, "words between two rules"
        assert words in render(FACTS, {}, CONFIG, mine)
    assert parse_card("---\n# nothing but a comment\n---\nMine.\n").text == "Mine.\n"


def test_a_card_from_before_there_were_facts() -> None:
    old = parse_card(OLD)
    assert not old.is_own and old.words == {} and old.facts == Facts()
    card = render(FACTS, old.metadata, CONFIG, old)
    assert "7 steps" not in card and "5 steps" in card and front(card)["license"] == "mit"
    noted = parse_card(f"{OLD}\n## Notes\n\nBaa.\n\n## Training\n\n| training | 7 steps |\n")
    assert list(noted.words) == ["Notes"]
    card = render(Facts(), noted.metadata, CONFIG, noted)
    assert "## Notes\n\nBaa." in card and "## Training\n\n| training | 7 steps |" in card, "nothing newer is known"
    assert "7 steps" not in render(FACTS, noted.metadata, CONFIG, noted)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ("3", "mini must hold lines of the form 'name: value'"),
        ("{step: many}", "mini.step has a value of another type"),
        ("{written: [a]}", "mini.written has a value of another type"),
        ("{settings: 3}", "mini.settings has a value of another type"),
    ],
)
def test_facts_that_somebody_damaged(facts: str, words: str, tmp_path: Path) -> None:
    text = f"---\nmini: {facts}\n---\n# A\n"
    (tmp_path / CARD).write_text(text)
    with pytest.raises(ValueError, match=f"The metadata of .*{CARD} cannot be read: {words}"):
        read_card(tmp_path / CARD)
    assert parse_card(text).facts == Facts(), "on the Hub nobody can set it right now"


def test_facts_of_a_later_version_are_passed_over() -> None:
    assert parse_card("---\nmini:\n  step: 3\n  colour: red\n---\n").facts == Facts(step=3)


def test_settings_that_anybody_may_read(tmp_path: Path) -> None:
    settings = {"dataset": str(tmp_path), "cache_dir": "x", "seed": 1, "sample_prompts": ["~/a/b", "def "], "tag": ""}
    public = {"dataset": tmp_path.name, "seed": 1, "sample_prompts": ["b", "def "], "tag": ""}
    assert public_settings(settings) == public
    assert public_settings({"sample_prompts": ["a word " * 100]}) == {"sample_prompts": ["a word " * 100]}
    (tmp_path / "mine" / "best").mkdir(parents=True)
    assert public_settings({"model": str(tmp_path / "mine" / "best")}) == {"model": "mine"}, "each run has a best"
    assert public_settings({"model": "/gone/mine"}) == public_settings({"model": "mine"}) == {"model": "mine"}
