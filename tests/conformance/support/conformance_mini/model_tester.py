"""The models that the suites run on: the four shapes, and the object through which the mixins ask for one."""

import random
import re
import unittest
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from configuration_mini import MiniConfig
from modeling_mini import (
    MiniForCausalLM,
    MiniForQuestionAnswering,
    MiniForSequenceClassification,
    MiniForTokenClassification,
    MiniModel,
)
from transformers.models.auto import modeling_auto

MODEL_CLASSES = (
    MiniModel,
    MiniForCausalLM,
    MiniForSequenceClassification,
    MiniForTokenClassification,
    MiniForQuestionAnswering,
)

SHAPES: dict[str, dict[str, Any]] = {
    "MHA + LayerNorm": {"num_key_value_heads": 4, "norm_type": "layernorm"},
    "GQA + RMSNorm": {"num_key_value_heads": 2, "norm_type": "rmsnorm"},
    "MQA + LayerNorm": {"num_key_value_heads": 1, "norm_type": "layernorm"},
    "GQA + RMSNorm + QK-norm": {"num_key_value_heads": 2, "norm_type": "rmsnorm", "qk_norm": True},
}

# Where the mixins look up, by name, what a class is for. `AutoModel.register` does not touch these tables: a class that
# is absent is tested without labels, and the tests of the rotary embedding skip themselves.
NAME_MAPPINGS = {
    "MODEL_MAPPING_NAMES": "MiniModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "MiniForCausalLM",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "MiniForQuestionAnswering",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "MiniForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "MiniForTokenClassification",
}

SEED = 0


def classes_for_shapes(base: type, shapes: Iterable[str] = tuple(SHAPES)) -> dict[str, type]:
    """A test class of `base` for each shape, by the name it should have in its module."""
    names = {f"{base.__name__}{re.sub(r'[^A-Za-z]', '', shape)}": shape for shape in shapes}
    return {
        name: type(name, (base, unittest.TestCase), {"subject": shape, "__module__": base.__module__})
        for name, shape in names.items()
    }


def seed_everything() -> None:
    """Every generator that the mixins draw from, so that a test sees the same numbers in any order."""
    from transformers_tests import test_modeling_common

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    test_modeling_common.global_rng.seed(SEED)


class OfOneShape:
    """
    The base of every test class with a `model_tester`.

    Attributes:
        subject: the shape, a key of `SHAPES`.
        constructs: what a test must have made to be allowed to pass: `models`, `tokenizers` or `configurations`.
    """

    subject: str
    constructs = "models"
    all_model_classes = MODEL_CLASSES
    model_tester: "MiniModelTester | None" = None  # an attribute of the class: two mixins declare it abstract

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        for table, name in NAME_MAPPINGS.items():
            cls.enterClassContext(patch.dict(getattr(modeling_auto, table), {MiniConfig.model_type: name}))

    def setUp(self) -> None:
        seed_everything()
        self.model_tester = MiniModelTester(self.subject)


class MiniModelTester:
    """What a mixin reads as `self.model_tester`: a tiny configuration of one shape, and inputs that fit it."""

    base_model_class = MiniModel
    causal_lm_class = MiniForCausalLM
    sequence_classification_class = MiniForSequenceClassification
    token_classification_class = MiniForTokenClassification
    question_answering_class = MiniForQuestionAnswering

    is_training = True
    batch_size = 3
    seq_length = 7
    num_labels = 3
    # 99 divides by no number of ranks: the uneven sharding of a head that real vocabularies need.
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 48
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, shape: str) -> None:
        self.shape = SHAPES[shape]

    def config_fields(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": 64,
            # Named, because the test of a partial rotation asks for the key; 1 turns every feature.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
            **self.shape,
        }

    def get_config(self) -> MiniConfig:
        return MiniConfig(**self.config_fields())

    def prepare_config_and_inputs_for_common(self) -> tuple[MiniConfig, dict[str, torch.Tensor]]:
        """The configuration, and `input_ids` and `attention_mask` (batch, length): the first two rows are padded."""
        from transformers_tests.test_modeling_common import ids_tensor

        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        lengths = torch.tensor([[self.seq_length - 2], [self.seq_length - 1], [self.seq_length]])
        attention_mask = (torch.arange(self.seq_length) < lengths).long()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask.to(input_ids.device)}
