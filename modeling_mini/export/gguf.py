"""
Writes GGUF, the format of llama.cpp, for the three architectures of native.py.

These facts about llama.cpp are from its sources (src/models/llama.cpp, qwen3.cpp and stablelm.cpp, in the version of
llama-cpp-python 0.3.36):

- SwiGLU is computed with SiLU only.
- llama has the rotary pairs (2i, 2i + 1), so rows of q_proj and k_proj change places. The others have Mini's pairs.
- Only llama takes a factor for each frequency (`rope_freqs`).
- stablelm has a head of its own, which cannot be tied.
- A file with a tensor that the architecture does not read is not loaded.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from configuration_mini import MiniConfig
from files_mini import writing
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import ExportCard, name_for_files
from .gguf_adapter import Adapter, detach_adapter, write_adapter
from .gguf_vocabulary import Vocabulary
from .native import checked_native

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "stablelm": gguf.MODEL_ARCH.STABLELM,
}
LARGEST_ROPE_FACTOR = 1e30  # such a pair is not rotated: cos(position / 1e30) is 1


def export_gguf(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    types: list[str],
    lora: bool = False,
) -> ExportCard:
    """
    Writes `NAME-TYPE.gguf` for each of `types` into the folder `out`. With `lora` these are of the base, and the
    adapter that lies on it becomes `NAME-lora.gguf`, with its own name. A base that has modules from the adapter has
    the adapter's name too: files of two adapters of a base can then lie in one folder.

    Raises:
        ValueError: if llama.cpp would compute something else or encode text differently. The error gives the reason.
    """
    adapter, name = None, name_for_files(model.name_or_path)
    if lora:
        model, adapter = detach_adapter(model)
        adapter_name, base_name = name, name_for_files(model.name_or_path)
        name = f"{adapter_name}-base" if adapter.in_full else base_name
    native, _ = checked_native(model)
    config = native.config
    if config.hidden_act not in ("silu", "swish"):
        raise uncomputable(f"its hidden_act is {config.hidden_act}, and there it is silu")
    if config.model_type == "qwen3" and config.attention_bias:
        raise uncomputable("it has QK-norm and attention_bias, and qwen3 there has no bias in o_proj")
    rope = rope_of(native)
    vocabulary = Vocabulary.of(tokenizer, config.vocab_size)
    for type_name in types:
        with writing(out):
            write_file(out / f"{name}-{type_name}.gguf", native, model.config, vocabulary, rope, name, type_name)
    example, option, argument = f"{name}-{types[-1]}.gguf", "", ""
    files = [f"{name}-{type_name}.gguf" for type_name in types]
    facts, exactness = {}, ""
    if adapter is not None:
        file = f"{adapter_name}-lora.gguf"
        with writing(out):
            write_adapter(
                out / file, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]], adapter_name, adapter.alpha,
                adapter_tensors(adapter, config.model_type, model.config),
            )  # fmt: skip
        files.append(file)
        option, argument = f" --lora {file}", f', lora_path="{file}"'
        facts["adapter"] = adapter.facts
        exactness = f" `{file}` holds the adapter in float32; with it, the base computes what the merged model does."
        if adapter.in_full:
            modules = ", ".join(f"`{module}`" for module in adapter.in_full)
            exactness += f" The adapter was trained together with {modules}, which the base has from it."

    def usage(flags: str, code: str) -> str:
        return f"""
