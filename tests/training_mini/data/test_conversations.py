"""Examples to learn from: what becomes of records, how they share sequences, and what wrong ones say."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from modeling_mini import MiniConfig, MiniForCausalLM
from tokenization import CHAT_TEMPLATE, ByteTokenizer
from torch import nn
from training_mini.arguments import DataArguments
from training_mini.data.batches import NOT_LEARNED
from training_mini.data.corpus import ExampleCorpus, TextCorpus, load_corpus
from training_mini.data.packing import ExampleBatches, ExampleCollator, HeldOutExamples

TOKENIZER = ByteTokenizer()


def chat(*turns: str) -> dict:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}


def corpus_of(folder: Path, records: list[dict], **settings: object) -> ExampleCorpus | TextCorpus:
    file = folder / "examples.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return load_corpus(DataArguments(dataset=str(file), cache_dir=str(folder / "cache"), **settings))


def collator_of(corpus: ExampleCorpus, context_length: int = 64, assistant_only: bool = True) -> ExampleCollator:
    return ExampleCollator(corpus.train, context_length, 0, assistant_only)


def test_conversation_becomes_the_ids_of_the_template(tmp_path: Path) -> None:
    records = [chat(f"hé {i}", f"é{i}", "more", "no") for i in range(10)]
    corpus = corpus_of(tmp_path, records)
    assert (corpus.is_chat, corpus.end_ids, len(corpus.train), len(corpus.validation)) == (True, (7,), 9, 1)
    assert corpus.train_size == "9 examples"
    ids = corpus.train.ids[corpus.train.span(0)].tolist()
    assert ids == TOKENIZER.apply_chat_template(records[0]["messages"], return_dict=True)["input_ids"]
    batch = collator_of(corpus).make([0])
    learned = batch.targets[batch.targets != NOT_LEARNED]
    assert TOKENIZER.decode(learned) == "é0<|end|>no<|end|>" * 1 + "é1<|end|>no<|end|>", "two share the sequence"
    before = batch.inputs["input_ids"][batch.targets != NOT_LEARNED]
    assert before[0] == 6, "the first token that the assistant says is predicted from the mark of its turn"


def test_prompt_and_completion(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [{"prompt": f"{i}<|eos|> + 1 =", "completion": f" {i + 1}"} for i in range(10)])
    assert (corpus.is_chat, corpus.end_ids) == (False, (2,))
    ids = corpus.train.ids[corpus.train.span(0)]
    assert ids.tolist() == [1, *TOKENIZER.encode_corpus(b"0<|eos|> + 1 = 1"), 2]
    batch = ExampleCollator(corpus.train, 20, 0, True).make([0])
    assert TOKENIZER.decode(batch.targets[batch.targets != NOT_LEARNED]) == " 1<|eos|>"


def test_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    """Turns of the assistant in the prompt are read and not learned."""
    whole = chat("a", "b", "c", "d")["messages"]
    corpus = corpus_of(tmp_path, [{"prompt": whole[:3], "completion": whole[3:]}] * 6)
    batch = collator_of(corpus, 16).make([0])
    assert TOKENIZER.decode(batch.targets[batch.targets != NOT_LEARNED]) == "d<|end|>"
    ((_, ids),) = corpus.make_prompts(None, ["a"])
    assert corpus.is_chat and TOKENIZER.decode(ids) == "<|bos|><|user|>a<|end|><|assistant|>"


def test_a_prompt_that_is_written_otherwise_where_a_completion_follows_is_refused(tmp_path: Path) -> None:
    """As by a template that begins the thoughts of a model: what is learned would begin in the midst of something."""
    template = CHAT_TEMPLATE + "{%- if add_generation_prompt -%}think{%- endif -%}"
    ByteTokenizer(chat_template=template).save_pretrained(tmp_path / "thinks")
    turns = chat("a", "b")["messages"]
    with pytest.raises(ValueError, match=r"jsonl record 1: the chat template writes the prompt in another way"):
        corpus_of(tmp_path, [{"prompt": turns[:1], "completion": turns[1:]}] * 6, tokenizer=str(tmp_path / "thinks"))


def test_an_empty_prompt_of_a_tokenizer_without_bos_is_an_end(tmp_path: Path) -> None:
    """A model has to read something before it writes."""
    ByteTokenizer(add_bos_token=False).save_pretrained(tmp_path / "bare")
    corpus = corpus_of(tmp_path, [{"prompt": "", "completion": "x"}] * 6, tokenizer=str(tmp_path / "bare"))
    held_out = HeldOutExamples(ExampleCollator(corpus.validation, 16, 0, True), corpus.bytes_per_token, 0)
    assert corpus.make_prompts(held_out, []) == corpus.make_prompts(held_out, [""]) == [("", [2])]


def test_every_token_is_learned_if_asked_for(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [chat("question", "answer")] * 5)
    collator = collator_of(corpus, 32, assistant_only=False)
    ids = corpus.train.ids[corpus.train.span(0)]
    assert collator.make([0]).targets[0, : len(ids) - 1].tolist() == ids[1:].tolist()
    assert collator.learned_tokens.tolist() == [len(ids) - 1] * 4


def test_examples_in_a_row_do_not_see_each_other(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [chat("q" * i, "a" * i) for i in range(1, 12)])
    model = MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=2, max_position_embeddings=64)).eval()
    collator = collator_of(corpus)
    nats = 0.0
    for number in range(len(corpus.train)):
        ids = torch.from_numpy(corpus.train.ids[corpus.train.span(number)].astype(np.int64))
        mask = corpus.train.assistant_mask[corpus.train.span(number)].astype(bool)
        with torch.no_grad():
            logits = model(ids[None, :-1]).logits[0]
        loss = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        nats += loss[torch.from_numpy(mask[1:])].sum().item()
    batch = collator.make(range(len(collator)))
    assert len(collator) < len(corpus.train), "some share a sequence"
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    together = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    assert together.item() == pytest.approx(nats, rel=1e-5)
    assert collator.learned_tokens.sum() == (batch.targets != NOT_LEARNED).sum()


def test_epoch_has_every_row_once_and_processes_share_a_batch(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [chat("q" * 20, str(i)) for i in range(40)])
    batches = ExampleBatches(collator_of(corpus, 32), 4, seed=1)
    assert len(batches.collator) == 36
    first, second = (
        np.concatenate([batches.sequence_numbers(step) for step in part]) for part in (range(9), range(9, 18))
    )
    assert sorted(first) == sorted(second) == list(range(36)) and first.tolist() != second.tolist()
    assert batches.epoch_of(9) == 1
    (whole,) = batches.micro_batches(3)
    shares = [list(batches.micro_batches(3, process, 2, count=2)) for process in range(2)]
    again = torch.cat([shares[process][part].targets for part in range(2) for process in range(2)])
    assert torch.equal(again, whole.targets)
    assert batches.learned_tokens(3) == (whole.targets != NOT_LEARNED).sum()
    again = ExampleBatches(collator_of(corpus, 32), 4, seed=1)
    assert again.sequence_numbers(7).tolist() == batches.sequence_numbers(7).tolist()


def test_longer_than_the_context(tmp_path: Path) -> None:
    records = [chat("q", "a" * 100), chat("q" * 100, "a"), chat("q", "a")] * 4
    corpus = corpus_of(tmp_path, records)
    collator = collator_of(corpus, 16)
    assert collator.notes() == (
        f"Examples longer than the context, learned up to there: {collator.too_long}. "
        f"Examples with nothing to learn in them, left out: {collator.left_out}."
    )
    assert (collator.left_out, collator.too_long) == (3, 7), "of four of each kind, and one is held out"
    assert collator.make([0]).targets[0, -1] == TOKENIZER.encode_corpus(b"a")[0]
    with pytest.raises(ValueError, match="None of the 11 examples has anything to learn within a context of 2 tokens"):
        collator_of(corpus, 2)


def test_held_out(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [chat(f"q{i}", f"a{i}") for i in range(40)], validation_ratio=0.5)
    collator = ExampleCollator(corpus.validation, 32, 0, True)
    held_out = HeldOutExamples(collator, corpus.bytes_per_token, 0)
    text = corpus.text_of(held_out.ids)
    assert held_out.bytes == len(text) and text.startswith(b"a") and len(held_out.ids) == len(text) + 20
    assert len(HeldOutExamples(collator, corpus.bytes_per_token, 64).ids) < len(held_out.ids)
    assert TOKENIZER.decode(collator.prompt(0)).endswith("<|assistant|>")
    groups = [held_out.groups(process, 3, 2) for process in range(3)]
    assert sorted(row for process in groups for group in process for row in group) == list(range(len(collator)))


def test_second_load_is_from_the_cache_and_another_template_another_corpus(tmp_path: Path) -> None:
    records = [chat("q", "a")] * 5
    one, again = corpus_of(tmp_path, records), corpus_of(tmp_path, records)
    assert one.settings == again.settings and len(list((tmp_path / "cache" / "corpora").glob("*/corpus.json"))) == 1
    tokenizer = ByteTokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.save_pretrained(tmp_path / "other")
    other = corpus_of(tmp_path, records, tokenizer=str(tmp_path / "other"))
    assert other.settings != one.settings and not other.has_assistant_mask


def test_corpus_that_was_encoded_before_the_mask_had_its_name(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [chat("q", "a")] * 5)
    facts = next((tmp_path / "cache" / "corpora").glob("*/corpus.json"))
    facts.write_text(facts.read_text().replace('"has_assistant_mask"', '"marks_what_is_said"'))
    old = load_corpus(DataArguments(dataset=str(facts.parent)))
    assert old.has_assistant_mask and old.is_chat and old.settings == corpus.settings


def test_characters_of_examples(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [chat("qü", "a")] * 5, tokenizer="char")
    assert len(corpus.tokenizer) == 8 + len("qüa")


def test_text_in_parts_is_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "qü"}, {"type": "text", "text": " r"}]
    corpus = corpus_of(tmp_path, [{"messages": [{"role": "user", "content": parts}, chat("", "a")["messages"][1]]}] * 5)
    assert corpus.text_of(corpus.train.ids[: int(corpus.train.ends[0])]) == "qü ra".encode()


def test_merges_are_learned_from_the_examples_that_are_trained_on(tmp_path: Path) -> None:
    records = [chat(f"question {i}", "the answer is the answer") for i in range(9)]
    merges = []
    for last in ("zzzz" * 20, "yyyy" * 20):
        # The fifth goes to validation.
        corpus = corpus_of(tmp_path, records[:4] + [chat(last, last)] + records[4:], tokenizer="bpe", vocab_size=280)
        assert last.encode() in corpus.text_of(corpus.validation.ids[:])
        merges.append(corpus.tokenizer.get_vocab())
    assert merges[0] == merges[1] and len(merges[0]) == 280 and "zz" not in merges[0]
    assert len(corpus.tokenizer("the answer", add_special_tokens=False).input_ids) < 4


@pytest.mark.parametrize("name", ["chat-sample", "instruction-sample"])
def test_samples(name: str, tmp_path: Path) -> None:
    corpus = load_corpus(DataArguments(dataset=name, cache_dir=str(tmp_path)))
    assert (len(corpus.train), len(corpus.validation)) == (540, 60)
    assert ExampleCollator(corpus.train, 256, 0, True).notes() == ""


def test_column_that_was_asked_for_is_text(tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": "b" * 50}] * 10
    assert isinstance(corpus_of(tmp_path, records, text_column="completion"), TextCorpus)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "must have a list of messages"),
        ({"messages": [{"role": "user"}]}, "A message needs a content: text, or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of it that is not cannot be read"),
        ({"messages": [{"content": "x"}]}, "a message needs a role and a content that is text"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "has tool_calls, which are not"),
        (
            {"messages": [{"role": "user", "content": "cut\ud83d"}]},
            "not valid UTF-8 at character 4, where it has half of one: U+D83D",
        ),
        ({"messages": [{"role": "bot", "content": "x"}]}, "must be system, user or assistant, got bot"),
        ({"prompt": "x", "completion": None}, "must have messages, or a prompt and a completion"),
        ({"prompt": 1, "completion": "x"}, "must have messages, or a prompt and a completion"),
        ({"prompt": "x", "completion": "cut\ud83d"}, "half of a character (U+D83D) at character 4 of 'completion'."),
    ],
)
def test_record_that_is_no_example(record: dict, message: str, tmp_path: Path) -> None:
    # The tokenizer of characters reads the texts before they are encoded.
    for tokenizer in ("byte", "char") if "cut" in str(record) else ("byte",):
        with pytest.raises(ValueError) as error:
            corpus_of(tmp_path, [record] * 3, tokenizer=tokenizer)
        assert message in str(error.value) and "examples.jsonl record 1" in str(error.value)


def test_examples_in_csv_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    rows = ["1+1=,2", "What is there?,None", "Is it?,true", "agent,007", "nothing,"]
    (tmp_path / "a.csv").write_text("\r\n".join(["\ufeffprompt,completion", *rows, ""]), encoding="utf-8")
    corpus = load_corpus(DataArguments(dataset=str(tmp_path / "a.csv"), cache_dir=str(tmp_path / "cache")))
    texts = [TOKENIZER.decode(corpus.train.ids[corpus.train.span(i)]) for i in range(len(corpus.train))]
    assert texts == [f"<|bos|>{row.replace(',', '')}<|eos|>" for row in rows[: len(texts)]] and len(texts) >= 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.csv.zst"])
def test_empty_file(name: str, tmp_path: Path) -> None:
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(b""))
    with pytest.raises(ValueError, match=f"There is no text in .*{name}"):
        load_corpus(DataArguments(dataset=str(tmp_path / name), cache_dir=str(tmp_path / "cache")))


def test_examples_beside_text(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps(chat("q", "a")))
    (tmp_path / "data" / "b.txt").write_text("text")
    with pytest.raises(ValueError, match="has messages, which are learned only where all files are of records"):
        load_corpus(DataArguments(dataset=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")))


def test_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has too few examples \(1\) to train on some and hold out"):
        corpus_of(tmp_path, [chat("q", "a")])


def test_stream_of_conversations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has messages, which .* not streamed: leave out .*--streaming"):
        (tmp_path / "chats.jsonl").write_text(json.dumps(chat("q", "a")))
        load_corpus(DataArguments(dataset=str(tmp_path / "chats.jsonl"), streaming=True), max_eval_tokens=10)
