"""
Decoding on a GPU as a CUDA graph: what `model.compile_decoding()` makes there, and `generate` then uses.

A step of a small model is about a hundred kernels of a few microseconds each, and to start one from Python takes longer
than to run it. Here `decoding_step` is recorded once, with all its inputs and outputs at fixed addresses, and replayed
with a single call. The kernels are those of the fast path, for any batch, padding and type of weights. Attention reads
the whole capacity of the cache, and a mask hides what is not written yet.

A recording is for one batch size and one capacity. When the cache is full, the next recording has twice the capacity.
It reads the parameters at their addresses, so training or merging in place have their effect. When a parameter has
another address, the step is recorded again.

CUDA graphs have rules (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). They are kept like this:
nothing in `step` reads a number back from the device, draws a random number, or uses memory that another step has
freed; inputs are copied into buffers that live as long as the graph; and one recording is made at a time.
"""

import threading
from typing import Any

import torch
from configuration_mini import MiniConfig
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .decoding import FIRST_CAPACITY, RotaryTable, Weights, decoding_step

# PyTorch asks for a few runs before a recording, in which libraries allocate their workspaces.
WARM_UP_RUNS = 3
# How many recordings that are not in use are kept. Each holds a cache, and there may be batches of many sizes.
KEPT_RECORDINGS = 4
# PyTorch can make one recording at a time in a process. The lock also guards the list of recordings.
LOCK = threading.Lock()


# A recording depends on the parameters, on these attributes of modules, and on all fields of the config but those that
# have no effect on it.
MODULE_FIELDS = ("eps", "scaling")
FIELDS_WITHOUT_EFFECT = {
    "embedding_dropout", "attention_dropout", "residual_dropout", "initializer_range", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "rope_parameters", "max_position_embeddings",
}  # fmt: skip
CONFIG_FIELDS = tuple(name for name in MiniConfig.own_fields() if name not in FIELDS_WITHOUT_EFFECT)


def constants_of(model: PreTrainedModel) -> list[Any]:
    """The numbers and names of a model that are fixed when its step is recorded."""
    settings = [getattr(model.config, name) for name in CONFIG_FIELDS]
    modules = list(model.modules())
    kinds = [type(module).__qualname__ for module in modules]  # somebody may have replaced an activation
    return settings + kinds + [vars(module).get(name) for name in MODULE_FIELDS for module in modules]


