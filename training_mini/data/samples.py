"""Small generated datasets: sentences to learn from, conversations about facts, and comments with lines of Python."""

import random
from collections.abc import Iterator
from typing import Any

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
    "Norway": "Oslo", "Kenya": "Nairobi", "Cuba": "Havana", "Greece": "Athens", "Austria": "Vienna",
}  # fmt: skip
LEGS = {"a spider": "eight", "an ant": "six", "a cat": "four", "a bird": "two", "a snake": "no", "a horse": "four"}
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "a lemon": "yellow"}
BRIEF = "Answer in one word."


def chat_examples() -> list[dict[str, Any]]:
    """
    600 conversations of one or two turns. Most answers are whole sentences. If the system message asks for one word,
    the answer is one word.
    """
    questions = [(f"What is the capital of {a}?", f"The capital of {a} is {b}.", b) for a, b in CAPITALS.items()]
    questions += [
        (f"How many legs has {a}?", f"{a.capitalize()} has {b} legs.", b.capitalize()) for a, b in LEGS.items()
    ]
    questions += [(f"What colour is {a}?", f"The colour of {a} is {b}.", b.capitalize()) for a, b in COLOURS.items()]
    generator = random.Random(0)
    examples = []
    for _ in range(600):
        is_brief = generator.random() < 0.25
        messages = [{"role": "system", "content": BRIEF}] if is_brief else []
        for question, sentence, word in generator.sample(questions, generator.randint(1, 2)):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": word if is_brief else sentence})
        examples.append({"messages": messages})
    return examples


def instruction_examples() -> list[dict[str, Any]]:
    """600 prompts, each a comment that says what to do, with a line of Python as the completion."""
    names = ["items", "words", "names", "lines", "values", "parts", "keys", "rows", "files", "paths"]
    tasks = [
        ("reverse {a}", "{a}.reverse()"),
        ("sort {a}", "{a}.sort()"),
        ("empty {a}", "{a}.clear()"),
        ("count {a}", "len({a})"),
        ("print {a}", "print({a})"),
        ("copy {a} to {b}", "{b} = list({a})"),
        ("add {b} to {a}", "{a}.extend({b})"),
    ]
    generator = random.Random(0)
    examples = []
    for _ in range(600):
        (comment, line), (a, b) = generator.choice(tasks), generator.sample(names, 2)
        examples.append({"prompt": f"# {comment.format(a=a, b=b)}\n", "completion": line.format(a=a, b=b)})
    return examples


def sample_documents() -> Iterator[tuple[str, Iterator[bytes]]]:
    """0.4 MB of generated English sentences and correct sums, enough to see a model learn."""
    generator = random.Random(0)
    subjects = ["the cat", "a small bird", "the old teacher", "my friend", "the river", "a quiet child"]
    verbs = ["sees", "follows", "paints", "remembers", "hears", "finds"]
    objects = ["the moon", "an open window", "a red door", "the last train", "some music", "the way home"]
    times = ["in the morning", "at night", "every day", "after the rain", "once a year"]
    for number in range(500):
        sentences = []
        for _ in range(20):
            if generator.random() < 0.25:
                a, b = generator.randrange(50), generator.randrange(50)
                sentences.append(f"{a} plus {b} is {a + b}.")
            else:
                words = (generator.choice(choices) for choices in (subjects, verbs, objects, times))
                sentences.append(f"{' '.join(words).capitalize()}.")
        yield f"sample {number}", iter([("\n".join(sentences) + "\n").encode()])
