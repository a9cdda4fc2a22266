"""How a conversation is put to a model."""

import pytest
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
    conversation.prompt_ids("one")
    conversation.add_answer(" two")
    assert tokenizer.decode(conversation.prompt_ids("three")) == "<|bos|>one two\nthree"
    conversation.reset()
    assert tokenizer.decode(conversation.prompt_ids("new")) == "<|bos|>new"


def test_a_chat_model_gets_its_template_and_history(model: MiniForCausalLM) -> None:
    tokenizer = ByteTokenizer()
    model.generation_config.eos_token_id = [2, END_ID]
    conversation = Conversation(model, tokenizer)
    conversation.prompt_ids("Hi")
    conversation.add_answer("Hello")
    ids = conversation.prompt_ids("Bye")
    text = "<|bos|><|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>Bye<|end|><|assistant|>"
    assert tokenizer.decode(ids) == text
