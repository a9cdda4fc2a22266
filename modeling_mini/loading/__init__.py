"""From what a user calls a model to a model and its tokenizer."""

from . import registration as registration  # makes the Auto classes know Mini
from .checkpoints import find_checkpoint, load_assistant, load_checkpoint, load_model, load_tokenizer

__all__ = ["find_checkpoint", "load_assistant", "load_checkpoint", "load_model", "load_tokenizer"]
