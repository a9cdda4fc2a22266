"""
One run on several processes: how the model is sharded or replicated over them, and how they agree.

What `accelerate launch` was told is read from its environment. Models are sharded by PyTorch's own `fully_shard` on
every kind of device. accelerate's FSDP2 is silently DDP on a CPU, so that no test on a CPU would see it.
"""

import contextlib
import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from files_mini import not_written, reason_of, write_errors
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from .arguments import Arguments, OptimizationArguments
from .launch import check_launch, check_processes
from .lora import blank_copy, has_lora
from .optimizers import OPTIMIZERS
from .processes import STARTED_BY_MINI

T = TypeVar("T")
# Replaces "true" in ACCELERATE_USE_FSDP. accelerate reads it as false, and a second run in this process still knows by
# it that the launch asked for FSDP2.
SHARDED_BY_MINI = "no"


class Parallel:
    """
    The processes of a run.

    Attributes:
        accelerator: accelerate's view of them.
        is_sharded: whether weights, gradients and optimizer states are sharded over the processes (FSDP2).
        mesh: if the launch asks for one, how many copies of the model there are, over how many processes each copy is
            sharded, and how many processes share each matrix product; otherwise `None`.
        is_deepspeed: whether DeepSpeed shards them; it then owns the optimizer step.
        timeout: how long they wait for one that hangs.
    """

    def __init__(self, arguments: Arguments) -> None:
        check_launch()
        if STARTED_BY_MINI in os.environ and not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate lets each process train alone
        self.timeout = timedelta(seconds=arguments.run.ddp_timeout)
        self.is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", SHARDED_BY_MINI)
        self.mesh = read_mesh(self.is_sharded)
        if self.is_sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError("Mini shards by FSDP2 only: put fsdp_version: 2 into the configuration of accelerate.")
        if arguments.adapter.lora_r and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise ValueError("--lora_r does not work with DeepSpeed here; an adapter is small, so DDP will do.")
        if arguments.adapter.quantization is not None and self.is_sharded:
            raise ValueError(
                f"load_in_{arguments.adapter.quantization} does not work with FSDP2 here; rounded weights are small, "
                f"so DDP will do."
            )
        # Otherwise accelerate would shard the model too, on a GPU.
        if self.is_sharded:
            os.environ["ACCELERATE_USE_FSDP"] = SHARDED_BY_MINI
        if self.tensor_size > 1 and (arguments.adapter.use_dora or arguments.adapter.lora_modules_to_save):
            raise ValueError(
                "With tensor parallelism only plain LoRA works: leave out --use_dora and --lora_modules_to_save, or "
                "tp_size in the launch."
            )
        self.accelerator = make_accelerator(arguments)
        check_processes(self.accelerator)
        if (self.is_sharded or self.accelerator.state.deepspeed_plugin) and arguments.monitoring.internals_steps:
            raise ValueError("--internals_steps looks into a whole model, and this launch shards it; leave it out.")
        self.is_deepspeed = self.accelerator.state.deepspeed_plugin is not None
        if self.is_deepspeed:
            plugin = self.accelerator.state.deepspeed_plugin
            optimization = arguments.optimization
            check_deepspeed(optimization)
            micro_batch = optimization.train_batch_size // self.accelerator.num_processes
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = max(
                1, micro_batch // optimization.gradient_accumulation_steps
            )
            plugin.deepspeed_config["gradient_accumulation_steps"] = optimization.gradient_accumulation_steps
            plugin.deepspeed_config["gradient_clipping"] = optimization.max_grad_norm

    @property
    def name(self) -> str:
        """The kind of parallelism in a word, or an empty string for one process."""
        if self.accelerator.num_processes == 1 and not (self.is_sharded or self.is_deepspeed):
            return ""
        if self.mesh is not None:
            sizes, names = self.mesh._get_mesh()[::-1]
            return "FSDP2, " + " x ".join(f"{size} {name}" for size, name in zip(sizes, names, strict=True))
        return "FSDP2" if self.is_sharded else "DeepSpeed" if self.is_deepspeed else "DDP"

    @property
    def tensor_size(self) -> int:
        """How many processes share each matrix product (tensor parallelism). They compute the same sequences."""
        return self.mesh.tp_size if self.mesh is not None else 1

    @property
    def data_processes(self) -> int:
        """Into how many shares a batch is divided."""
        return self.accelerator.num_processes // self.tensor_size

    @property
    def data_rank(self) -> int:
        """Which of them this process computes. Those that compute the same one are neighbours."""
        return self.accelerator.process_index // self.tensor_size

    def parallelize(self, model: PreTrainedModel) -> nn.Module:
        """
        Moves the model to its device, and wraps or shards it as the launch asks; for DeepSpeed, `prepare` does. What is
        on the meta device stays there.

        Raises:
            ValueError: for quantized weights that would be sharded, and an adapter that tensor parallelism cannot have.
        """
        accelerator = self.accelerator
        if self.is_deepspeed:
            return model
        if not self.is_sharded:
            return accelerator.prepare(model)
        if getattr(model, "is_quantized", False):
            raise ValueError("Quantized weights do not work with FSDP2 here; they are small, so DDP will do.")
        if self.mesh is None:
            mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        else:
            mesh = self.mesh.build_device_mesh(accelerator.device.type)
            for group in mesh.get_all_groups():  # which torch makes with a timeout of its own
                _set_pg_timeout(self.timeout, group)
            if self.tensor_size > 1:
                share_products(model, mesh["tp"])
            mesh = mesh[tuple(self.mesh.dp_dim_names)]
        if not any(parameter.is_meta for parameter in model.parameters()):
            model.to(accelerator.device)
        policy = MixedPrecisionPolicy()
        if accelerator.mixed_precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Within it, backward passes add to the gradients of their own process. The next pass outside averages them."""
        if self.tensor_size > 1:
            # At the end of each backward pass, some gradients are summed over the processes that share a product. They
            # must not hold those of an earlier pass then.
            yield
        elif isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                model.set_requires_gradient_sync(True)
        elif self.is_deepspeed:
            yield  # DeepSpeed counts the micro-batches itself
        else:
            with self.accelerator.no_sync(model):
                yield

    def clip_gradients(self, model: nn.Module, max_norm: float) -> float:
        """Clips the gradients of the whole model to `max_norm`; returns their norm before that, on every process."""
        if self.is_deepspeed:
            return float(self.accelerator.clip_grad_norm_(model.parameters(), max_norm) or 0.0)
        if self.tensor_size == 1:
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        # torch does not compute with tensors of different meshes at once. Matrices are sharded over two dimensions of
        # the mesh and vectors over one, so several processes have the same part of a vector.
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        parts = [gradient.to_local() for gradient in gradients]
        shares = torch.tensor([parts_of(g) / self.accelerator.num_processes for g in gradients], device=parts[0].device)
        squares = torch.stack(torch._foreach_norm(parts)).square()
        norm = self.accelerator.reduce((squares * shares).sum(), reduction="sum").sqrt().item()
        if norm > max_norm:
            torch._foreach_mul_(parts, max_norm / (norm + 1e-6))
        return norm

    def gather_full_model(self, model: nn.Module) -> PreTrainedModel | None:
        """
        Returns the whole model on the main process and `None` on the others. Every process must call it: a sharded
        model is gathered into the memory of the machine of the main process.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        if self.is_deepspeed:
            state = self.accelerator.get_state_dict(model)
        elif self.is_sharded:
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        else:
            return unwrapped if self.accelerator.is_main_process else None
        if not self.accelerator.is_main_process:
            return None
        copy = blank_copy(unwrapped)
        copy.load_state_dict(state)
        return copy

    def double_until_it_fits(
        self, model: nn.Module, share: int, count: int, try_micro_batches: Callable[[int], None]
    ) -> int:
        """
        Doubles `count` until `share` sequences in so many micro-batches fit into the memory of every process.

        Args:
            try_micro_batches: computes both passes on micro-batches of so many sequences.

        Raises:
            ValueError: if the smallest micro-batch does not fit.
        """
        while True:
            sequences, fits = share // count, True
            try:
                try_micro_batches(sequences)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                fits = False
            model.zero_grad()
            clear_device_cache(garbage_collection=True)
            if not self.anyone(not fits):
                return count
            if sequences == 1 or share % (2 * count):
                raise ValueError(
                    f"A micro-batch of {sequences} sequences does not fit into memory, and cannot be halved; use a "
                    f"smaller --size, a shorter --max_position_embeddings or --gradient_checkpointing."
                )
            count *= 2

    def raise_everywhere(self, error: Exception | None) -> None:
        """If the main process has an error, raises it on every process. Every process calls it, most with `None`."""
        kind = next((kind for kind in (OSError, ValueError, RuntimeError) if isinstance(error, kind)), RuntimeError)
        happened, kind, message = self.from_main((error is not None, kind, str(error)))
        if error is not None:
            raise error
        if happened:
            raise kind(message)

    def anyone(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return any(self.gather(flag))

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """The values of all processes, on every process; of `group`, where they are not to meet in the default one."""
        if self.accelerator.num_processes == 1:
            return [value]
        values: list[Any] = [None] * self.accelerator.num_processes
        dist.all_gather_object(values, value, group=group)
        return values

    def together(self, target: Path, write: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """
        Writes a part of `target` on every process. All go on, with what `write` returned on each of them.

        Raises:
            OSError: on every process, if one of them could not write.
        """
        reason, result = "", None
        try:
            result = write()
        except write_errors() as error:
            reason = reason_of(error)
        outcomes = self.gather((reason, result), group)
        if reasons := [reason for reason, _ in outcomes if reason]:
            raise not_written(target, reasons[0])
        return [result for _, result in outcomes]

    @functools.cached_property
    def background_group(self) -> dist.ProcessGroup | None:
        """
        All processes once more, for what they do in the background: two threads must not meet in one group. It is on
        the CPU, where files are written. Every process asks for it at the same place.
        """
        return dist.new_group(backend="gloo", timeout=self.timeout) if self.accelerator.num_processes > 1 else None

    def from_main(self, value: object) -> object:
        """The value of the main process, on every process."""
        return broadcast_object_list([value])[0]


def read_mesh(is_sharded: bool) -> ParallelismConfig | None:
    """
    The mesh that `parallelism_config` in a configuration of accelerate asks for; `None` without one.

    Raises:
        ValueError: for a mesh that does not fit the processes, or of kinds that Mini does not have.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() not in ("true", SHARDED_BY_MINI):
        return None
    # Otherwise accelerate would make the mesh too, and prepare for it what Mini does itself.
    os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = SHARDED_BY_MINI
    mesh, processes = ParallelismConfig(), int(os.environ.get("WORLD_SIZE", 1))
    sizes = {name: size for name, size in mesh._sizes.items() if size > 1}
    if mesh.cp_size > 1 or mesh.sp_size > 1:
        raise ValueError("Mini has no context or sequence parallelism: leave cp_size and sp_size out of the launch.")
    if not is_sharded or mesh.dp_shard_size == 1:
        raise ValueError("A mesh of processes is for FSDP2, and needs a dp_shard_size of at least 2.")
    if mesh.total_size != processes:
        asked = " x ".join(f"{name}_size {size}" for name, size in sizes.items())
        raise ValueError(
            f"The mesh of {asked} is for {mesh.total_size} processes, and {processes} were started: change one of them."
        )
    return mesh


def check_mesh(config: PreTrainedConfig, tensor_size: int) -> None:
    """
    Raises:
        ValueError: if so many processes cannot share the products of a model of this shape.
    """
    if tensor_size == 1:
        return
    plan = config.base_model_tp_plan
    if not plan:
        name = type(config).__name__
        raise ValueError(f"{name} has no plan for tensor parallelism: leave tp_size out of the launch.")
    names = ["vocab_size", "hidden_size", "intermediate_size"]
    if any(".self_attn." in name for name in plan):
        names += ["num_attention_heads", "num_key_value_heads"]
    for name in names:
        if (size := getattr(config, name, tensor_size)) % tensor_size:
            raise ValueError(f"tp_size {tensor_size} does not divide {name} ({size}): choose another one of them.")


def share_products(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """
    Tensor parallelism: shares the matrices out over a mesh, as the plan of the model says, and their adapters likewise.

    Raises:
        ValueError: for an adapter of an embedding or of the head.
    """
    # torch warns at the first step that two gathers of small tensors could be one, and that logits must not be changed
    # in place, which nothing does.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model = model.get_base_model() if has_lora(model) else model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if is_tied := head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight))  # both are in the plan, each by its own name
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    apply_tensor_parallelism(model, mesh, with_adapters(plan, model))
    if is_tied:
        model.tie_weights()


def with_adapters(plan: dict[str, str], model: nn.Module) -> dict[str, str]:
    """
    A plan of tensor parallelism for a model with LoRA. Where the rows of a matrix are divided among processes, so are
    those of the adapter's B; where its columns are, those of A. The other of the two is small, and each process has all
    of it.

    Raises:
        ValueError: for an adapter of a layer that is shared in another way.
    """
    modules, result = dict(model.named_modules()), {}
    for name, style in plan.items():
        if not hasattr(modules.get(name), "lora_A"):
            result[name] = style
            continue
        if style not in ("colwise", "rowwise"):
            raise ValueError(f"With tensor parallelism, {name} cannot have an adapter: leave it out of the targets.")
        for part in (f"{name}.base_layer", f"{name}.{'lora_B' if style == 'colwise' else 'lora_A'}.default"):
            result |= {f"{part}.{parameter}": style for parameter, _ in modules[part].named_parameters(recurse=False)}
            result[part] = style
    return result


def parts_of(tensor: DTensor) -> int:
    """Into how many parts a tensor is divided; there may be copies of them."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model, which it names in `_no_split_modules`."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def join_after_restart(timeout: timedelta) -> None:
    """
    Joins the other processes that torchrun has started again. torchrun has one store for all of its starts. A process
    would find the addresses of dead ones there, and wait for them (torch 2.13). So each start has a prefix of its own.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, processes, is_master=False, timeout=timeout)
    on_cpus = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    dist.init_process_group(
        "gloo" if on_cpus else "nccl",
        store=dist.PrefixStore(f"start {start}", store),
        rank=rank,
        world_size=processes,
        timeout=timeout,
    )


def make_accelerator(arguments: Arguments) -> Accelerator:
    """
    The accelerator, with bfloat16 and TF32 where a GPU has them unless the user decided.

    Raises:
        ValueError: for a precision that the device lacks.
    """
    run = arguments.run
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    has_tf32 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if run.tf32 and not has_tf32:
        raise ValueError("--tf32 needs an NVIDIA GPU of the Ampere generation or later; leave it out here.")
    if run.bf16 and torch.cuda.is_available() and not has_bf16:
        raise ValueError(f"--bf16: {torch.cuda.get_device_name()} has no bfloat16; use --bf16 false.")
    if has_tf32:  # also where it is not wanted: an earlier run in this process may have turned it on
        torch.set_float32_matmul_precision("highest" if run.tf32 is False else "high")
    launched_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched_precision not in ("no", "bf16"):
        raise ValueError(
            f"accelerate was told mixed_precision {launched_precision}, and Mini trains in bf16 or no: float16 needs "
            f"scaled losses, and on a CPU it would silently be float32."
        )
    bf16 = run.bf16 if run.bf16 is not None else has_bf16 or launched_precision == "bf16"
    trackers = arguments.monitoring.report_to
    AcceleratorState._reset_state()  # of an earlier run in this process, which may have had another precision
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=run.ddp_timeout))
    join_after_restart(timeout.timeout)
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        log_with=trackers or None,
        project_dir=str(arguments.output_dir),
        kwargs_handlers=[timeout],
    )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.device.type == "cpu" and launched and torch.get_num_threads() == 1:
        # `accelerate launch` sets OMP_NUM_THREADS to 1 by default, which is half the speed on two cores.
        cores = psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))))
    return accelerator


def check_deepspeed(optimization: OptimizationArguments) -> None:
    """Raises `ValueError` for settings that need the step of the optimizer, which DeepSpeed does by itself."""
    if not OPTIMIZERS[optimization.optimizer].is_single:
        raise ValueError(
            f"--optimizer {optimization.optimizer} does not work with DeepSpeed; give --optimizer adamw, or shard by "
            f"fsdp2.yaml."
        )
    settings = {"--ema_decay": optimization.ema_decay > 0, "--find_batch_size": optimization.find_batch_size}
    for setting, is_given in settings.items():
        if is_given:
            raise ValueError(f"{setting} does not work with DeepSpeed; leave it out, or shard by fsdp2.yaml.")
