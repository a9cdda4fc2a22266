"""The server of transformers, with the classes of this folder in it, and the models that it has."""

import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from files_mini import ADAPTER_CONFIG, BOX, find_checkpoint
from modeling_mini.loading.checkpoints import load_model
from starlette.exceptions import HTTPException as AnyHTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, transcription, utils

from .chats import ChatCompletions, Responses
from .completions import Completions
from .generating import InBatches, OneByOne
from .transcriptions import Transcriptions

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


def build_server(*parts: Any, **settings: Any) -> FastAPI:
    """The server of transformers, whose refusals have the form in which clients of OpenAI look for a reason."""
    app = stock_build_server(*parts, **settings)

    def refusal(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(content, status_code=status)

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


def split_model_id(model: Any) -> tuple[str, str | None]:
    """As the server's own; HTTPException 400 for a name that is no text."""
    if not isinstance(model, str):
        raise HTTPException(400, f"model must be a text, got {model!r:.80}.")
    return utils.split_model_id(model)


class ServedModels(model_manager.ModelManager):
    """The models of a server; one that was named at its start keeps the name that it was given there."""

    def __init__(self, *, force_model: str | None = None, **settings: Any) -> None:
        self.checkpoint = force_model
        if force_model is not None and (force_model in BOX or Path(force_model).is_dir()):
            self.checkpoint = str(Path(find_checkpoint(force_model)).resolve())
        self.started = int(time.time())
        super().__init__(force_model=force_model, **settings)

    def process_model_name(self, model_id: str) -> str:
        """
        The key of a model: its name, for the one that was named at the start, also where its folder is meant.

        Raises:
            HTTPException: 400, for another one than was named at the start.
        """
        if self.force_model is None:
            return super().process_model_name(model_id)
        if model_id in (self.force_model, self.checkpoint):
            return self.force_model
        if model_id != utils.split_model_id(self.force_model)[0]:
            raise HTTPException(400, f"This server has the model {self.force_model!r}, and not {model_id!r}.")
        return super().process_model_name(model_id)

    def with_revision(self, key: str) -> str:
        return super().process_model_name(self.checkpoint) if key == self.force_model else key

    def is_adapter(self, key: str) -> bool:
        return key == self.force_model and (Path(self.checkpoint) / ADAPTER_CONFIG).is_file()

    def _load_processor(self, model_id_and_revision: str, **settings: Any) -> PreTrainedTokenizerBase:
        if self.is_adapter(model_id_and_revision):
            return load_model(self.checkpoint)[1]  # an adapter may have none of its own
        return super()._load_processor(self.with_revision(model_id_and_revision), **settings)

    def _load_model(self, model_id_and_revision: str, **settings: Any) -> PreTrainedModel:
        if self.is_adapter(model_id_and_revision):
            return load_model(self.checkpoint)[0]
        model = super()._load_model(self.with_revision(model_id_and_revision), **settings)
        if hasattr(model, "compile_decoding"):
            model.compile_decoding(only_kept=True)
        return model

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The one model that requests may name, or those of the cache."""
        if self.force_model is None:
            return super().get_gen_models()
        return [{"id": self.force_model, "object": "model", "created": self.started, "owned_by": ""}]
