"""Sharing a model: what goes up, the card, the upload itself, and proof that a stranger can load it."""
