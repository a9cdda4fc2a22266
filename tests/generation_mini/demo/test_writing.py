"""What the page is told of a text, and when."""

import asyncio
import math
import threading
import time
from typing import Any

import pytest
import torch
from generation_mini.arguments import GenerationArguments
from generation_mini.demo.writing import OTHERS, Author, Event, PieceMaker, follow, read
from helpers.random_models import make_model
from tokenization import ByteTokenizer
from torch.nn import functional as F


def events_of(author: Author, ids: list[int], first: int | None = None, **settings: Any) -> list[Event]:
    async def collect() -> list[Event]:
        views = follow(author, ids, GenerationArguments(**settings), first, is_prompt_shown=True)
        return [event async for events in views for event in events]

    return asyncio.run(collect())


def all_of(events: list[Event], name: str) -> list[Any]:
    return [event[name] for event in events if name in event]


def tokens_of(events: list[Event]) -> list[dict[str, Any]]:
    return [token for pieces in all_of(events, "pieces") for piece in pieces for token in piece["tokens"]]


def text_of(events: list[Event]) -> str:
    return "".join(piece["text"] for pieces in all_of(events, "pieces") for piece in pieces)


@pytest.mark.slow
def test_every_figure_is_that_of_the_model(author: Author) -> None:
    """Also of the prompt, and of each window when the context is full, against one forward for each token."""
    ids = author.tokenizer("the cat ").input_ids
    events = events_of(author, ids, max_new_tokens=150, temperature=0.8, top_k=20, seed=3)
    (begun,) = all_of(events, "read")
    assert begun["ids"] == ids and "".join(piece["text"] for piece in begun["pieces"]) == "the cat "
    seen, window, windows = [], {"dropped": 0, "start": []}, 0
    for event in events:
        if "window" in event:
            window, windows = event["window"], windows + 1
            assert len(window["start"]) + len(seen) - window["dropped"] == 32, "half a context"
        pieces = event.get("pieces") or (event["read"]["pieces"] if "read" in event else [])
        for token in (token for piece in pieces for token in piece["tokens"]):
            if seen:
                check_facts(author, window["start"] + seen[window["dropped"] :], token)
            else:
                assert token == {"id": ids[0], "text": "bos"}, "nothing comes before it"
            seen.append(token["id"])
    assert windows == 3 and len(seen) == len(ids) + 150
    assert events[-1]["end"]["tokens"] == 150 and events[-1]["end"]["reason"] == "length"
    assert text_of(events) == author.tokenizer.decode(seen[len(ids) :], skip_special_tokens=True)
    again = events_of(author, ids, max_new_tokens=150, temperature=0.8, top_k=20, seed=3)
    assert tokens_of(again) == tokens_of(events), "the same seed writes the same text"


