"""Runtimes beside torch that decode the same weights: one sequence, greedy, with a cache. Imported where installed."""

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LlamaCpp:
    """llama.cpp on the F32 file that Mini's export writes, through llama-cpp-python."""

    package = "llama_cpp"

    def __init__(self, checkpoint: Path, folder: Path, context: int, threads: int) -> None:
        import llama_cpp
        from modeling_mini.export import export

        written = export("gguf", checkpoint, folder / "gguf", types=["F32"])
        (file,) = written.glob("*.gguf")
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        self.llama = llama_cpp.Llama(str(file), n_ctx=context, n_threads=threads, verbose=False, **exact)

    def seconds(self, ids: list[int], tokens: int) -> float:
        """The time for a text of `tokens` after a prompt."""
        self.llama.reset()
        start = time.perf_counter()
        for _ in zip(range(tokens), self.llama.generate(ids, temp=0), strict=False):
            pass
        return time.perf_counter() - start


class OnnxRuntime:
    """onnxruntime on the graph that Mini's export writes, with the loop that its callers have to bring."""

    package = "onnxruntime"

    def __init__(self, checkpoint: Path, folder: Path, context: int, threads: int) -> None:
        import onnxruntime
        from modeling_mini.export import export

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Between two calls its threads would wait in a loop, on the cores of whoever has the next turn.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        graph = export("onnx", checkpoint, folder / "onnx") / "onnx" / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(graph), options)

    def seconds(self, ids: list[int], tokens: int) -> float:
        """The time for a text of `tokens` after a prompt."""
        import numpy as np
        from modeling_mini.export.onnx import empty_cache

        start = time.perf_counter()
        input_ids, cache = np.array([ids]), empty_cache(self.session, 1)
        length = 0
        for _ in range(tokens):
            new = input_ids.shape[1]
            positions = np.arange(length, length + new)[None]
            length += new
            feeds = {"input_ids": input_ids, "attention_mask": np.ones((1, length), int), "position_ids": positions}
            logits, *present = self.session.run(None, {**feeds, **cache})
            cache = dict(zip(cache, present, strict=True))
            input_ids = logits[:, -1:].argmax(-1)
        return time.perf_counter() - start


RUNTIMES = {"llama.cpp": LlamaCpp, "onnxruntime": OnnxRuntime}


def installed_runtimes() -> list[str]:
    """The names of those that can be imported here."""
    return [name for name, runtime in RUNTIMES.items() if importlib.util.find_spec(runtime.package) is not None]


def make_runtime(
    name: str, model: "PreTrainedModel", folder: Path, context: int, threads: int
) -> LlamaCpp | OnnxRuntime:
    """A runtime with the weights of a model; its files are written to `folder`."""
    from tokenization import ByteTokenizer

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        model.save_pretrained(checkpoint)
        ByteTokenizer().save_pretrained(checkpoint)
    return RUNTIMES[name](checkpoint, folder, context, threads)