With [llama.cpp](https://github.com/ggml-org/llama.cpp), where the files are (from the Hub they come by `hf download
PATH_OR_REPOSITORY --local-dir .`):

```bash
llama-cli -m {example}{option} {flags}
```

or with `pip install llama-cpp-python`:

```python
from llama_cpp import Llama

llama = Llama("{example}"{argument}, n_ctx={config.max_position_embeddings}, verbose=False)
{code}
```
"""

    return ExportCard(
        title=f"Mini for llama.cpp, {model.num_parameters() / 1e6:.1f}M parameters",
        usage=usage(
            flags='-p "def " -n 100 -no-cnv', code='print(llama("def ", max_tokens=100)["choices"][0]["text"])'
        ),
        usage_of_chat=usage(
            flags="-cnv",
            code='messages = [{"role": "user", "content": QUESTION}]\n'
            'answer = llama.create_chat_completion(messages, max_tokens=100)["choices"][0]\n'
            'print(answer["message"]["content"])',
        ),
        exactness=f"The architecture `{config.model_type}` of llama.cpp computes what Mini does. F32 holds the "
        f"weights as they are, F16 rounds them, and Q8_0 stores them in blocks of 32 with 8 bits each.{exactness}",
        facts={"files": ", ".join(f"`{file}`" for file in files), **facts},
        library_name="llama.cpp",
        tags=["gguf", config.model_type],
    )


def uncomputable(reason: str) -> ValueError:
    return ValueError(f"llama.cpp cannot compute this model: {reason}.")


def rope_of(native: PreTrainedModel) -> dict[str, Any]:
    """
    The rotary frequencies as llama.cpp takes them: one `factor` that divides all of them, or `factors` for each pair,
    and `attention_factor`, by which cosine and sine are multiplied.

    Raises:
        ValueError: if llama.cpp cannot have these frequencies.
    """
    config, rotary = native.config, native.model.rotary_emb
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        return {}
    if rope_type == "linear":
        return {"factor": config.rope_parameters["factor"]}
    if rope_type in ("dynamic", "longrope"):
        raise uncomputable(
            f"its rope_type is {rope_type}, whose frequencies change with the length of the text, and there they are "
            f"fixed when a model is loaded"
        )
    if config.model_type != "llama":
        raise uncomputable(f"its rope_type is {rope_type}, and {config.model_type} there has default and linear")
    unscaled = config.rope_parameters["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    factors = (unscaled / rotary.inv_freq.float()).clamp(max=LARGEST_ROPE_FACTOR)
    return {"factors": factors, "attention_factor": rotary.attention_scaling}


def write_file(
    path: Path,
    native: PreTrainedModel,
    config: MiniConfig,
    vocabulary: Vocabulary,
    rope: dict[str, Any],
    name: str,
    type_name: str,
) -> None:
    """Writes one file. Its matrices have the type `type_name`; vectors are always F32."""
    kind = native.config.model_type
    architecture = ARCHITECTURES[kind]
    quantization = gguf.GGMLQuantizationType[type_name]
    file_type = gguf.LlamaFileType[f"{'ALL' if type_name == 'F32' else 'MOSTLY'}_{type_name}"]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if kind == "stablelm":
        writer.add_layer_norm_eps(config.norm_eps)
        writer.add_parallel_residual(False)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)

    share = native.config.rope_parameters.get("partial_rotary_factor", 1.0) if kind == "stablelm" else 1.0
    writer.add_rope_dimension_count(int(config.head_dim * share))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if "factor" in rope else gguf.RopeScalingType.NONE)
    if "factor" in rope:
        writer.add_rope_scaling_factor(rope["factor"])
    if "attention_factor" in rope:
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
    vocabulary.write(writer)

    for parameter_name, parameter in weights_of(native):
        add_tensor(writer, *as_llama_cpp(parameter_name, parameter, kind, config), quantization)
    if "factors" in rope:
        add_tensor(writer, "rope_freqs.weight", rope["factors"], quantization)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_llama_cpp(name: str, parameter: torch.Tensor, kind: str, config: MiniConfig) -> tuple[str, torch.Tensor]:
    """
    A parameter under llama.cpp's name, and with its rows as llama.cpp wants them.

    Raises:
        ValueError: if the architecture `kind` has no such parameter.
    """
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config.num_hidden_layers)
    tensor_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if tensor_name is None:
        raise ValueError(f"llama.cpp has no place for {name} in its architecture {kind}.")
    if kind == "llama" and ".q_proj." in name:
        parameter = interleaved(parameter, config.num_attention_heads)
    if kind == "llama" and ".k_proj." in name:
        parameter = interleaved(parameter, config.num_key_value_heads)
    return tensor_name, parameter


def adapter_tensors(adapter: Adapter, kind: str, config: MiniConfig) -> dict[str, torch.Tensor]:
    """The matrices of an adapter by llama.cpp's names. The rows of B are those of the weight that it adds to."""
    tensors = {}
    for layer, (a, b) in adapter.factors.items():
        name, b = as_llama_cpp(f"{layer}.weight", b, kind, config)
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    return tensors


def weights_of(native: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """All parameters. If llama.cpp does not tie the head of this architecture, a tied head is added."""
    weights = [(name, parameter.detach()) for name, parameter in native.named_parameters()]
    if native.config.tie_word_embeddings and native.config.model_type == "stablelm":
        weights.append(("lm_head.weight", native.lm_head.weight.detach()))
    return weights


def interleaved(parameter: torch.Tensor, heads: int) -> torch.Tensor:
    """
    The rows of a projection (heads * head_dim, ...) in llama.cpp's order of rotary pairs: for each i, feature i of the
    first half of a head and then feature i of the second half.
    """
    halves = parameter.reshape(heads, 2, -1, *parameter.shape[1:])
    return halves.transpose(1, 2).reshape(parameter.shape)


def add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, quantization: gguf.GGMLQuantizationType
) -> None:
    """
    Adds a matrix as `quantization`, or as F16 if its rows are not a multiple of a block. A vector is added as F32.

    Raises:
        ValueError: if a weight is too large for F16.
    """
    values = tensor.to(torch.float32).cpu().contiguous().numpy()
    if tensor.ndim == 1:
        quantization = gguf.GGMLQuantizationType.F32
    elif values.shape[-1] % gguf.GGML_QUANT_SIZES[quantization][0]:
        quantization = gguf.GGMLQuantizationType.F16
    if quantization == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
        return
    if quantization == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name} has weights that are too large for F16; write F32.")
    writer.add_tensor(name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
