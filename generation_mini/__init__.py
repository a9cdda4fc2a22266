"""Writing with a trained model: what `generate.py` and the command `mini-generate` do."""
