"""The server of the page: its files, and what the page asks for."""

import json
import secrets
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
import uvicorn
from entry_points_mini import quiet_libraries
from files_mini import display_name, find_checkpoint
from modeling_mini.loading.checkpoints import load_model
from modeling_mini.web import PAGE_FILES, describe, render_page
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..arguments import GenerationArguments
from ..interactive import Conversation, Turn
from ..text_generation import encode_prompt
from .arguments import DemoArguments
from .inside import look_inside
from .writing import Author, Event, follow

MOST_TOKENS = 2000  # of one text, so that nobody keeps others waiting for long
LARGEST_BODY = 1 << 22  # bytes of a request
WRITER = Path(__file__).with_name("writer.js")
# What the page sets, and the type of each.
SETTINGS = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "seed": int}


def make_app(author: Author, name: str, checkpoint: str | None = None) -> Starlette:
    """
    The pages of the server: `/` and its files, `/write` and `/look`.

    Args:
        checkpoint: the folder or Hub name whose card describes the model (default: that of the model).
    """
    page = render_page(describe(author.model, author.tokenizer, name, checkpoint, most_tokens=MOST_TOKENS))

    def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def write(request: Request) -> Response:
        try:
            body = await body_of(request)
            arguments = settings_of(body)
            ids, first, notices = beginning_of(author, body, arguments)
        except ValueError as error:
            return refusal(error)
        views = follow(author, ids, arguments, first, is_prompt_shown="prompt" in body, notices=notices)
        return StreamingResponse(
            lines_of(views), media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"}
        )

    async def look(request: Request) -> Response:
        try:
            body = await body_of(request)
            ids, token_id = ids_of(author, body.get("ids")), ids_of(author, [body.get("token")])[0]
        except ValueError as error:
            return refusal(error)
        return JSONResponse(await run_in_threadpool(look_inside, author, ids, token_id))

    def file_route(path: Path) -> Route:
        return Route(f"/{path.name}", lambda request: FileResponse(path))

    files = [file_route(path) for path in (*PAGE_FILES, WRITER)]
    return Starlette(
        routes=[
            Route("/", show_page), Route("/write", write, methods=["POST"]), Route("/look", look, methods=["POST"]),
            *files,
        ]
    )  # fmt: skip


async def lines_of(views: AsyncIterator[list[Event]]) -> AsyncIterator[str]:
    """A line of JSON for each event."""
    async for events in views:
        yield "".join(f"{json.dumps(event, ensure_ascii=False)}\n" for event in events)


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object of a request; ValueError where there is none, or the request is too large."""
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > LARGEST_BODY:
            raise ValueError(f"A request must have {LARGEST_BODY:,} bytes at most.")
    try:
        body = json.loads(content)  # JSONDecodeError and UnicodeDecodeError are ValueErrors
    except RecursionError:
        raise ValueError("The request is nested too deeply.") from None
    if not isinstance(body, dict):
        raise ValueError("The request must be a JSON object.")
    return body


def refusal(error: ValueError) -> Response:
    return JSONResponse({"error": " ".join(str(error).split())}, status_code=400)


def settings_of(body: dict[str, Any]) -> GenerationArguments:
    """
    Raises:
        ValueError: for a setting that is no number, or outside of its range.
    """
    settings = {name: body[name] for name in SETTINGS if body.get(name) is not None}
    for name, value in settings.items():
        kinds = (int,) if SETTINGS[name] is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError(f"{name} must be a {'whole ' if SETTINGS[name] is int else ''}number, got {value!r:.40}.")
    if settings.get("max_new_tokens", 0) > MOST_TOKENS:
        raise ValueError(f"max_new_tokens must be at most {MOST_TOKENS} on this page.")
    return GenerationArguments(**settings)


def beginning_of(
    author: Author, body: dict[str, Any], arguments: GenerationArguments
) -> tuple[list[int], int | None, list[str]]:
    """
    What to continue: the ids of a `prompt`, of a conversation (`messages`), or `ids` and the token that comes `first`
    after them. And notices for the user.

    Raises:
        ValueError: if there is none of them, or one is not what it should be.
    """
    if "prompt" in body:
        if not isinstance(body["prompt"], str):
            raise ValueError("The prompt must be text.")
        return encode_prompt(author.tokenizer, body["prompt"]), None, []
    if "ids" in body:
        return ids_of(author, body["ids"]), ids_of(author, [body.get("first")])[0], []
    messages = body.get("messages")
    are_messages = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    roles = [message.get("role") for message in messages] if are_messages else []
    if len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError("The messages must be of the user and the assistant in turns, and end with the user's.")
    contents = [message.get("content") for message in messages]
    for content in contents:
        if not isinstance(content, str):
            raise ValueError("The content of a message must be text.")
        encode_prompt(author.tokenizer, content)  # refuses what is no text
    conversation = Conversation(author.model, author.tokenizer)
    conversation.turns = [Turn(*pair) for pair in zip(contents[:-1:2], contents[1::2], strict=True)]
    ids, forgotten = conversation.say(contents[-1], arguments.max_new_tokens)
    notice = f"The oldest {forgotten} of the turns did not fit the context and were not read."
    return ids, None, [notice] if forgotten else []


def ids_of(author: Author, ids: Any) -> list[int]:
    """
    Raises:
        ValueError: if these are not the ids of tokens, at least one.
    """
    size = author.model.config.vocab_size
    if not isinstance(ids, list) or not ids:
        raise ValueError("The ids must be a list of at least one token.")
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < size:
            raise ValueError(f"A token is a number from 0 to {size - 1}, got {each!r:.40}.")
    return ids


def serve(arguments: DemoArguments, held: socket.socket) -> None:
    """
    Loads the model, and answers until Ctrl-C.

    Raises:
        ValueError: if the model cannot be loaded, or there is no public link to be had.
    """
    quiet_libraries()
    model, tokenizer = load_model(
        arguments.model, adapter=arguments.adapter, trust_remote_code=arguments.trust_remote_code
    )
    if hasattr(model, "compile_decoding"):
        model.compile_decoding(only_kept=True)
    checkpoint = find_checkpoint(arguments.adapter or arguments.model)
    app = make_app(Author(model, tokenizer), display_name(checkpoint), checkpoint)
    # Texts that are still being written when Ctrl-C comes would keep it alive.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"The page is at http://{host}:{arguments.port}/ (Ctrl-C ends it).", flush=True)
    if arguments.share:
        print(f"Everybody can open it at {public_link(arguments)} for a few days.", flush=True)
    uvicorn.Server(config).run(sockets=[held])


def public_link(arguments: DemoArguments) -> str:
    """
    Raises:
        ValueError: if Gradio is not installed or gives no link.
    """
    try:
        from gradio.networking import setup_tunnel
    except ImportError:
        raise ValueError("share needs Gradio: pip install gradio.") from None
    try:
        return setup_tunnel(arguments.host, arguments.port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # of many kinds: no network, no program for the tunnel
        raise ValueError(f"Gradio gave no public link ({error}): leave out --share.") from None