class Recording:
    """
    One step for a batch and a cache of `capacity` tokens, and the buffers that it works on.

    Attributes:
        token_ids: (batch,), read.
        cos, sin: (batch, 1, rotary_dim), read; the first half of `sin` is negated.
        cache_position: (1,), the index in the cache at which the token is written; each step adds 1.
        mask: (batch, 1, 1, capacity), true where a token may be seen; the new one is added by each step.
        caches: as `decoding_step` takes them, (batch, 2 * key_value_heads, capacity, head_dim) of each layer.
        output: (batch, vocab_size), the logits; written by each step.
    """

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int) -> None:
        config, weight = model.config, model.model.embed_tokens.weight
        self.weights = Weights.of(model, may_copy=False)
        self.batch, self.capacity, self.device = batch, capacity, weight.device
        rotary_dim = 2 * len(model.model.rotary_emb.inv_freq)
        # `generate` may be called in inference mode, and tensors made there cannot be written outside of it. This
        # concerns the buffers, and PyTorch's random state, which is made at a recording and written at each replay.
        with torch.inference_mode(False), torch.no_grad():
            self.token_ids = torch.zeros(batch, dtype=torch.long, device=self.device)
            self.cache_position = torch.zeros(1, dtype=torch.long, device=self.device)
            self.cos, self.sin = (weight.new_zeros(batch, 1, rotary_dim) for _ in range(2))
            self.mask = torch.zeros(batch, 1, 1, capacity, dtype=torch.bool, device=self.device)
            shape = (batch, 2 * config.num_key_value_heads, capacity, config.head_dim)
            self.caches = [weight.new_zeros(shape) for _ in range(config.num_hidden_layers)]
            self.record()

    def step(self) -> torch.Tensor:
        """The step itself: logits (batch, vocab_size)."""
        self.mask.index_fill_(3, self.cache_position, True)
        logits = decoding_step(
            self.weights, self.token_ids, self.cos, self.sin, self.caches, self.mask, cache_position=self.cache_position
        )
        self.cache_position.add_(1)
        return logits

    def record(self) -> None:
        """Records the step without running it. `fill` clears what the warm-up runs leave in the buffers."""
        with torch.cuda.device(self.device):  # streams and graphs belong to the current one
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    self.cache_position.zero_()
                    self.step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may allocate memory during the recording.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.output = self.step()

    def fill(self, caches: list[torch.Tensor], mask: torch.Tensor, length: int) -> None:
        """Starts from a text of this length: its keys and values, and its mask (batch or 1, 1, 1, length)."""
        for target, source in zip(self.caches, caches, strict=True):
            target[:, :, :length] = source
            target[:, :, length:].zero_()  # masked, but 0 * stale NaN is still NaN
        self.mask.zero_()
        self.mask[..., :length] = mask
        self.cache_position.fill_(length)

    def replay(self, token_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The logits after these tokens, in a buffer that the next call overwrites."""
        self.token_ids.copy_(token_ids)
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        self.graph.replay()
        return self.output

    def mark_end(self) -> None:
        """Marks the end of the work on this recording so far, in the stream of the caller."""
        self.end = torch.cuda.current_stream(self.device).record_event()

    def wait(self) -> None:
        """Lets the stream of the caller wait for the marked end, which may be in another stream."""
        torch.cuda.current_stream(self.device).wait_event(self.end)


class GraphStep:
    """
    The recordings for one model.

    Raises:
        RuntimeError: if the step cannot be recorded here.
    """

    recording_class = Recording

    def __init__(self, model: PreTrainedModel) -> None:
        self.device_type = model.model.embed_tokens.weight.device.type
        self.recorded_for: list[Any] = []
        # Recordings that no call of `generate` uses now, in the order of their last use. Two threads need two.
        self.free: list[Recording] = []
        self.give_back(self.take(model, 1, FIRST_CAPACITY))

    def suits(self, model: PreTrainedModel) -> bool:
        """Whether it can decode for this model: yes, if the model is still on this type of device."""
        return model.model.embed_tokens.weight.device.type == self.device_type

    def reads_prompt(self, *request: Any) -> bool:
        """Never: a recording has one token of each sequence."""
        return False

    def decoder(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        max_new_tokens: int,
    ) -> "GraphDecoder":
        """The state of one call of `generate`; the arguments are those of `Decoder`."""
        return GraphDecoder(self, model, cache, attention_mask, position_ids, max_new_tokens)

    def take(self, model: PreTrainedModel, batch: int, capacity: int) -> Recording:
        """A recording for the model as it is now. Only the caller uses it until `give_back`."""
        parameters = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in model.parameters()]
        now = [parameters, constants_of(model)]
        with LOCK:
            if now != self.recorded_for:
                self.free, self.recorded_for = [], now
            for recording in self.free:
                if (recording.batch, recording.capacity) == (batch, capacity):
                    self.free.remove(recording)
                    recording.wait()
                    return recording
            recording = self.recording_class(model, batch, capacity)
            recording.made_for = self.recorded_for
            return recording

    def give_back(self, recording: Recording) -> None:
        """Makes a recording free for others, unless the parameters have moved to other addresses."""
        recording.mark_end()
        with LOCK:
            if recording.made_for is self.recorded_for:
                self.free = [*self.free, recording][-KEPT_RECORDINGS:]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model has no recordings, because its parameters have other addresses."""

    def __reduce__(self) -> tuple[type, tuple]:
        """A model that is pickled and loaded again has no recordings."""
        return type(None), ()


class GraphDecoder:
    """Like `Decoder`, for recordings of the step. The arguments are those of `Decoder`."""

    def __init__(
        self,
        step: GraphStep,
        model: PreTrainedModel,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        max_new_tokens: int,
    ) -> None:
        self.owner, self.model, self.cache = step, model, cache
        self.rotary_table = RotaryTable(model, position_ids)
        self.length = self.prompt_length = cache.get_seq_length()
        caches = [torch.cat((layer.keys, layer.values), dim=1) for layer in cache.layers]
        mask = caches[0].new_ones(1, self.length) if attention_mask is None else attention_mask
        self.move_to(self.length + min(max_new_tokens, FIRST_CAPACITY), caches, mask[:, None, None, :])

    def move_to(self, capacity: int, caches: list[torch.Tensor], mask: torch.Tensor) -> None:
        """Continues in a recording with a cache of `capacity` tokens, from these keys, values and mask."""
        # Powers of two, so that texts of about the same length share recordings.
        self.recording = self.owner.take(self.model, len(caches[0]), 1 << (capacity - 1).bit_length())
        self.recording.fill(caches, mask, self.length)
        self.rotary_table.reserve(self.recording.capacity - self.prompt_length)

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The logits (batch, vocab_size) after these tokens (batch,), which are now part of the text."""
        full = self.recording
        if self.length == full.capacity:
            self.move_to(2 * full.capacity, full.caches, full.mask)
            self.owner.give_back(full)
        cos, sin = self.rotary_table.at(self.length - self.prompt_length)
        self.length += 1
        return self.recording.replay(token_ids, cos, sin)

    def give_back(self) -> None:
        """Puts keys and values into transformers' cache, as its own loop would have done."""
        for layer, keys_and_values in zip(self.cache.layers, self.recording.caches, strict=True):
            layer.keys, layer.values = keys_and_values[:, :, : self.length].clone().chunk(2, dim=1)
        self.owner.give_back(self.recording)
