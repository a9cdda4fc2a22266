"""The models of a server: under which names requests find them, and how they are loaded."""

import time
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from files_mini import ADAPTER_CONFIG, BOX, find_checkpoint
from modeling_mini.loading.checkpoints import load_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving import model_manager, utils


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
        """What transformers loads for a key: the folder of the model that was named at the start, or the key."""
        return super().process_model_name(self.checkpoint) if key == self.force_model else key

    def is_adapter(self, key: str) -> bool:
        """Whether a key means the folder of an adapter, which the Auto classes of transformers do not load whole."""
        return key == self.force_model and (Path(self.checkpoint) / ADAPTER_CONFIG).is_file()

    def _load_processor(self, model_id_and_revision: str, **settings: Any) -> PreTrainedTokenizerBase:
        if self.is_adapter(model_id_and_revision):
            return self.load_adapter()[1]  # an adapter may have none of its own
        return super()._load_processor(self.with_revision(model_id_and_revision), **settings)

    def _load_model(self, model_id_and_revision: str, **settings: Any) -> PreTrainedModel:
        if self.is_adapter(model_id_and_revision):
            model = self.load_adapter()[0]
        else:
            model = super()._load_model(self.with_revision(model_id_and_revision), **settings)
        if hasattr(model, "compile_decoding"):
            model.compile_decoding(only_kept=True)
        return model

    def load_adapter(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model of the adapter, by the flags of the server, and its tokenizer."""
        device = f"cuda:{self.device}" if isinstance(self.device, int) else self.device
        return load_model(
            self.checkpoint,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype or "auto",
            device=None if device == "auto" else device,
            quantization=self.quantization and self.quantization.removeprefix("bnb-"),
        )

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The one model that requests may name, or those of the cache."""
        if self.force_model is None:
            return super().get_gen_models()
        return [{"id": self.force_model, "object": "model", "created": self.started, "owned_by": ""}]


def split_model_id(model: Any) -> tuple[str, str | None]:
    """As the server's own; HTTPException 400 for a name that is no text."""
    if not isinstance(model, str):
        raise HTTPException(400, f"model must be a text, got {model!r:.80}.")
    return utils.split_model_id(model)
