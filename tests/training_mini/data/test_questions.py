"""Conversations about the standard library."""

import functools
from pathlib import Path

import pytest
from training_mini.data import questions
from training_mini.data.questions import Definition, definitions_in, python_questions

SOURCE = '''"""What the module is for.

More of it."""

def add(a, b=1, *, c: int = 2):
    """Add two
    numbers.

    Details.
    """

def _private():
    """Hidden."""

def silent():
    pass

class Shape:
    """A form."""

    def area(self, unit, /):
        """Its area."""

    @classmethod
    def of(cls, name):
        """Make one."""
'''


def test_definitions_are_those_with_a_docstring(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    assert list(definitions_in(tmp_path / "a.py", "pack.a")) == [
        Definition("pack.a", "What the module is for."),
        Definition("pack.a.add", "Add two numbers.", "pack.a.add(a, b=1, *, c: int=2)"),
        Definition("pack.a.Shape", "A form."),
        Definition("pack.a.Shape.area", "Its area.", "pack.a.Shape.area(unit, /)"),
        Definition("pack.a.Shape.of", "Make one.", "pack.a.Shape.of(name)"),
    ]
    (tmp_path / "wrong.py").write_text("def (")
    assert list(definitions_in(tmp_path / "wrong.py", "wrong")) == []


@pytest.mark.slow
def test_conversations_take_turns_and_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading the library takes seven seconds, and what is drawn from it none.
    read_once = functools.cache(lambda file, module: list(definitions_in(file, module)))
    monkeypatch.setattr(questions, "definitions_in", read_once)
    examples = python_questions()
    assert len(examples) > 3000 and examples == python_questions()
    answers = {}
    for example in examples:
        messages = example["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert len(messages) in (2, 4)
        answers |= {messages[i]["content"]: messages[i + 1]["content"] for i in range(0, len(messages), 2)}
    about = [answer for question, answer in answers.items() if "os.path.join" in question]
    assert about and any(
        answer.startswith("Join two or more pathname components") or answer == "os.path.join(a, *p)" for answer in about
    )
