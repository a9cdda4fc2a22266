"""transformers' model, configuration, training and pipeline suites on Mini, in each of the four shapes."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from configuration_mini import MiniConfig
from conformance_mini.model_tester import (
    MiniModelTester,
    OfOneShape,
    classes_for_shapes,
    seed_everything,
)
from modeling_mini import (
    MiniForCausalLM,
    MiniForSequenceClassification,
    MiniForTokenClassification,
    MiniModel,
)
from tokenization import ByteTokenizer
from transformers_tests import test_pipeline_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

pytestmark = pytest.mark.slow

# Which model a pipeline test loads for a task, and the class that judges what the pipeline returns.
PIPELINE_TASKS = {
    "feature-extraction": (MiniModel, "FeatureExtraction"),
    "text-classification": (MiniForSequenceClassification, "TextClassification"),
    "text-generation": (MiniForCausalLM, "TextGeneration"),
    "token-classification": (MiniForTokenClassification, "TokenClassification"),
    "zero-shot": (MiniForSequenceClassification, "ZeroShotClassification"),
}


class ModelSuite(OfOneShape, ModelTesterMixin, GenerationTesterMixin):
    # Only models added before 2023 are let off this one, and a file without a copyright line counts as such.
    test_can_init_all_missing_weights_before_2023 = True
    _torch_compile_train_cls = MiniForCausalLM


class TrainingSuite(OfOneShape, TrainingTesterMixin):
    pass


class ConfigSuite(OfOneShape):
    suite_name = ConfigTester.__name__
    constructs = "configurations"

    def test_config(self) -> None:
        ConfigTester(self, config_class=MiniConfig, **self.model_tester.config_fields()).run_common_tests()


class PipelineSuite(OfOneShape, PipelineTesterMixin):
    pipeline_model_mapping = {task: model_class for task, (model_class, _) in PIPELINE_TASKS.items()}

    @classmethod
    def setUpClass(cls) -> None:
        """Saves one model of each class where the mixin looks for it, and tells it how to test the tasks."""
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        seed_everything()
        tokenizer = ByteTokenizer()
        config = MiniConfig(**{**MiniModelTester(cls.subject).config_fields(), "vocab_size": len(tokenizer)})
        config.max_position_embeddings = 256
        config.num_labels = 3
        for model_class in set(cls.pipeline_model_mapping.values()):
            repository = Path(folder.name, config.model_type, model_class.__name__)
            model_class(config).save_pretrained(repository)
            tokenizer.save_pretrained(repository)

        entry = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
        summary = {model_class.__name__: entry for model_class in cls.pipeline_model_mapping.values()}
        judges = "transformers_tests.pipelines.test_pipelines_mini"
        tests = {task: {"test": f"{judges}.{name}"} for task, (_, name) in PIPELINE_TASKS.items()}
        for name, value in (("TRANSFORMERS_TINY_MODEL_PATH", folder.name), ("tiny_model_summary", summary)):
            cls.enterClassContext(patch.object(test_pipeline_mixin, name, value))
        cls.enterClassContext(patch.dict(test_pipeline_mixin.pipeline_test_mapping, tests))


for suite in (ModelSuite, TrainingSuite, ConfigSuite, PipelineSuite):
    globals().update(classes_for_shapes(suite))
