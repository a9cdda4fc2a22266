"""The settings of generation: fields are the flags of `generate.py`."""

from dataclasses import dataclass

from entry_points_mini import ArgumentParser, option


@dataclass
class GenerationArguments:
    """What to write with, from where, and how."""

    model: str | None = option(None, "run, checkpoint folder, or Hub name (default: the newest run under runs/)")
    prompt: str | None = option(None, "text to continue (default: standard input when it is a pipe, else nothing)")
    max_new_tokens: int = option(200, "tokens to write at most", aliases=["--max_tokens"])
    temperature: float | None = option(None, "0 takes the likeliest token always (default: the model's)")
    top_k: int | None = option(None, "sample among the k likeliest; 0 turns it off (default: the model's)")
    top_p: float | None = option(None, "sample among the likeliest that hold this mass (default: the model's)")
    seed: int | None = option(None, "makes the same call write the same text")
    num_return_sequences: int = option(1, "number of texts")
    stream: bool = option(False, "print each character as it is written")
    interactive: bool = option(False, "a conversation; /help lists its commands")
    trust_remote_code: bool = option(False, "run the code that a Hub repository of another model brings")

    def __post_init__(self) -> None:
        if self.num_return_sequences > 1 and (self.stream or self.interactive):
            raise ValueError("num_return_sequences must be 1 with --stream and --interactive.")
        for name in ("max_new_tokens", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")


def parse_arguments(argv: list[str]) -> GenerationArguments:
    """The settings from the command line."""
    (arguments,) = ArgumentParser(GenerationArguments, description="Write with a trained Mini model.").parse(argv)
    return arguments
