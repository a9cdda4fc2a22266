"""
Stand-ins for the bodies of the pipeline tests, which are not in the source distribution.

`PipelineTesterMixin` loads a model and its tokenizer, asks one of these classes for a pipeline and examples, has it
judge the outputs, and then runs the examples in batches itself.
"""

from typing import Any

import pytest
import torch
from transformers import (
    FeatureExtractionPipeline,
    Pipeline,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextClassificationPipeline,
    TextGenerationPipeline,
    TokenClassificationPipeline,
    ZeroShotClassificationPipeline,
)


class TaskTest:
    pipeline_class: type[Pipeline]
    examples: list[str] = ["The tide came in.", "By noon the boats were afloat: é 生."]

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str, **processors: Any
    ) -> tuple[Pipeline, list[str]]:
        # A pipeline leaves the dtype of a model that it is given as it is.
        model = model.to(getattr(torch, dtype))
        return self.pipeline_class(model=model, tokenizer=tokenizer), self.examples


class FeatureExtraction(TaskTest):
    pipeline_class = FeatureExtractionPipeline

    def run_pipeline_test(self, pipeline: Pipeline, examples: list[str]) -> None:
        for example, (features,) in zip(examples, pipeline(examples), strict=True):
            assert len(features) == len(pipeline.tokenizer(example).input_ids)
            assert {len(feature) for feature in features} == {pipeline.model.config.hidden_size}


class TextClassification(TaskTest):
    pipeline_class = TextClassificationPipeline

    def run_pipeline_test(self, pipeline: Pipeline, examples: list[str]) -> None:
        labels = sorted(pipeline.model.config.id2label.values())
        for scores in pipeline(examples, top_k=None):
            assert sorted(score["label"] for score in scores) == labels
            assert sum(score["score"] for score in scores) == pytest.approx(1, abs=2e-3)
            assert scores[0] == max(scores, key=lambda score: score["score"])
        assert [scores["label"] in labels for scores in pipeline(examples)] == [True] * len(examples)


class ZeroShotClassification(TaskTest):
    pipeline_class = ZeroShotClassificationPipeline

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str, **processors: Any
    ) -> tuple[Pipeline, list[str]]:
        model.config.label2id = {"contradiction": 0, "neutral": 1, "entailment": 2}
        pipeline, examples = super().get_test_pipeline(model, tokenizer, dtype)
        # The mixin calls the pipeline with examples alone; the candidates are an argument of this task.
        pipeline._preprocess_params["candidate_labels"] = ["sea", "land"]
        return pipeline, examples

    def run_pipeline_test(self, pipeline: Pipeline, examples: list[str]) -> None:
        for example in examples:
            outputs = pipeline(example, candidate_labels=["sea", "land", "sky"])
            assert outputs["sequence"] == example
            assert sorted(outputs["labels"]) == ["land", "sea", "sky"]
            assert outputs["scores"] == sorted(outputs["scores"], reverse=True)
            assert sum(outputs["scores"]) == pytest.approx(1, abs=2e-3)


class TokenClassification(TaskTest):
    pipeline_class = TokenClassificationPipeline

    def run_pipeline_test(self, pipeline: Pipeline, examples: list[str]) -> None:
        labels = set(pipeline.model.config.id2label.values())
        for example, entities in zip(examples, pipeline(examples, ignore_labels=[]), strict=True):
            # One for each token of the text: <|bos|> is none.
            assert len(entities) == len(pipeline.tokenizer(example).input_ids) - 1
            assert {entity["entity"] for entity in entities} <= labels
        for entity in pipeline(examples[0], ignore_labels=[], aggregation_strategy="simple"):
            assert examples[0][entity["start"] : entity["end"]].strip() == entity["word"].strip()


class TextGeneration(TaskTest):
    pipeline_class = TextGenerationPipeline

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str, **processors: Any
    ) -> tuple[Pipeline, list[str]]:
        model.generation_config.max_new_tokens = 5
        return super().get_test_pipeline(model, tokenizer, dtype)

    def run_pipeline_test(self, pipeline: Pipeline, examples: list[str]) -> None:
        for example, (output,) in zip(examples, pipeline(examples, do_sample=False), strict=True):
            assert output["generated_text"].startswith(example)
            (alone,) = pipeline(example, do_sample=False, return_full_text=False)
            assert example + alone["generated_text"] == output["generated_text"]
        assert len(pipeline(examples[0], do_sample=True, num_return_sequences=3)) == 3
        messages = [{"role": "user", "content": examples[0]}]
        (output,) = pipeline(messages, do_sample=False)
        assert output["generated_text"][0] == messages[0]
        assert output["generated_text"][1]["role"] == "assistant"
