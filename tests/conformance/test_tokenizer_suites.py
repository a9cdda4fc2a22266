"""transformers' tokenizer suites on the byte and the character tokenizer."""

import string
import tempfile
import unittest

from tokenization import ByteTokenizer, CharTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers_tests.test_tokenization_common import TokenizerTesterMixin
from transformers_tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin

TEXT = TokenizerTesterMixin.integration_test_input_string
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


class ByteTokenizerTest(Bytes, TokenizerTesterMixin, unittest.TestCase):
    pass


class CharTokenizerTest(Characters, TokenizerTesterMixin, unittest.TestCase):
    pass


class ByteTokenizersBackendTest(Bytes, TokenizersBackendTesterMixin, unittest.TestCase):
    pass


class CharTokenizersBackendTest(Characters, TokenizersBackendTesterMixin, unittest.TestCase):
    pass
