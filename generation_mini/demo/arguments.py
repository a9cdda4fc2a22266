"""The settings of the demo: fields are the flags of `python -m generation_mini.demo`."""

from dataclasses import dataclass

from entry_points_mini import WHICH_MODEL, Settings, option


@dataclass
class DemoArguments(Settings):
    """Which model, and where the page is."""

    model: str | None = option(None, WHICH_MODEL)
    adapter: str | None = option(None, "folder or Hub name of an adapter for the model (LoRA and its kin)")
    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    port: int = option(7860, "port to listen at", at_least=1, at_most=65535)
    share: bool = option(False, "also make a public link through Gradio's servers, for a few days")
    trust_remote_code: bool = option(False, "run the Python code that comes with a model of another class")
