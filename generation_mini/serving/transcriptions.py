"""Recordings: the endpoint `/v1/audio/transcriptions`."""

from typing import Any

from fastapi import HTTPException, Request
from transformers import PreTrainedModel
from transformers.cli.serving import transcription

from .requests import wrong_input_is_refused

stock_audio_inputs = transcription.TranscriptionHandler._prepare_audio_inputs


class Transcriptions(transcription.TranscriptionHandler):
    """The endpoint `/v1/audio/transcriptions`, for a server that has models of speech beside those of Mini."""

    async def handle_request(self, request: Request) -> Any:
        """
        The text of a recording.

        Raises:
            HTTPException: 400, with a reason, for what does not work.
        """
        models = self.model_manager
        if models.force_model is not None:
            check_hears(models.load_model_and_processor(models.process_model_name(models.force_model))[1])
        with wrong_input_is_refused():
            return await super().handle_request(request)

    def _validate_request(self, form_keys: set[str]) -> None:
        super()._validate_request(form_keys)
        if missing := {"file", "model"} - form_keys:
            raise HTTPException(400, f"The form must have the fields file and model: {min(missing)} is missing.")

    @staticmethod
    def _prepare_audio_inputs(file_bytes: bytes, audio_processor: Any, audio_model: PreTrainedModel) -> dict:
        check_hears(audio_processor)
        return stock_audio_inputs(file_bytes, audio_processor, audio_model)


def check_hears(processor: Any) -> None:
    """Raises HTTPException 400 for a model that reads no sound."""
    if not hasattr(processor, "feature_extractor"):
        raise HTTPException(400, "This is a model of text: it cannot transcribe speech.")
