"""
The trained model that comes with Mini: `model/` writes Python source, and `chat/` is an adapter on it that answers
questions about the standard library. Their cards say what they were trained on, and by which commands.
"""
