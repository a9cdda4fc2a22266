"""How a conversation is put to a model."""

import pytest
from generation_mini import interactive
from generation_mini.arguments import GenerationArguments
from generation_mini.interactive import Conversation
from modeling_mini import MiniConfig, MiniForCausalLM
from tokenization import ByteTokenizer

END_ID = 7


@pytest.fixture(scope="module")
def model() -> MiniForCausalLM:
    return MiniForCausalLM(MiniConfig.preset("tiny", num_hidden_layers=1))


def test_a_base_model_continues_the_text_so_far(model: MiniForCausalLM) -> None:
    tokenizer = ByteTokenizer()
    model.generation_config.eos_token_id = 2
    conversation = Conversation(model, tokenizer)
    conversation.say("one", max_new_tokens=10)
    conversation.add_answer(" two")
    ids, forgotten = conversation.say("three", max_new_tokens=10)
    assert tokenizer.decode(ids) == "<|bos|>one two\nthree" and forgotten == 0
    conversation.reset()
    assert tokenizer.decode(conversation.say("new", max_new_tokens=10)[0]) == "<|bos|>new"


def test_a_chat_model_gets_its_template_and_history(model: MiniForCausalLM) -> None:
    tokenizer = ByteTokenizer()
    model.generation_config.eos_token_id = [2, END_ID]
    conversation = Conversation(model, tokenizer)
    conversation.say("Hi", max_new_tokens=10)
    conversation.add_answer("Hello")
    ids, _ = conversation.say("Bye", max_new_tokens=10)
    text = "<|bos|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Bye<|end|><|assistant|>"
    assert tokenizer.decode(ids) == text
    conversation.reset()
    ids, _ = conversation.say("a <|end|> that is typed", max_new_tokens=10)
    assert ids.count(END_ID) == 1 and "a <|end|> that is typed<|end|>" in tokenizer.decode(ids)


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(
    model: MiniForCausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["one", "/set temperature 1e-45", "two", "/set temperature 1", "half \udcff", "three"])
    said: list[list[str]] = []

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    class Kept(Conversation):
        def say(self, said_now: str, max_new_tokens: int) -> tuple[list[int], int]:
            said.append([turn.message for turn in self.turns])
            return super().say(said_now, max_new_tokens)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(interactive, "Conversation", Kept)
    model.generation_config.eos_token_id = 2
    interactive.converse(model, ByteTokenizer(), GenerationArguments(max_new_tokens=2))
    notices = capsys.readouterr().err
    assert said == [[], ["one"], ["one"]]
    assert "(No token can be drawn" in notices and "(The prompt is not valid UTF-8 at character 5.)" in notices


@pytest.mark.parametrize("end_ids", [2, [2, END_ID]], ids=["base", "chat"])
def test_the_oldest_turns_leave_when_the_context_is_full(model: MiniForCausalLM, end_ids) -> None:
    tokenizer = ByteTokenizer()
    model.generation_config.eos_token_id = end_ids
    conversation = Conversation(model, tokenizer)
    context, answer = model.config.max_position_embeddings, 60
    for number in range(9):
        before = list(conversation.turns)
        ids, forgotten = conversation.say(f"turn {number} " + "x" * 30, answer)
        assert len(ids) <= context - answer
        assert conversation.turns[:-1] == before[forgotten:], "the oldest go, and no more of them than must"
        if forgotten:
            kept = Conversation(model, tokenizer)
            kept.turns = [*before[forgotten - 1 :], conversation.turns[-1]]
            assert len(kept.ids()) > context - answer
        conversation.add_answer("y" * 20)
    assert before and forgotten
    ids, forgotten = conversation.say("z" * 1000, answer)
    assert len(conversation.turns) == 1 and forgotten, "what is said now stays, however long"
