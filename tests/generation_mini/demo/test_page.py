"""The page of the demo in a real browser."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from generation_mini.demo import listen, server
from generation_mini.demo.server import make_app
from generation_mini.demo.writing import Author
from helpers import browser
from helpers.browser import CHROMIUM, SCREENS, Opener, write
from helpers.programs import free_port
from tokenization import CHAT_TEMPLATE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@contextlib.contextmanager
def served(author: Author) -> Iterator[str]:
    port = free_port()
    held = listen("127.0.0.1", port)
    program = uvicorn.Server(uvicorn.Config(make_app(author, "a model"), log_level="warning"))
    thread = threading.Thread(target=program.run, kwargs={"sockets": [held]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        program.should_exit = True
        thread.join()


def slowly(lines_of: Callable[[Any], AsyncIterator[str]]) -> Callable[[Any], AsyncIterator[str]]:
    """The lines of a server that writes 200 pieces in a second at most, however many it has at a time."""

    async def slow_lines_of(views: Any) -> AsyncIterator[str]:
        async for lines in lines_of(views):
            for event in map(json.loads, lines.splitlines()):
                for one in [{"pieces": [piece]} for piece in event.get("pieces", [])] or [event]:
                    yield json.dumps(one) + "\n"
                    await asyncio.sleep(0.005)

    return slow_lines_of


@pytest.mark.slow
def test_writing_colours_and_other_characters(
    author: Author, opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The text that is stopped has a random seed: it must not end by itself before, also where the step is compiled.
    author.model.generation_config.eos_token_id = None
    monkeypatch.setattr(server, "lines_of", slowly(server.lines_of))
    with served(author) as url, opened(url) as found:
        page = found.page
        assert page.title() == "Mini: a model" and page.inner_text("h1") == "a model"
        assert "A language model of" in page.inner_text("#about")
        page.click("#examples button")
        assert page.input_value("#prompt") == page.inner_text("#examples button") != ""
        first = write(page, "the <b>cat</b> ", max_new_tokens=60, seed=1)
        assert first.startswith("the <b>cat</b> ") and len(first) > 40
        assert write(page, "the <b>cat</b> ", max_new_tokens=60, seed=1) == first, "the same seed, the same text"
        browser.check_colours(page)
        assert browser.share_of_red(page, tmp_path / "text.png") > 0.02
        browser.check_other_character(page, 30)
        browser.check_stop(page)
        page.fill("#temperature", "-1")
        page.press("#prompt", "Control+Enter")
        assert page.evaluate("document.querySelector('#temperature').validity.rangeUnderflow")
        assert page.is_hidden("#stop"), "what is out of range is not sent"
        assert found.wrong == [] and found.elsewhere == []


@pytest.mark.slow
def test_pointing_and_the_inside_of_the_model(author: Author, opened: Opener) -> None:
    """Pointing shows what else was likely; choosing also where the model looked and what each layer would have said."""
    with served(author) as url, opened(url) as found:
        page = found.page
        write(page, "the cat ", max_new_tokens=90, seed=1)  # into a second window of the context
        page.locator("#text .piece").nth(20).hover()
        assert "probability of" in page.inner_text("#figures") and page.is_hidden("#inside")
        page.hover("h1")
        assert page.inner_text("#chosen") == "A character"
        for number, read in ((4, 4), (20, 20), (95, None)):
            page.locator("#text .piece").nth(number).click()
            page.wait_for_selector("#inside:visible")
            page.wait_for_function("document.querySelector('#looked-most').textContent.startsWith('Most at ')")
            text = page.eval_on_selector_all("#text .piece", "all => all.map(each => each.textContent)")
            seen = page.eval_on_selector_all("#attention .piece", "all => all.map(each => each.textContent)")
            assert seen == text[:number] if read else seen == ["bos", *text[number - len(seen) + 1 : number]]
        assert page.locator("#layer option").count() == 3 and page.locator("#head option").count() == 5
        mean, sentence = browser.colours_of(page, "#attention .piece"), page.inner_text("#looked-most")
        page.select_option("#layer", "1")
        page.select_option("#head", "2")
        assert browser.colours_of(page, "#attention .piece") != mean
        assert page.inner_text("#looked-most") != sentence
        rows = page.locator("#lens tbody tr")
        assert rows.count() == 3 and rows.last.inner_text().startswith("layer 2, the model")
        assert found.wrong == []


@pytest.mark.slow
def test_by_keyboard_and_for_a_screen_reader(author: Author, opened: Opener) -> None:
    with served(author) as url, opened(url) as found:
        page = found.page
        text = write(page, "the cat ", max_new_tokens=20, seed=1)
        for name in ("#prompt", "#temperature", "#top_p", "#top_k", "#max_new_tokens", "#seed", "#layer", "#head"):
            assert page.locator(name).evaluate("each => each.labels.length") == 1, f"{name} has a label"
        assert (
            page.get_attribute("#figures", "aria-live") == "polite"
            and page.get_attribute("#status", "role") == "status"
        )
        page.focus("#text")
        page.keyboard.press("End")
        assert page.inner_text("#text .chosen") == text[-1]
        for key, at in (("ArrowLeft", -2), ("ArrowLeft", -3), ("ArrowRight", -2)):
            page.keyboard.press(key)
            assert page.inner_text("#text .chosen") == text[at].replace("\n", "")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.matches('#others button')")
        page.evaluate("document.querySelector('#status').textContent = ''")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#status').textContent.includes('per second')")
        assert browser.text_of(page)[: len(text) - 2] == text[:-2] and len(browser.text_of(page)) > len(text)
        page.focus("#text")
        page.keyboard.press("Home")
        assert "nothing to predict it from" in page.inner_text("#figures")
        page.keyboard.press("Escape")
        assert page.locator(".chosen").count() == 0
        assert found.wrong == []


@pytest.mark.slow
def test_a_chat_model_answers_in_turns(author: Author, opened: Opener) -> None:
    author.tokenizer.chat_template = CHAT_TEMPLATE
    author.model.generation_config.eos_token_id = [2, 7]
    with served(author) as url, opened(url) as found:
        page = found.page
        assert page.inner_text("#prompt-label") == "Message" and page.input_value("#prompt") == ""
        write(page, "hi <b>", max_new_tokens=10, seed=1)
        page.evaluate("document.querySelector('#status').textContent = ''")
        write(page, "and you", max_new_tokens=10, seed=2)
        assert page.locator(".said").all_inner_texts() == ["hi <b>", "and you"]
        answers = page.eval_on_selector_all(".turn", "all => all.map(each => each.querySelectorAll('.piece').length)")
        assert len(answers) == 2 and min(answers) > 0 and page.input_value("#prompt") == ""
        page.locator(".turn").nth(1).locator(".piece").first.click()
        page.wait_for_selector("#inside:visible")
        assert page.locator("#attention .special").count() >= 5, "it read the marks of the turns"
        # Another beginning of the first answer: what came after it goes.
        page.locator(".turn").nth(0).locator(".piece").first.click()
        page.locator("#others button").first.click()
        page.wait_for_function("document.querySelectorAll('.turn').length === 1")
        page.wait_for_selector("#write:enabled")
        page.click("#new")
        assert page.locator(".turn").count() == 0
        assert found.wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("screen", SCREENS, ids=str)
def test_on_every_screen(author: Author, opened: Opener, screen: tuple[int, int, str], tmp_path: Path) -> None:
    with served(author) as url, opened(url, *screen) as found:
        page = found.page
        write(page, "the cat ", max_new_tokens=200, seed=1)
        browser.check_other_character(page, 40)
        piece = page.locator("#text .piece").nth(50)
        piece.tap() if screen[0] < 500 else piece.click()
        page.wait_for_selector("#inside:visible")
        browser.check_layout(page)
        assert browser.share_of_red(page, tmp_path / "text.png") > 0.01
        page.screenshot(path=tmp_path / "page.png")
        assert found.wrong == []


@pytest.mark.slow
def test_a_server_that_has_ended_is_said_in_a_sentence(author: Author, opened: Opener) -> None:
    with served(author) as url, opened(url) as found:
        text = write(found.page, "the cat ", max_new_tokens=10)
        found.page.context.set_offline(True)
        found.page.click("#write")
        found.page.wait_for_function("document.querySelector('#problem').textContent !== ''")
        assert found.page.inner_text("#problem").startswith("The server does not answer: it has ended,")
        assert text and found.page.is_enabled("#write")


@pytest.mark.slow
def test_a_connection_that_breaks_in_the_middle_is_said_in_a_sentence(
    author: Author, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def break_off(views: object) -> AsyncIterator[str]:
        yield '{"notice": "It begins."}\n'
        raise OSError("the server ends")

    monkeypatch.setattr(server, "lines_of", break_off)
    with served(author) as url, opened(url) as found:
        found.page.wait_for_selector("#write:enabled")
        found.page.click("#write")
        found.page.wait_for_function("document.querySelector('#problem').textContent !== ''")
        assert found.page.inner_text("#problem").startswith("The server does not answer: it has ended,")


@pytest.mark.slow
def test_two_visitors_write_one_after_the_other(author: Author, opened: Opener) -> None:
    with served(author) as url, opened(url) as found, author.lock:
        found.page.wait_for_selector("#write:enabled")
        found.page.click("#write")
        found.page.wait_for_function("document.querySelector('#notice').textContent.includes('yours comes next')")
        found.page.click("#stop")
        found.page.wait_for_function("document.querySelector('#status').textContent === 'Stopped.'")
