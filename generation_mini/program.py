"""What `generate.py` does once its flags are read: it loads a model and writes."""

import sys

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
from accelerate.utils import set_seed
from entry_points_mini import command_of, quiet_libraries
from files_mini import BOX, RUNS_FOLDER, find_checkpoint, is_box
from modeling_mini.loading.checkpoints import load_assistant, load_model
from tokenization import joins_last_space
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .arguments import GenerationArguments
from .batch_file import BatchFile
from .interactive import converse, print_notice, write_to_terminal
from .text_generation import CharacterStreamer, Stopwatch, encode_prompt, own_processors, unknown_characters, write_on


def run(arguments: GenerationArguments) -> None:
    """Loads the model and writes."""
    quiet_libraries()
    own_processors(arguments)  # what is wrong with them shows before a model is loaded
    batch_file = None
    if arguments.batch_file is not None:
        batch_file = BatchFile(arguments)  # what is wrong with it shows before a model is loaded
    model, tokenizer = load_model(model_to_load(arguments), adapter=arguments.adapter, **arguments.loading())
    is_mini = hasattr(model, "compile_decoding")
    if arguments.compile and not is_mini:
        raise ValueError(f"compile is for Mini models, and {model.name_or_path!r} is a {type(model).__name__}.")
    if arguments.compile is not False and is_mini:
        model.compile_decoding(only_kept=arguments.compile is None)
    if arguments.seed is not None:
        set_seed(arguments.seed)
    assistant = None
    if arguments.assistant is not None:
        assistant = load_assistant(arguments.assistant, model, tokenizer, arguments.trust_remote_code)
        logging.set_verbosity_error()  # assisted decoding warns of how it calls generate itself
    if batch_file is not None:
        batch_file.write(model, tokenizer, print_notice)
    elif arguments.interactive:
        converse(model, tokenizer, arguments, assistant)
    else:
        write_once(model, tokenizer, arguments, assistant)


def model_to_load(arguments: GenerationArguments) -> str | None:
    """
    What to load for `--model`. Where there is no run, the model that comes with Mini writes, and says so. In a
    conversation it answers by its adapter.
    """
    if arguments.adapter is not None or not is_box(find_checkpoint(arguments.model)):
        return arguments.model
    if arguments.model is None:
        print_notice(
            f"There is no run under {RUNS_FOLDER}/, so the model that comes with Mini writes. It knows Python source; "
            f"train one on text of your own: {command_of('train_accelerate.py')} --dataset FILE"
        )
    return "box-chat" if arguments.interactive and BOX["box-chat"].is_dir() else arguments.model


def write_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: GenerationArguments,
    assistant: PreTrainedModel | None,
) -> None:
    """Continues one prompt on standard output."""
    prompt = arguments.prompt
    if prompt is None:
        prompt = "" if sys.stdin is None or sys.stdin.isatty() else read_standard_input()
    prompt_ids = encode_prompt(tokenizer, prompt)
    if unknown := unknown_characters(tokenizer, prompt, prompt_ids):
        print_notice(f"The model does not know {unknown}, and reads <|unk|> instead.")
    if joins_last_space(tokenizer, prompt):
        print_notice("The prompt ends in a space, which the model knows as a part of the next word: leave it out.")
    streamer = None
    if arguments.stream:
        write_to_terminal(prompt)
        streamer = CharacterStreamer(tokenizer, write_to_terminal, arguments.stop)
    stopwatch = Stopwatch() if arguments.stats else None
    results = write_on(
        model, tokenizer, [prompt_ids], arguments, print_notice, streamer=streamer, assistant_model=assistant,
        stopping_criteria=[stopwatch] if stopwatch is not None else [],
    )  # fmt: skip
    statistics = stopwatch.summary(sum(len(result.ids) for result in results)) if stopwatch else None
    if streamer is not None:
        streamer.finish()
        print()
    else:
        for number, result in enumerate(results, start=1):
            if len(results) > 1:
                print(f"--- {number} ---")
            print(prompt + result.text)
    if statistics:
        print_notice(statistics)


def read_standard_input() -> str:
    """All of it, byte for byte: Python's text mode would make every end of line a newline."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Standard input is not valid UTF-8 at byte {error.start}.") from None