def check_facts(author: Author, before: list[int], token: dict[str, Any]) -> None:
    with torch.no_grad():
        logits = author.model(torch.tensor([before])).logits[0, -1]
    log_probabilities = F.log_softmax(logits, dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum() / math.log(2)
    assert token["surprise"] == pytest.approx(-log_probabilities[token["id"]].item() / math.log(2), abs=1e-3)
    assert token["entropy"] == pytest.approx(entropy.item(), abs=1e-3)
    probabilities = log_probabilities.exp()
    assert token["probability"] == pytest.approx(probabilities[token["id"]].item(), abs=1e-4)
    likeliest = [i for i in logits.argsort(descending=True).tolist() if i != token["id"]][:OTHERS]
    assert [other["id"] for other in token["others"]] == likeliest
    assert [other["probability"] for other in token["others"]] == pytest.approx(
        probabilities[likeliest].tolist(), abs=1e-4
    )
    assert all(other["text"] == author.label(other["id"]) for other in token["others"])


def test_what_takes_the_loop_of_transformers_is_followed_too(author: Author) -> None:
    """As models with an adapter and those of other families do."""
    ids = author.tokenizer("the ").input_ids
    fast = tokens_of(events_of(author, ids, max_new_tokens=80, temperature=0.0))
    author.model.set_attn_implementation("eager")
    slow = tokens_of(events_of(author, ids, max_new_tokens=80, temperature=0.0))
    assert [token["id"] for token in slow] == [token["id"] for token in fast] and len(fast) == 80
    for a, b in zip(slow, fast, strict=True):
        assert a["entropy"] == pytest.approx(b["entropy"], abs=1e-3)


def test_it_goes_on_with_another_token(author: Author) -> None:
    ids = author.tokenizer("the ").input_ids
    first, second = author.tokenizer("qz", add_special_tokens=False).input_ids
    events = events_of(author, ids, first, max_new_tokens=5, temperature=0.0)
    assert all_of(events, "read") == [] and text_of(events)[0] == "q" and len(tokens_of(events)) == 6
    check_facts(author, ids, tokens_of(events)[0])
    assert tokens_of(events)[1:] == tokens_of(events_of(author, [*ids, first], max_new_tokens=5, temperature=0.0))
    assert tokens_of(events_of(author, ids, second, max_new_tokens=1))[0]["text"] == "z"


def test_the_end_of_a_text_is_a_piece_of_its_own(author: Author) -> None:
    """One can then see what else was likely there."""
    ids = author.tokenizer("the ").input_ids
    (token,) = tokens_of(events_of(author, ids, max_new_tokens=1, temperature=0.0))
    author.model.generation_config.eos_token_id = [2, token["id"]]
    events = events_of(author, ids, max_new_tokens=9, temperature=0.0)
    assert events[-1]["end"]["reason"] == "end" and len(tokens_of(events)) == 1


def test_pieces_are_whole_characters() -> None:
    tokenizer = ByteTokenizer()
    maker = PieceMaker(tokenizer)
    tokens = [{"id": token_id} for token_id in [*tokenizer("é").input_ids, tokenizer.eos_token_id, 0xC3 + 8]]
    pieces = [piece for token in tokens for piece in maker.add(token)] + maker.finish()
    assert [(piece["text"], len(piece["tokens"])) for piece in pieces] == [("", 1), ("é", 2), ("", 1), ("\ufffd", 1)]
    assert maker.finish() == []


def test_a_text_longer_than_the_context_has_figures_where_it_was_read() -> None:
    author = Author(make_model(vocab_size=264, max_position_embeddings=16), ByteTokenizer())
    facts = read(author, author.tokenizer("x" * 40).input_ids)
    assert ["entropy" in token for token in facts] == [False] * 26 + [True] * 15


def test_closing_ends_the_text(author: Author) -> None:
    before = set(threading.enumerate())

    async def leave() -> None:
        settings = GenerationArguments(max_new_tokens=1_000_000, temperature=1.0)
        views = follow(author, author.tokenizer("the ").input_ids, settings)
        await anext(views)
        await views.aclose()

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while not set(threading.enumerate()) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not author.lock.locked()


def test_texts_are_written_one_after_the_other(author: Author) -> None:
    with author.lock:
        threading.Timer(0.3, author.lock.release).start()
        events = events_of(author, [9], max_new_tokens=3)
        author.lock.acquire()
    assert events[0] == {"notice": "Another text is being written; yours comes next."} and "end" in events[-1]


def test_notices_and_errors_are_told(author: Author, monkeypatch: pytest.MonkeyPatch) -> None:
    events = events_of(author, author.tokenizer("x" * 100).input_ids, max_new_tokens=3)
    assert "only the last 31 tokens" in all_of(events, "notice")[0]
    assert all_of(events, "window") == [{"dropped": 70, "start": [1]}]
    monkeypatch.setattr(author.model, "generate", lambda *a, **k: 1 / 0)
    assert events_of(author, [9], max_new_tokens=3)[-1] == {"error": "division by zero"}
