"""From what a user calls a model to a model and its tokenizer."""

from .checkpoints import find_checkpoint, load_assistant, load_checkpoint, load_model, load_tokenizer

__all__ = ["find_checkpoint", "load_assistant", "load_checkpoint", "load_model", "load_tokenizer"]
