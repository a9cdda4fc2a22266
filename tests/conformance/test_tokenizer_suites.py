"""transformers' tokenizer suites on the tokenizers of bytes, of characters and of learned merges."""

import re
import string
import tempfile
import unittest

from tokenization import BpeTokenizer, ByteTokenizer, CharTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers_tests.test_tokenization_common import TokenizerTesterMixin
from transformers_tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin

TEXT = TokenizerTesterMixin.integration_test_input_string
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
# The mixins write ASCII, but for this text and one word.
CHARACTERS = sorted({*string.printable, *TEXT, "\u00e9"})


class SavedTokenizer:
    """The mixins take a tokenizer by the name of its repository; here that is a folder."""

    constructs = "tokenizers"

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.make_tokenizer().save_pretrained(folder.name)
        cls.from_pretrained_id = folder.name
        super().setUpClass()


class Bytes(SavedTokenizer):
    subject = "ByteTokenizer"
    tokenizer_class = ByteTokenizer
    # Written down from the definition, not taken from the tokenizer: byte b is id b + 8.
    integration_expected_tokens = [bytes_to_unicode()[byte] for byte in TEXT.encode()]
    integration_expected_token_ids = [8 + byte for byte in TEXT.encode()]
    integration_expected_decoded_text = TEXT

    @staticmethod
    def make_tokenizer() -> ByteTokenizer:
        return ByteTokenizer()


class Characters(SavedTokenizer):
    subject = "CharTokenizer"
    tokenizer_class = CharTokenizer
    integration_expected_tokens = list(TEXT)
    integration_expected_token_ids = [8 + CHARACTERS.index(character) for character in TEXT]
    integration_expected_decoded_text = TEXT

    @staticmethod
    def make_tokenizer() -> CharTokenizer:
        return CharTokenizer.from_text(CHARACTERS)


class Merges(SavedTokenizer):
    subject = "BpeTokenizer"
    tokenizer_class = BpeTokenizer
    # Of "lower lower newer newer", "er" occurs most, and then "w" before it. The rest follows from the definition.
    integration_expected_tokens = re.findall("wer|er|(?s:.)", "".join(Bytes.integration_expected_tokens))
    integration_expected_token_ids = [
        {"er": 264, "wer": 265}.get(token) or 8 + BYTE_OF_CHARACTER[token] for token in integration_expected_tokens
    ]
    integration_expected_decoded_text = TEXT

    @staticmethod
    def make_tokenizer() -> BpeTokenizer:
        return BpeTokenizer.train(["lower lower newer newer"], 266)


class ByteTokenizerTest(Bytes, TokenizerTesterMixin, unittest.TestCase):
    pass


class CharTokenizerTest(Characters, TokenizerTesterMixin, unittest.TestCase):
    pass


class BpeTokenizerTest(Merges, TokenizerTesterMixin, unittest.TestCase):
    pass


class ByteTokenizersBackendTest(Bytes, TokenizersBackendTesterMixin, unittest.TestCase):
    pass


class CharTokenizersBackendTest(Characters, TokenizersBackendTesterMixin, unittest.TestCase):
    pass


class BpeTokenizersBackendTest(Merges, TokenizersBackendTesterMixin, unittest.TestCase):
    pass
