"""
A corpus: documents, split into train and validation, as memory-mapped files of token ids.

Encoding happens once. The result lies in a cache folder whose name is a hash of the content, the tokenizer and the
settings that matter, so a second run starts at once, and a changed file is a different corpus. Memory use does not
depend on the size of the corpus.
"""

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from files_mini import new_folder, read_json, write_text
from tokenization import (
    CHAT_TEMPLATE,
    EOS_ID,
    CharTokenizer,
    MiniTokenizer,
    encode_messages,
    joins_last_space,
    load_tokenizer,
)
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..arguments import CORPUS_FACTS, Arguments, DataArguments
from ..evaluation import HeldOut, HeldOutText
from ..monitoring import progress_bar
from .batches import Batches, Collator, TrainingBatches
from .conversations import Examples, kind_of, learned_tokenizer, open_examples, write_examples
from .documents import write_documents
from .encoding import LEARNED_BYTES, bytes_per_token, encode_pieces, make_tokenizer
from .files import number_of_files
from .packing import ExampleBatches, ExampleCollator, HeldOutExamples
from .shards import ShardedIds
from .sources import DocumentSource, open_source
from .streaming import DocumentStream, StreamBatches, TokenStream, find_stream

FORMAT = 2  # raised when the files on disk, or the split, come to mean something else
PYTHON_PROMPT = "def "
HELD_OUT_PROMPTS = 2  # examples that a model answers where no prompt was given
# For people to try: how many beginnings, of how many characters at most, from how many tokens of held-out text.
BEGINNINGS, LONGEST_BEGINNING, READ_FOR_BEGINNINGS = 4, 28, 20_000
LONGEST_QUESTION = 80


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """
    What a run learns from and is measured on.

    Attributes:
        train, validation: what is learned, and what is held out.
        tokenizer: what made the ids.
        bytes_per_token: bytes of text per id, `(vocabulary,)`: what turns nats per token into bits per byte.
        settings: what decides the ids, by name: the content, the tokenizer, and how one was applied to the other.
        notes: what is to be known of the files that were read, a sentence each.
        end_ids: the special tokens that end what the model writes, where the corpus shows them.
        problem: a warning for the user, if the data cannot be read again exactly.
        is_chat: whether it teaches conversations.
        is_python: whether it is nothing but Python source.
    """

    name: str
    train: Any
    validation: Any
    tokenizer: PreTrainedTokenizerBase
    bytes_per_token: np.ndarray
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    problem: str = ""
    end_ids: tuple[int, ...] = ()
    is_chat: bool = False
    is_python: bool = False

    @property
    @abstractmethod
    def train_size(self) -> str:
        """How much there is to train on, for people."""

    @abstractmethod
    def make_batches(self, arguments: Arguments, config: PreTrainedConfig) -> tuple[Batches, HeldOut]:
        """
        The global batches of every step, and what is held out.

        Raises:
            ValueError: if there is too little to learn from, or `assistant_only_loss` does not fit the corpus.
        """

    @abstractmethod
    def make_prompts(self, held_out: HeldOut, given: list[str]) -> list[tuple[str, list[int]]]:
        """The text and the ids of each prompt from which the model writes a sample; `given` are those asked for."""

    @abstractmethod
    def beginnings(self, held_out: HeldOut) -> list[str]:
        """A few held-out beginnings that people can let the model continue, for its card and its pages."""

    def min_new_tokens(self, capacity: int) -> int | None:
        """How many of the `capacity` tokens of a sample the model has to write; `None`: it may end when it likes."""
        return None

    def text_of(self, ids: np.ndarray) -> bytes:
        """The bytes of text that a span of the corpus stands for."""
        if isinstance(self.tokenizer, MiniTokenizer):
            return self.tokenizer.decode_corpus(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8")


@dataclass(frozen=True, kw_only=True)
class TextCorpus(Corpus):
    """
    Documents.

    Attributes:
        train, validation: token ids, `(tokens,)`, memory-mapped. `<|eos|>` follows each document.
    """

    train: ShardedIds | np.ndarray
    validation: np.ndarray

    @property
    def train_size(self) -> str:
        return f"{len(self.train):,} tokens"

    def make_batches(self, arguments: Arguments, config: PreTrainedConfig) -> tuple[Batches, HeldOut]:
        if arguments.data.assistant_only_loss:
            raise ValueError(
                f"assistant_only_loss needs records with messages, or with prompt and completion, and "
                f"{arguments.data.dataset!r} is text."
            )
        # The tokenizer's, which stands after each document: the configuration of a trained model may have several ends.
        end = self.tokenizer.eos_token_id
        begin = next((i for i in (config.bos_token_id, self.tokenizer.bos_token_id) if i is not None), end)
        collator = Collator(config.max_position_embeddings, begin, end if arguments.data.document_attention else None)
        ids = self.validation[: arguments.monitoring.max_eval_tokens or None]
        batches = self._training_batches(collator, arguments.optimization.train_batch_size, arguments.run.seed)
        return batches, HeldOutText(ids, self.bytes_per_token, collator)

    def _training_batches(self, collator: Collator, batch_size: int, seed: int) -> Batches:
        return TrainingBatches(self.train, collator, batch_size, seed)

    def make_prompts(self, held_out: HeldOut, given: list[str]) -> list[tuple[str, list[int]]]:
        if not given and self.is_python:
            return [(python_prompt(self.tokenizer), ids_of_function(self.tokenizer))]
        given = given or self.beginnings(held_out)[:1] or ["\n"]
        return [(prompt, ids_of_prompt(self.tokenizer, prompt)) for prompt in given]

    def beginnings(self, held_out: HeldOut) -> list[str]:
        return self._beginnings

    @functools.cached_property  # each prompt and each card asks for them
    def _beginnings(self) -> list[str]:
        ids = self.validation[:READ_FOR_BEGINNINGS]
        documents = np.split(ids, np.flatnonzero(ids == self.tokenizer.eos_token_id))
        lines = b"\n".join(map(self.text_of, documents)).decode("utf-8", "ignore").splitlines()
        if len(lines) < 3:  # text without ends of lines: from the second word on, because the first may be half a one
            text = " ".join(lines)
            lines = ["", text.partition(" ")[2] or text, ""]
        lines = [line for line in lines[1:-1] if any(map(str.isalnum, line))]
        lines = [line for line in lines if line[:1].isalpha()] or lines
        lines = [line for line in lines if line.count(" ") >= 2] or lines  # words, where the script has spaces
        found = list(dict.fromkeys(beginning_of(line) for line in lines[:: max(1, len(lines) // BEGINNINGS)]))
        return [*([python_prompt(self.tokenizer)] if self.is_python else []), *found][:BEGINNINGS]

    def min_new_tokens(self, capacity: int) -> int | None:
        return capacity // 2  # else a document that ends early leaves nothing to look at


@dataclass(frozen=True, kw_only=True)
class StreamCorpus(TextCorpus):
    """
    Documents that are read while they are trained on.

    Attributes:
        train: the stream of token ids, or the first of its parts.
        other_parts: the streams of the other parts.
        block_windows: how many windows are shuffled together, if not the usual number.
    """

    train: TokenStream
    other_parts: tuple[TokenStream, ...] = ()
    block_windows: int | None = None

    @property
    def train_size(self) -> str:
        return "a stream"

    def _training_batches(self, collator: Collator, batch_size: int, seed: int) -> Batches:
        return StreamBatches((self.train, *self.other_parts), collator, batch_size, seed, self.block_windows)


@dataclass(frozen=True, kw_only=True)
class ExampleCorpus(Corpus):
    """
    Examples: conversations, or prompts with their completions.

    Attributes:
        has_assistant_mask: whether it is known which of the ids the model is to write.
    """

    train: Examples
    validation: Examples
    has_assistant_mask: bool

    @property
    def train_size(self) -> str:
        return f"{len(self.train):,} examples"

    def make_batches(self, arguments: Arguments, config: PreTrainedConfig) -> tuple[Batches, HeldOut]:
        assistant_only = arguments.data.assistant_only_loss
        if assistant_only and not self.has_assistant_mask:
            raise ValueError(
                "The chat template of the tokenizer does not mark what the assistant says by {% generation %}, so "
                "nobody knows what to learn; --assistant_only_loss false learns every token."
            )
        settings = config.max_position_embeddings, config.pad_token_id or 0, assistant_only is not False
        train, validation = (ExampleCollator(examples, *settings) for examples in (self.train, self.validation))
        batches = ExampleBatches(train, arguments.optimization.train_batch_size, arguments.run.seed)
        return batches, HeldOutExamples(validation, self.bytes_per_token, arguments.monitoring.max_eval_tokens)

    def make_prompts(self, held_out: HeldOutExamples, given: list[str]) -> list[tuple[str, list[int]]]:
        tokenizer = self.tokenizer
        if not given:
            return list(self._different_prompts(held_out, HELD_OUT_PROMPTS).items())
        if not self.is_chat:
            return [(prompt, ids_of_prompt(tokenizer, prompt)) for prompt in given]
        conversations = [[{"role": "user", "content": prompt}] for prompt in given]
        ids = [encode_messages(tokenizer, messages, add_generation_prompt=True)[0] for messages in conversations]
        return list(zip(given, ids, strict=True))

    def beginnings(self, held_out: HeldOutExamples) -> list[str]:
        return list(self._different_prompts(held_out, BEGINNINGS, is_short_question))

    def _different_prompts(
        self, held_out: HeldOutExamples, count: int, fits: Callable[[str], bool] = lambda text: True
    ) -> dict[str, list[int]]:
        """The first held-out prompts that fit, by their text: a question that is asked often is there once."""
        found: dict[str, list[int]] = {}
        for number in range(len(self.validation)):
            ids = held_out.collator.prompt(number)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if fits(text):
                found.setdefault(text, ids.tolist() or [self.tokenizer.eos_token_id])
            if len(found) == count:
                break
        return found


def ids_of_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of a prompt; where nothing is written before an empty one, a text begins as after the end of another."""
    return tokenizer(prompt, verbose=False).input_ids or [tokenizer.eos_token_id]


def is_short_question(text: str) -> bool:
    return bool(text.strip()) and len(text) <= LONGEST_QUESTION


def python_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """How a function of Python begins, for a model with this tokenizer."""
    return PYTHON_PROMPT.rstrip() if joins_last_space(tokenizer, PYTHON_PROMPT) else PYTHON_PROMPT


def ids_of_function(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The ids of `python_prompt`. Where it has no space, blank lines stand before it, as before most functions: at the
    very beginning, a model takes `def` for a part of `default`.
    """
    prompt = python_prompt(tokenizer)
    return tokenizer(prompt if prompt == PYTHON_PROMPT else f"\n\n\n{prompt}", verbose=False).input_ids


def beginning_of(line: str) -> str:
    """Whole words from the beginning of a line, without the space that follows them; half a line at most."""
    most = min(LONGEST_BEGINNING, max(1, len(line) // 2))
    return (line[:most].rpartition(" ")[0] or line[:most]).rstrip()


def load_corpus(
    arguments: DataArguments,
    max_eval_tokens: int = 0,
    show_progress: bool = False,
    source: DocumentSource | None = None,
) -> Corpus:
    """
    The corpus that the arguments name: from the cache, encoded now, or the stream of a dataset.

    Several processes may call this together: one encodes, the others wait for it.

    Args:
        max_eval_tokens: tokens at the start of a stream that are held out.
        source: documents in the place of those that the arguments name.

    Raises:
        ValueError: for a dataset that does not exist, is empty, or holds bytes that its tokenizer cannot read.
    """
    if arguments.streaming:
        return stream_corpus(arguments, max_eval_tokens)
    if source is None and arguments.is_encoded:
        if arguments.tokenizer == "bpe":
            raise ValueError(f"{arguments.dataset!r} is encoded and has a tokenizer of its own: leave out --tokenizer.")
        corpus = open_corpus(Path(arguments.dataset).name, Path(arguments.dataset))
        check_encoded_by(corpus.tokenizer, arguments)
        return corpus
    source = source or open_source(arguments)
    kind = kind_of(source, arguments.text_column)
    tokenizer = make_tokenizer(arguments)
    cache = Path(arguments.cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    settings = {
        "format": FORMAT,
        "content": content_digest(source, cache, show_progress),
        "tokenizer": tokenizer_key(arguments, tokenizer),
        "validation_ratio": arguments.validation_ratio,
        "errors": arguments.errors,
        "text_column": arguments.text_column,
    }
    if kind is not None:
        template = tokenizer.chat_template if tokenizer is not None else CHAT_TEMPLATE
        settings |= {"kind": kind, "chat_template": short_hash(str(template))}
    if arguments.encoding != "utf-8":
        settings["encoding"] = arguments.encoding
    # How records are read is no setting of a run: one that began before it was written down can go on. Nor is the token
    # that ends a document, which two tokenizers with the same vocabulary may choose otherwise.
    end = "" if tokenizer is None or tokenizer.eos_token_id == EOS_ID else str(tokenizer.eos_token_id)
    folder = cache / "corpora" / short_hash(json.dumps(settings) + source.read_as + end)
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / CORPUS_FACTS).is_file():
            with new_folder(folder) as partial:
                encode_corpus(source, kind, tokenizer, arguments, settings, partial, show_progress)
    corpus = open_corpus(source.name, folder)
    return dataclasses.replace(
        corpus,
        tokenizer=tokenizer or corpus.tokenizer,  # what was asked for may have another chat template than the first one
        notes=notes_of(source, read_json(folder / CORPUS_FACTS)),
        is_python=source.found is not None and all(file.suffix == ".py" for file in source.found.files),
    )


def notes_of(source: DocumentSource, facts: dict[str, Any]) -> tuple[str, ...]:
    """One sentence on the files that were read and those that were not, and one on what is strange in them."""
    sentences = []
    if source.found is not None:
        files = number_of_files(len(source.found.files))
        if facts.get("recoded_files"):
            files += f" ({facts['recoded_files']:,} of them in {facts['settings']['encoding']})"
        amount = size_of(facts["text_bytes"]) + " of text" if "text_bytes" in facts else ""
        if "kind" in facts:
            amount = f"{facts['train_examples'] + facts['validation_examples']:,} examples"
        sentences.append(source.found.sentence(f"Read {files}{amount and f' with {amount}'}"))
    if facts.get("not_utf8"):
        count, first, guess = (facts["not_utf8"][name] for name in ("documents", "first", "guess"))
        which = first if count == 1 else f"{count:,} files, such as {first},"
        sentences.append(f"Not UTF-8, and learned byte by byte as it is: {which}; {guess}.")
    return tuple(sentences)


def size_of(number_of_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if number_of_bytes >= size:
            return f"{number_of_bytes / size:.3g} {unit}"
    return f"{number_of_bytes} bytes"


def check_encoded_by(tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> None:
    """Raises ValueError if another tokenizer is named, or that of another model, than the one that encoded a folder."""
    if arguments.tokenizer is None:
        return
    asked_for = make_tokenizer(arguments)
    is_same = isinstance(tokenizer, CharTokenizer)
    if asked_for is not None:
        is_same = asked_for.get_vocab() == tokenizer.get_vocab()
    if not is_same:
        raise ValueError(
            f"{arguments.dataset!r} was encoded by another tokenizer than {arguments.tokenizer!r}: name the text "
            f"itself by --dataset, so that it is encoded anew."
        )


def open_corpus(name: str, folder: Path) -> Corpus:
    """
    Opens an encoded corpus.

    Raises:
        ValueError: if a file of it is missing, damaged or cut short.
    """
    try:
        return read_corpus(name, folder)
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(
            f"The encoded text in {str(folder)!r} is damaged: remove that folder, and encode the text again. ({detail})"
        ) from error


def read_corpus(name: str, folder: Path) -> Corpus:
    """What `open_corpus` returns, with any error of reading a file that is not as Mini has written it."""
    facts = read_json(folder / CORPUS_FACTS)
    tokenizer = load_tokenizer(folder / "tokenizer")
    about = {
        "name": name,
        "tokenizer": tokenizer,
        "bytes_per_token": bytes_per_token(tokenizer),
        "settings": facts["settings"],
        "is_python": facts["dataset"] == "python-stdlib",
    }
    if "kind" in facts:
        return ExampleCorpus(
            train=open_examples(folder, "train", facts["dtype"]),
            validation=open_examples(folder, "validation", facts["dtype"]),
            # The second is its name in corpora that were encoded before it was renamed.
            has_assistant_mask=facts.get("has_assistant_mask", facts.get("marks_what_is_said")),
            end_ids=tuple(facts["end_ids"]),
            is_chat=facts.get("is_chat", facts["kind"] == "messages"),
            **about,
        )
    train = ShardedIds(folder, "train", facts["dtype"], facts["train_shards"])
    validation = ShardedIds(folder, "validation", facts["dtype"], [facts["validation_tokens"]])[:]
    return TextCorpus(train=train, validation=validation, **about)


def stream_corpus(
    arguments: DataArguments,
    max_eval_tokens: int,
    open_parts: list[Callable[[], DocumentStream]] | None = None,
) -> StreamCorpus:
    """
    A corpus that is read while it is trained on. Its first documents, with `max_eval_tokens` tokens, are held out; with
    `stream_parts`, those of the first part.

    Args:
        open_parts: open documents at their beginning, in the place of those that the arguments name.

    Raises:
        ValueError: for a tokenizer that would have to be learned from the text first, and without `max_eval_tokens`.
    """
    tokenizer = make_tokenizer(arguments)
    if tokenizer is None:
        raise ValueError(
            f"--tokenizer {arguments.tokenizer} needs to read the whole text first, so it cannot go with --streaming."
        )
    if not max_eval_tokens:
        raise ValueError("--streaming holds out the first max_eval_tokens tokens, so --max_eval_tokens cannot be 0.")
    notes: tuple[str, ...] = ()
    if open_parts is None:
        open_parts, notes = find_stream(arguments)

    def encode(name: str, pieces: Iterator[bytes]) -> np.ndarray:
        ids = [*encode_pieces(tokenizer, name, pieces, arguments.errors), np.array([tokenizer.eos_token_id])]
        return np.concatenate(ids)

    first, *others = [TokenStream(open_documents, arguments.dataset, encode) for open_documents in open_parts]
    validation = first.hold_out(max_eval_tokens)
    settings = {
        "dataset": [arguments.dataset, arguments.dataset_config, arguments.dataset_split],
        "content": hashlib.sha256(validation.tobytes()).hexdigest()[:20],
        "tokenizer": tokenizer_key(arguments, tokenizer),
        "errors": arguments.errors,
        "text_column": arguments.text_column,
    }
    if arguments.encoding != "utf-8":
        settings["encoding"] = arguments.encoding
    if others:
        settings["stream_parts"] = len(open_parts)
    return StreamCorpus(
        name=arguments.dataset,
        train=first,
        other_parts=tuple(others),
        validation=validation,
        tokenizer=tokenizer,
        bytes_per_token=bytes_per_token(tokenizer),
        settings=settings,
        notes=notes,
    )


def tokenizer_key(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A hash of what decides, beside the text, the ids that a tokenizer gives. `None` is a learned one."""
    if tokenizer is not None:
        return short_hash(tokenizer.backend_tokenizer.to_str())
    return short_hash("char" if arguments.tokenizer == "char" else f"bpe {arguments.vocab_size} {LEARNED_BYTES}")


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def content_digest(source: DocumentSource, cache: Path, show_progress: bool) -> str:
    """A hash of the content, remembered by names, sizes and times, so that an unchanged corpus is not read again."""
    quick = hashlib.sha256(source.quick_key.encode()).hexdigest()
    remembered = cache / "digests" / quick
    if remembered.is_file():
        return remembered.read_text()
    with progress_bar(f"Looking through {source.name}", source.total_bytes, "bytes", show_progress) as advance:
        digest = source.digest(advance)
    remembered.parent.mkdir(exist_ok=True)
    write_text(remembered, digest)
    return digest


def encode_corpus(
    source: DocumentSource,
    kind: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    arguments: DataArguments,
    settings: dict[str, Any],
    folder: Path,
    show_progress: bool,
) -> None:
    """Writes the ids of documents, or of examples of a kind, the tokenizer, and `corpus.json` into `folder`."""
    if kind is None:
        tokenizer, facts = write_documents(source, tokenizer, arguments, folder, show_progress)
    else:
        tokenizer = tokenizer or learned_tokenizer(source, arguments)
        with progress_bar(f"Encoding {source.name}", None, "examples", show_progress) as advance:
            facts = write_examples(source, kind, tokenizer, arguments.validation_ratio, folder, advance)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_text(
        folder / CORPUS_FACTS, json.dumps({"dataset": source.name, **facts, "settings": settings}, indent=2) + "\n"
    )
