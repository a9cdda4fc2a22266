"""
The tests of transformers that do not run on Mini, each with the reason, and those that rightly make no model.

A skip is expected if its test and transformers' message are both in an entry. What only a machine with more hardware
or more libraries can run may pass; what cannot run on Mini at all may not, so the list cannot outlive its reasons.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

MISSING = r"[Tt]est requires .*"


@dataclass(frozen=True)
class Skip:
    """
    Attributes:
        why: the reason, as docs/CONFORMANCE.md states it.
        message: what transformers says, a regular expression for the whole of it.
        tests: names of tests, with shell wildcards.
        elsewhere: whether another machine can run them.
    """

    why: str
    message: str
    tests: tuple[str, ...]
    elsewhere: bool = False


EXPECTED_SKIPS = (
    Skip(
        "needs an accelerator, which the tests do not assume",
        MISSING,
        (
            "test_can_load_with_device_context_manager",
            "test_can_load_with_global_device_set",
            "test_cpu_offload",
            "test_disk_offload_bin",
            "test_disk_offload_safetensors",
            "test_flex_attention_with_grads",
            "test_model_parallelism",
            "test_sdpa_can_compile_dynamic",
            "test_sdpa_can_dispatch_on_flash",
            "test_torch_compile_for_training",
        ),
        elsewhere=True,
    ),
    Skip(
        "needs the flash-attn or kernels library, which run on an accelerator",
        MISSING,
        ("test_flash_attn_*", "test_kernels_can_load_without_crashing"),
        elsewhere=True,
    ),
    Skip("needs DeepSpeed and an accelerator", MISSING, ("test_resize_*_with_deepspeed*",), elsewhere=True),
    Skip("needs torchao, which Mini does not use", MISSING, ("test_tp_generation_quantized",), elsewhere=True),
    Skip(
        "for models composed of several models",
        r"Model is not a composite model\.|This model is not composite|MiniModel does not support SDPA|No subconfigs.*",
        (
            "test_attn_implementation_composite_models",
            "test_can_set_attention_dynamically_composite_model",
            "test_internal_model_config_and_subconfig_are_same",
            "test_sdpa_can_dispatch_composite_models",  # the message names SDPA, the condition is composition
        ),
    ),
    Skip(
        "for mixtures of experts",
        r"MiniModel does not support grouped_mm|.* no sparse experts\.|Not an MoE model|.*`output_router_logits`.*"
        r"|Model does not have a.* expert parallel plan.*",
        (
            "test_eager_matches_batched_and_grouped_inference_*",
            "test_fsdp2_expert_parallel_*",
            "test_hsdp_grad_accumulation_vs_single_device_2_expert_parallel",
            "test_moe_models_record_router_logits",
            "test_moe_parallel_plans_shard_experts",
            "test_output_router_logits_from_config",
        ),
    ),
    Skip(
        "for checkpoints whose weights have other names than the modules",
        r"No conversion found for .*",
        ("test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"),
    ),
    Skip(
        "for models that keep some modules in float32; Mini keeps none",
        r"Mini\w+ (class )?has no _keep_in_fp32_modules .*",
        ("test_keep_in_fp32_modules", "test_keep_in_fp32_modules_exist"),
    ),
    Skip(
        "for encoder-decoder models",
        r"No sequence-to-sequence language modeling head to check",
        ("test_encoder_decoder_loss_no_double_shift",),
    ),
    Skip(
        "for learned position embeddings; Mini's are rotary",
        r"Model does not have position embeddings",
        ("test_resize_position_vector_embeddings",),
    ),
    Skip("for sliding-window attention", r"Model does not support sliding window mask", ("test_sliding_window_mask",)),
    Skip("for models of images", r".* has no axial RoPE layer defined\.", ("test_vision_axial_rope",)),
    Skip(
        "stops at the classification heads, whose annotations in transformers it cannot read; "
        "MiniModel and MiniForCausalLM come before them and are compared",
        r"Model does not support output_attentions",
        ("test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",),
    ),
    Skip(
        "for processors, which hold a tokenizer",
        r"tokenizer doesn't accept chat templates at input",
        ("test_chat_template_save_loading",),
    ),
    Skip(
        "for pipelines over images, audio, tables or masks",
        rf".* is not in `self\.pipeline_model_mapping` .*|`run_pipeline_test` is currently not implemented\.|{MISSING}",
        (
            "test_pipeline_any_to_any*",
            "test_pipeline_audio_*",
            "test_pipeline_automatic_speech_recognition*",
            "test_pipeline_depth_estimation*",
            "test_pipeline_document_question_answering*",
            "test_pipeline_fill_mask*",
            "test_pipeline_image_*",
            "test_pipeline_mask_generation*",
            "test_pipeline_object_detection*",
            "test_pipeline_table_question_answering*",
            "test_pipeline_text_to_audio*",
            "test_pipeline_video_classification*",
            "test_pipeline_zero_shot_audio_*",
            "test_pipeline_zero_shot_image_*",
            "test_pipeline_zero_shot_object_*",
        ),
    ),
)

# transformers passes these when the model has no such method. They count as skipped.
HOLLOW_PASSES = {
    "test_get_audio_features_*": "for models of audio",
    "test_get_image_features_*": "for models of images",
    "test_get_text_features_*": "for models of text beside another modality",
    "test_get_video_features_*": "for models of video",
}

# These check something and make no model or tokenizer of Mini's on the way.
MAKES_NOTHING = {
    "test_config_attn_implementation_setter": "makes configurations",
    "test_generation_tester_mixin_inheritance": "compares classes",
    "test_local_files_only": "loads with AutoTokenizer, which makes a tokenizer of transformers' own class",
    "test_model_main_input_name": "reads signatures",
    "test_num_layers_is_small": "checks the configuration of the tests",
}


def _entries(test: str) -> list[Skip]:
    return [entry for entry in EXPECTED_SKIPS if any(fnmatchcase(test, pattern) for pattern in entry.tests)]


def why_skipped(test: str, message: str) -> str | None:
    """Our reason for a skip with transformers' message, or None if it is not on the list."""
    return next((entry.why for entry in _entries(test) if re.fullmatch(entry.message, message, re.DOTALL)), None)


def why_hollow(test: str) -> str | None:
    """Our reason for a pass that tests nothing, or None if it is not on the list."""
    return next((why for pattern, why in HOLLOW_PASSES.items() if fnmatchcase(test, pattern)), None)


def cannot_pass(test: str) -> bool:
    """Whether the list says that no machine can run a test on Mini."""
    return any(not entry.elsewhere for entry in _entries(test))
