"""
A conversation with a model in the terminal.

A model that was taught to chat ends its turns with <|end|>, and says so in its generation_config.json; it gets the
chat template and a history of turns. Any other model simply continues the text so far.
"""

import contextlib
import dataclasses
import signal
import sys

from configuration_mini import nearest_name
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import GenerationArguments
from .writing import CharacterStreamer, write_on

HELP = """\
/help                  this list
/reset                 forget everything said so far
/set NAME VALUE        change a setting: temperature, top_k, top_p, max_new_tokens
/settings              show the settings
/quit                  end (so does Ctrl-D)
Ctrl-C                 stop the answer"""
SETTINGS = {"temperature": float, "top_k": int, "top_p": float, "max_new_tokens": int}


class Conversation:
    """What has been said, and how the next answer begins."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        end_ids = model.generation_config.eos_token_id
        end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
        self.tokenizer = tokenizer
        self.is_chat = tokenizer.chat_template is not None and tokenizer.convert_tokens_to_ids("<|end|>") in end_ids
        self.messages: list[dict[str, str]] = []
        self.text = ""

    def prompt_ids(self, said: str) -> list[int]:
        """The ids to continue after the user has said something."""
        if self.is_chat:
            self.messages.append({"role": "user", "content": said})
            return self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_dict=True
            ).input_ids
        self.text += said
        return self.tokenizer(self.text, verbose=False).input_ids

    def add_answer(self, answer: str) -> None:
        if self.is_chat:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.text += answer + "\n"

    def reset(self) -> None:
        self.messages, self.text = [], ""


def converse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: GenerationArguments) -> None:
    """Reads lines and answers them until the input ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history come with the import)
    conversation = Conversation(model, tokenizer)
    manner = "answers in turns" if conversation.is_chat else "continues what you write"
    print(f"This model {manner}. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")
            continue
        if line.startswith("/"):
            if line.strip() in ("/quit", "/exit"):
                return
            print(command(line, conversation, arguments))
        elif line:
            answer(model, tokenizer, conversation, line, arguments)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    said: str,
    arguments: GenerationArguments,
) -> None:
    """Writes one answer; Ctrl-C ends the answer, and what was written stays in the history."""
    interrupted = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True

    def write(piece: str) -> None:
        # Raised here and not in the handler, which may run inside a callback that swallows exceptions.
        if interrupted:
            raise KeyboardInterrupt
        write_to_terminal(piece)

    streamer = CharacterStreamer(tokenizer, write)
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            write_on(model, tokenizer, conversation.prompt_ids(said), arguments, print_notice, streamer)
    finally:
        signal.signal(signal.SIGINT, previous)
    interrupted = False
    streamer.finish()
    print()
    conversation.add_answer(streamer.text)


def command(line: str, conversation: Conversation, arguments: GenerationArguments) -> str:
    """Carries out a line that begins with a slash, and says what happened."""
    name, *words = line.split()
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "Everything said so far is forgotten."
    if name == "/settings":
        values = ((setting, getattr(arguments, setting)) for setting in SETTINGS)
        return "\n".join(f"{setting} = {'the default of the model' if v is None else v}" for setting, v in values)
    if name == "/set":
        return change_setting(words, arguments)
    commands = ["/help", "/reset", "/set", "/settings", "/quit"]
    return f"There is no command {name!r}{nearest_name(name, commands) or '; /help lists them.'}"


def change_setting(words: list[str], arguments: GenerationArguments) -> str:
    if len(words) != 2 or words[0] not in SETTINGS:
        return f"Say /set NAME VALUE with one of {', '.join(SETTINGS)}."
    name, text = words
    try:
        value = SETTINGS[name](text)
    except ValueError:
        return f"{name} must be a number, got {text!r}."
    try:
        dataclasses.replace(arguments, **{name: value})  # runs the checks
    except ValueError as error:
        return str(error)
    setattr(arguments, name, value)
    return f"{name} = {value}"


def write_to_terminal(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def print_notice(sentence: str) -> None:
    """Notices go to standard error, so that a pipe gets the text alone."""
    print(f"({sentence})", file=sys.stderr)
