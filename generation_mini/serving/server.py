"""The server of transformers with the classes of this folder in it, and the form of its refusals."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, transcription, utils

from .chats import ChatCompletions, Responses
from .completions import Completions
from .generating import InBatches, OneByOne, StreamError
from .models import ServedModels, split_model_id
from .transcriptions import Transcriptions

# Bytes of a request. In OpenAI's protocol, the largest hold a recording of 25 MB, or pictures of 50 MB.
LARGEST_BODY = 1 << 26
stock_build_server = server.build_server


def install() -> None:
    """Puts the classes of this folder where transformers' command looks for them."""
    model_manager.ModelManager = ServedModels
    completion.CompletionHandler = Completions
    chat_completion.ChatCompletionHandler = ChatCompletions
    response.ResponseHandler = Responses
    transcription.TranscriptionHandler = Transcriptions
    server.build_server = build_server
    server.split_model_id = split_model_id
    utils.GenerateManager = OneByOne
    utils.CBGenerateManager = InBatches
    utils._StreamError = StreamError


def build_server(*parts: Any, **settings: Any) -> FastAPI:
    """The server of transformers, whose refusals have the form in which clients of OpenAI look for a reason."""
    app = stock_build_server(*parts, **settings)
    app.add_middleware(WithItsClient)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> JSONResponse:
        message = error.detail
        if error.status_code == 404 and message == "Not Found":
            message = f"There is no {request.url.path} here; docs/SERVING.md says what there is."
        elif isinstance(message, list):  # of pydantic, for each field that is wrong
            message = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in message)
        return refusal(error.status_code, message)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(400, "The request must be a JSON object.")

    return app


def refusal(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode(errors="replace").decode()  # what it repeats may be no text
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status_code=status)


class WithItsClient:
    """
    Ends a request when its client goes before there is an answer; one that is answered by a stream ends by itself. The
    handler gets a `CancelledError` where it waits. To see the client go, all that it sends is read at once; a request
    that is larger than `LARGEST_BODY` is refused before it is read whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        messages: asyncio.Queue[Message] = asyncio.Queue()
        is_answered = has_gone = False
        is_too_large = int(dict(scope["headers"]).get(b"content-length", 0)) > LARGEST_BODY

        async def next_message() -> Message:
            message = await messages.get()
            if message["type"] == "http.disconnect":
                messages.put_nowait(message)  # for whoever asks next
            return message

        async def send_on(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        async def read_on() -> None:
            nonlocal has_gone, is_too_large
            size = 0
            while not has_gone and not is_too_large:
                messages.put_nowait(message := await receive())
                has_gone = message["type"] == "http.disconnect"
                size += len(message.get("body", b""))
                is_too_large = size > LARGEST_BODY
            if not is_answered:
                answering.cancel()

        answering = asyncio.create_task(self.app(scope, next_message, send_on))
        reading = asyncio.create_task(read_on())
        try:
            await answering
        except asyncio.CancelledError:
            answering.cancel()  # where the server itself is stopped
            if is_too_large:
                refused = refusal(413, f"A request must have {LARGEST_BODY:,} bytes at most.")
                await refused(scope, receive, send)
            elif not has_gone:
                raise
        finally:
            reading.cancel()
