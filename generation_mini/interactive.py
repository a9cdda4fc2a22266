"""
A conversation with a model in the terminal.

A model that was taught to chat ends its turns with <|end|>, and says so in its generation_config.json; it gets the
chat template and a history of turns. Any other model simply continues the text so far.
"""

import contextlib
import dataclasses
import signal
import sys

from modeling_mini.loading.checkpoints import is_chat_model
from shape_mini import nearest_name
from tokenization.chat import encode_messages
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import SAMPLING, GenerationArguments
from .text_generation import CharacterStreamer, Stopwatch, context_of, encode_prompt, write_on

SETTINGS: dict[str, type] = {
    name: int if "int" in str(GenerationArguments.__annotations__[name]) else float
    for name in ("max_new_tokens", "min_new_tokens", *SAMPLING, "repetition_penalty", "no_repeat_ngram_size")
}
HELP = f"""\
/help                  this list
/reset                 forget everything said so far
/set NAME VALUE        change a setting; the value 'default' is the model's own
/settings              show the settings
/quit                  end (so does Ctrl-D)
Ctrl-C                 stop the answer
The settings are {", ".join(SETTINGS)}."""


@dataclasses.dataclass
class Turn:
    """A message of the user, and the answer of the model."""

    message: str
    answer: str | None = None


class Conversation:
    """The messages and answers so far, and how the next answer begins."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.context = context_of(model)
        self.defaults = model.generation_config
        self.is_chat = is_chat_model(model, tokenizer)
        self.turns: list[Turn] = []

    def say(self, message: str, max_new_tokens: int) -> tuple[list[int], int]:
        """
        The ids to continue after a message of the user, and how many turns were forgotten for it: the oldest leave
        until an answer of `max_new_tokens` fits behind the rest, or one of half a context if that is less.
        """
        self.turns.append(Turn(message))
        capacity = self.context - min(max_new_tokens, self.context // 2)
        forgotten = 0
        while len(ids := self.ids()) > capacity and len(self.turns) > 1:
            del self.turns[0]
            forgotten += 1
        return ids, forgotten

    def ids(self) -> list[int]:
        """The whole conversation, as the model reads it."""
        if not self.is_chat:
            text = "".join(
                turn.message + (f"{turn.answer}\n" if turn.answer is not None else "") for turn in self.turns
            )
            return self.tokenizer(text, verbose=False).input_ids
        messages = []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.message})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        return encode_messages(self.tokenizer, messages, add_generation_prompt=True)[0]

    def add_answer(self, answer: str) -> None:
        """Keeps the answer of the model to the last message."""
        self.turns[-1].answer = answer

    def reset(self) -> None:
        """Forgets all turns."""
        self.turns = []


def converse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: GenerationArguments,
    assistant: PreTrainedModel | None = None,
) -> None:
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
        except UnicodeDecodeError:
            print_notice("That line is not valid UTF-8.")
            continue
        if line.startswith("/"):
            if line.strip() in ("/quit", "/exit"):
                return
            print(command(line, conversation, arguments))
        elif line:
            before = list(conversation.turns)
            try:
                answer(model, tokenizer, conversation, line, arguments, assistant)
            except ValueError as error:  # often a setting, which can be changed
                conversation.turns = before
                print_notice(str(error))


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    message: str,
    arguments: GenerationArguments,
    assistant: PreTrainedModel | None = None,
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

    encode_prompt(tokenizer, message)  # refuses what is no text
    ids, forgotten = conversation.say(message, arguments.max_new_tokens)
    if forgotten:
        turns = "turn does" if forgotten == 1 else f"{forgotten} turns do"
        print_notice(f"The oldest {turns} not fit the context of {conversation.context} tokens, and left.")
    streamer = CharacterStreamer(tokenizer, write, arguments.stop)
    stopwatch = Stopwatch() if arguments.stats else None
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            write_on(
                model, tokenizer, [ids], arguments, print_notice, streamer=streamer, assistant_model=assistant,
                stopping_criteria=[stopwatch] if stopwatch is not None else [],
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, previous)
    interrupted = False
    streamer.finish()
    print()
    if stopwatch is not None:
        print_notice(stopwatch.summary(len(streamer.detokenizer.ids)))
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
        return "\n".join(shown(setting, conversation, arguments) for setting in SETTINGS)
    if name == "/set":
        return change_setting(words, conversation, arguments)
    commands = ["/help", "/reset", "/set", "/settings", "/quit"]
    return f"There is no command {name!r}{nearest_name(name, commands) or '; /help lists them.'}"


def shown(name: str, conversation: Conversation, arguments: GenerationArguments) -> str:
    """A setting with its value; one that was not given has that of the model, or is off."""
    if (value := getattr(arguments, name)) is not None:
        return f"{name} = {value}"
    defaults = conversation.defaults
    if name == "temperature" and not defaults.do_sample:
        return f"{name} = 0 (the model's: always the likeliest token)"
    value = getattr(defaults, name, None)
    if value is None:
        value = SAMPLING.get(name)
    return f"{name} = {'off' if value is None else value} (the model's)"


def change_setting(words: list[str], conversation: Conversation, arguments: GenerationArguments) -> str:
    if len(words) != 2 or words[0] not in SETTINGS:
        return f"Say /set NAME VALUE with one of {', '.join(SETTINGS)}."
    name, text = words
    try:
        has_default = getattr(GenerationArguments, name) is None
        value = None if has_default and text == "default" else SETTINGS[name](text)
    except ValueError:
        return f"{name} must be a {'whole ' if SETTINGS[name] is int else ''}number, got {text!r}."
    try:
        dataclasses.replace(arguments, **{name: value})  # runs the checks
    except ValueError as error:
        return str(error)
    setattr(arguments, name, value)
    return shown(name, conversation, arguments)


def write_to_terminal(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def print_notice(sentence: str) -> None:
    """Notices go to standard error, so that a pipe gets the text alone."""
    print(f"({sentence})", file=sys.stderr)
