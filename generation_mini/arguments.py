"""The settings of generation: fields are the flags of `generate.py`."""

from dataclasses import dataclass, fields
from typing import Any

from entry_points_mini import WHICH_MODEL, ArgumentParser, Settings, option, quantization_of

DTYPES = ("auto", "float32", "bfloat16", "float16")
# A value for one of these asks for sampling. The numbers are those that transformers takes where none is given: greedy
# decoding gets them, because transformers warns of all others.
SAMPLING: dict[str, float | None] = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
# These hold for sampling and greedy decoding alike.
SHAPING = ("repetition_penalty", "no_repeat_ngram_size", "num_beams")


@dataclass
class GenerationArguments(Settings):
    """What to write with, from where, and how."""

    model: str | None = option(None, WHICH_MODEL, common=True)
    prompt: str | None = option(
        None, "text to continue (default: standard input when it is a pipe, else nothing)", common=True
    )
    max_new_tokens: int = option(200, "tokens to write at most", aliases=["--max_tokens"], at_least=1, common=True)
    min_new_tokens: int = option(0, "tokens to write before the text may end", at_least=0)
    temperature: float | None = option(
        None, "0 takes the likeliest token always (default: the model's)", at_least=0, common=True
    )
    top_k: int | None = option(
        None, "sample among the k likeliest; 0 turns it off (default: the model's)", at_least=0, common=True
    )
    top_p: float | None = option(
        None,
        "sample among the likeliest that together have this probability (default: the model's)",
        above=0,
        at_most=1,
        common=True,
    )
    min_p: float | None = option(
        None, "sample among those at least this share as likely as the likeliest", at_least=0, at_most=1
    )
    top_h: float | None = option(
        None, "sample among the likeliest that hold this share of the entropy", above=0, at_most=1
    )
    typical_p: float | None = option(
        None, "sample among the most typical that together have this probability", above=0, at_most=1
    )
    epsilon_cutoff: float | None = option(None, "never sample what is less likely than this", at_least=0, below=1)
    eta_cutoff: float | None = option(None, "the same, lower where the model is unsure", at_least=0, below=1)
    repetition_penalty: float | None = option(None, "above 1 makes what is there already less likely", above=0)
    no_repeat_ngram_size: int | None = option(None, "N tokens in a row never come twice", at_least=0)
    num_beams: int | None = option(None, "search for the likeliest text with N beams, instead of sampling", at_least=1)
    logits_processor: list[str] = option(
        [],
        "own rules of sampling, each as package.module:NAME: a function of (input_ids, scores), or a LogitsProcessor",
    )
    stop: list[str] = option([], "end before any of these strings")
    seed: int | None = option(
        None, "makes the same call write the same text", at_least=0, at_most=2**32 - 1, common=True
    )
    num_return_sequences: int = option(1, "number of texts for a prompt", at_least=1, common=True)
    stream: bool = option(False, "print each character as it is written", common=True)
    interactive: bool = option(False, "a conversation; /help lists its commands", common=True)
    batch_file: str | None = option(None, "prompts to continue: a line each, or .jsonl with the field 'prompt'")
    output: str | None = option(None, ".jsonl for the texts of --batch_file; the same call again goes on with it")
    batch_size: int = option(32, "prompts of --batch_file at once", at_least=1)
    stats: bool = option(False, "say how fast it was")
    compile: bool | None = option(
        None,
        "compile the step of decoding, on a CPU in float32: a few seconds once on a machine, and then several times as "
        "fast (default: where it was done before)",
    )
    assistant: str | None = option(None, "smaller model of the same tokenizer that drafts (assisted decoding)")
    adapter: str | None = option(None, "folder or Hub name of an adapter for the model (LoRA and its kin)")
    dtype: str = option("auto", f"of the weights: auto (as they were saved), {', '.join(DTYPES[1:])}")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    load_in_8bit: bool = option(False, "quantize to INT8 through bitsandbytes")
    load_in_4bit: bool = option(False, "quantize to INT4 (nf4, double quantization) through bitsandbytes")
    trust_remote_code: bool = option(False, "run the Python code that comes with a model of another class")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must not exceed max_new_tokens ({self.max_new_tokens})."
            )
        if "" in self.stop:
            raise ValueError("stop must not hold an empty string.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.num_return_sequences > 1 and (self.stream or self.interactive or self.assistant):
            raise ValueError("num_return_sequences must be 1 with --stream, --interactive and --assistant.")
        if self.num_return_sequences > 1 and self.temperature == 0 and (self.num_beams or 1) == 1:
            raise ValueError("num_return_sequences must be 1 with --temperature 0: all texts would be the same.")
        if self.interactive and self.prompt is not None:
            raise ValueError("interactive goes without --prompt: say it in the conversation.")
        if (self.batch_file is None) != (self.output is None):
            raise ValueError("batch_file and output belong together: prompts from one, texts into the other.")
        if self.batch_file is not None and (self.prompt is not None or self.stream or self.interactive):
            raise ValueError("batch_file goes with none of --prompt, --stream and --interactive.")
        if self.assistant is not None and self.batch_file is not None:
            raise ValueError("assistant drafts for one text at a time, and not for --batch_file.")
        if (self.num_beams or 1) > 1:
            if self.stream or self.interactive or self.stop or self.assistant:
                raise ValueError(
                    "num_beams goes with none of --stream, --interactive, --stop and --assistant: several texts are "
                    "under way until the end."
                )
            if self.num_return_sequences > self.num_beams:
                raise ValueError(
                    f"num_return_sequences ({self.num_return_sequences}) must not exceed num_beams ({self.num_beams})."
                )
        if self.compile and ((self.num_beams or 1) > 1 or self.assistant):
            raise ValueError("compile goes with neither --num_beams nor --assistant, which take other steps.")
        quantization_of(self)

    def loading(self) -> dict[str, Any]:
        """The arguments of `load_checkpoint` that come from flags."""
        import torch  # not above, for no help text needs it

        return {
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype),
            "device": self.device,
            "quantization": quantization_of(self),
        }

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults, by flag."""
        defaults = GenerationArguments()
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value != getattr(defaults, name)}


def parse_arguments(argv: list[str]) -> GenerationArguments:
    """The settings from the command line."""
    (arguments,) = ArgumentParser(GenerationArguments, description="Write with a trained Mini model.").parse(argv)
    return arguments
