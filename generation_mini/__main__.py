"""The program behind `generate.py`, `mini-generate` and `python -m generation_mini`."""

import sys

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
from entry_points_mini import one_sentence_errors
from modeling_mini.loading import find_checkpoint, load_checkpoint
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from .arguments import GenerationArguments, parse_arguments
from .interactive import converse, print_notice, write_to_terminal
from .writing import CharacterStreamer, write_on


def main() -> None:
    with one_sentence_errors():
        run(parse_arguments(sys.argv[1:]))


def run(arguments: GenerationArguments) -> None:
    """Loads the model and writes."""
    logging.disable_progress_bar()
    checkpoint = find_checkpoint(arguments.model)
    model, tokenizer = load_checkpoint(checkpoint, arguments.trust_remote_code)
    if arguments.seed is not None:
        set_seed(arguments.seed)
    if arguments.interactive:
        converse(model, tokenizer, arguments)
        return
    prompt = arguments.prompt
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    prompt_ids = tokenizer(prompt, verbose=False).input_ids or [tokenizer.eos_token_id]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in prompt_ids:
        print_notice(f"The model does not know {unknown_characters(tokenizer, prompt)}, and reads <|unk|> instead.")
    if arguments.stream:
        write_to_terminal(prompt)
        streamer = CharacterStreamer(tokenizer, write_to_terminal)
        write_on(model, tokenizer, prompt_ids, arguments, print_notice, streamer)
        streamer.finish()
        print()
        return
    sequences = write_on(model, tokenizer, prompt_ids, arguments, print_notice)
    for number, ids in enumerate(sequences, start=1):
        if len(sequences) > 1:
            print(f"--- {number} ---")
        print(prompt + tokenizer.decode(ids, skip_special_tokens=True))


def unknown_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The characters of a text that are not in the vocabulary, for a notice."""
    encoded = ((c, tokenizer(c, add_special_tokens=False).input_ids) for c in sorted(set(text)))
    return " ".join(repr(character) for character, ids in encoded if tokenizer.unk_token_id in ids)


if __name__ == "__main__":
    main()
