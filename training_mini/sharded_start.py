"""
Starts a model that is sharded over processes without having the whole of it in memory anywhere.

The model is made on the meta device, which has shapes and no values, and sharded there. Then it is filled, one
parameter at a time: each process computes or reads a parameter and keeps its own part. New weights are bit by bit those
of a model that is made whole from the same seed, on any number of processes: the same draws are made in the same order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import set_seed
from modeling_mini.loading.checkpoints import load_config
from modeling_mini.loading.quantization import is_quantized
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .checkpoints import ignore_being_alone
from .muon import shared_out

aten = torch.ops.aten
# What fills a tensor without reading it.
FILLING = (aten.normal_, aten.uniform_, aten.fill_, aten.zero_, aten.exponential_, aten.random_, aten.copy_)


class WithoutMemory(TorchDispatchMode):
    """
    Within it, what `torch.empty` makes is on the meta device: the parameters of all modules of torch begin so. What is
    computed in another way, such as the frequencies of a rotary embedding, is computed as always.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []  # kept alive, so that no two storages have one address

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not aten.empty.memory_format:
            return self.compute(func, args, kwargs)
        tensor = func(*args, **{**kwargs, "device": torch.device("meta")})
        self.made.append(tensor)
        return tensor

    def compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def numbers(self) -> dict[int, int]:
        """By the storage of a tensor, its number in the order in which they were made."""
        return {storage_of(tensor): number for number, tensor in enumerate(self.made)}


class OneAtATime(WithoutMemory):
    """
    Within it, a tensor on the meta device has values while an operation computes with it. When an operation needs
    other tensors, `keep` gets the values of those before. Tensors are numbered in the order in which they were made.

    Args:
        keep: called with the number of a tensor and its values, on the CPU.
        load: returns the values that were kept under a number.
    """

    def __init__(self, keep: Callable[[int, torch.Tensor], None], load: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self.keep, self.load = keep, load
        self.number_of: dict[int, int] = {}
        self.held: dict[int, torch.Tensor] = {}
        self.kept: set[int] = set()
        self.seems_real = SeemsReal()

    def __enter__(self) -> "OneAtATime":
        super().__enter__()
        self.seems_real.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.seems_real.__exit__(*error)
        super().__exit__(*error)

    def compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if is_empty(leaf)]
        if not tensors or func in (aten.detach.default, aten.alias.default):
            return func(*args, **kwargs)
        if len(self.number_of) < len(self.made):
            self.number_of = self.numbers()
        needed = {self.number_of[storage_of(tensor)]: tensor for tensor in tensors}
        self.release(needed)
        for number, tensor in needed.items():
            if number not in self.held:
                is_read = number in self.kept and func.overloadpacket not in FILLING
                self.held[number] = self.load(number) if is_read else torch.empty(tensor.shape, dtype=tensor.dtype)

        def with_values(leaf: Any) -> Any:
            return self.held[self.number_of[storage_of(leaf)]] if is_empty(leaf) else leaf

        result = func(*tree_map(with_values, args), **tree_map(with_values, kwargs))
        # An operation in place gives back the tensor on the meta device, because the caller goes on with that one.
        return args[0] if args and result is with_values(args[0]) else result

    def release(self, needed: Any = ()) -> None:
        """Gives `keep` all tensors but these."""
        for number in [number for number in self.held if number not in needed]:
            self.keep(number, self.held.pop(number))
            self.kept.add(number)


class SeemsReal(TorchFunctionMode):
    """Within it, `is_meta` is false for every tensor: some initializations of torch do nothing on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return False if func == torch.Tensor.is_meta.__get__ else func(*args, **(kwargs or {}))


def is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class ShardedStart:
    """
    A model on the meta device, which is to be sharded and then filled.

    Args:
        make: makes the model as it is made whole.
        folder: the checkpoint folder that its weights are in; `None` for new weights.

    Attributes:
        model: the model.
    """

    def __init__(self, make: Callable[[], PreTrainedModel], folder: Path | None = None) -> None:
        self.make, self.folder = make, folder
        mode = WithoutMemory()
        with mode:
            self.model = make()
        numbers = mode.numbers()
        self.names = {numbers[storage_of(p)]: name for name, p in self.model.named_parameters() if p.is_meta}
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    @classmethod
    def of_checkpoint(cls, name: str) -> "ShardedStart | None":
        """
        The model of `--model`. `None` where it must be loaded whole: a name of the Hub, quantized weights, weights that
        have other names in the files than in the model, and a damaged folder, of which loading says what is wrong.
        """
        folder = Path(name)
        if not folder.is_dir():
            return None
        try:
            config = load_config(name, trust_remote_code=False)  # else transformers may ask on the terminal
            generation_config = GenerationConfig.from_pretrained(name)
            if is_quantized(config):
                return None
            config.dtype = torch.float32
            start = cls(lambda: AutoModelForCausalLM.from_config(config), folder)
            if not fits(start.model, folder):
                return None
        except (OSError, ValueError, SafetensorError):
            return None
        start.model.generation_config = generation_config
        return start

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Fills the model with its weights, after it was materialized. Every process calls it."""
        if self.folder is not None:
            self._read(self.folder)
        else:
            set_seed(seed)
            self._initialize()

    def materialize(self, device: torch.device) -> None:
        """Allocates the part of this process. Then the buffers have their values, and the parameters have none yet."""
        self.model.to_empty(device=device)
        self._fill_buffers(self.buffers)

    @torch.no_grad()
    def _fill_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def _initialize(self) -> None:
        parameters = dict(self.model.named_parameters())
        parameter_of = {number: parameters[name] for number, name in self.names.items() if name in parameters}

        def keep(number: int, whole: torch.Tensor) -> None:
            if number in parameter_of:  # others were replaced, such as the weight of a head that is tied
                copy_part(whole, parameter_of[number])

        def load(number: int) -> torch.Tensor:
            parameter = parameter_of[number].detach()
            return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()

        mode = OneAtATime(keep, load)
        with mode:
            made = self.make()
        mode.release()
        for name, parameter in made.named_parameters():
            if not parameter.is_meta:  # made by torch.ones, for example
                copy_part(parameter, parameters[name])
        self._fill_buffers(dict(made.named_buffers()))

    def _read(self, folder: Path) -> None:
        ignore_being_alone()
        parameters = {name: p.detach() for name, p in named_as_in(self.model, metadata_of(folder)).items()}
        dcp.load(parameters, storage_reader=HuggingFaceStorageReader(str(folder)))


def copy_part(whole: torch.Tensor, parameter: torch.Tensor) -> None:
    """Copies into a parameter, or into the part of it that is on this process, what belongs there."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(shared_out(whole, parameter).to_local())
    else:
        parameter.copy_(whole)


def metadata_of(folder: Path) -> dict[str, TensorStorageMetadata]:
    """The names and shapes of the weights in a checkpoint folder."""
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def named_as_in(model: nn.Module, known: dict[str, Any]) -> dict[str, nn.Parameter]:
    """The parameters of a model; one that is tied has two names, and gets that which is in `known`."""
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    chosen = (next((name for name in group if name in known), group[0]) for group in names.values())
    return {name: parameters[name] for name in chosen}


def fits(model: nn.Module, folder: Path) -> bool:
    """Whether the weights in a folder are exactly the parameters of a model, by name and shape, and are no integers."""
    known = metadata_of(folder)
    if not all(tensor.properties.dtype.is_floating_point for tensor in known.values()):
        return False
    shapes = {name: parameter.shape for name, parameter in named_as_in(model, known).items()}
    return shapes == {name: tensor.size for name, tensor in known.items()}
