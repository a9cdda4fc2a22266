"""Makes the parts of a run from its settings: checks, the run folder, the model, its optimizers and its batches."""

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from memory_mini import free_memory
from modeling_mini.loading.checkpoints import load_checkpoint, load_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .arguments import Arguments
from .checkpoints import (
    TrainerState,
    Weights,
    architecture_of,
    check_state,
    find_state,
    methods_of,
    order_of,
    read_state,
    states_of,
)
from .cpu_attention import attention_by
from .data.batches import Batches
from .data.corpus import Corpus, ExampleCorpus, tokenizer_key
from .data.encoding import make_tokenizer
from .data.own import own_corpus
from .distributed import Parallel, blocks_of, check_mesh
from .evaluation import HeldOut, compressor_bits_per_byte
from .hooks import NO_HOOKS, Hooks
from .lora import add_lora, describe_training
from .memory import check_memory
from .optimization import ExponentialMovingAverage, make_optimizers
from .own_model import config_class_of, has_own_code, name_code
from .run_folder import RunFolder
from .sharded_start import ShardedStart

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}  # how a small model writes well


@dataclass
class Run:
    """
    The parts of a run.

    Attributes:
        run_folder: the folder for everything that the run writes; `folder` is its path.
        batches: the global batch of each step.
        held_out: the held-out text. `compressors` has the bits per byte that gzip and xz need for it.
        model: the model, wrapped or sharded as the launch asks. `unwrapped_model` is the same model without wrappers.
        blocks: the repeated blocks of the model.
        ema: the moving average of the weights, or `None`.
        state: how far the run is. A run that is resumed has the state of its newest complete checkpoint.
        problems: sentences for the user: one for each damaged checkpoint, and others.
    """

    arguments: Arguments
    parallel: Parallel
    run_folder: RunFolder
    corpus: Corpus
    batches: Batches
    held_out: HeldOut
    held_out_bytes: int
    compressors: dict[str, float]
    config: PreTrainedConfig
    model: nn.Module
    unwrapped_model: PreTrainedModel
    blocks: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    ema: ExponentialMovingAverage | None
    state: TrainerState
    problems: list[str]

    @property
    def accelerator(self) -> Accelerator:
        return self.parallel.accelerator

    @property
    def folder(self) -> Path:
        return self.run_folder.path

    @property
    def has_own_code(self) -> bool:
        """Whether the class of the model is the user's own, so that loading it elsewhere runs their code."""
        return has_own_code(self.unwrapped_model)

    @property
    def title(self) -> str:
        """The name of the run, which stands over the curves."""
        return self.folder.resolve().name

    @property
    def weights(self) -> Weights:
        """The tensors of a checkpoint."""
        return Weights(self.parallel, self.model, self.optimizers, self.ema)

    def ema_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, the model has the moving average as its weights, if there is one."""
        return self.ema.in_place() if self.ema is not None else contextlib.nullcontext()

    @property
    def is_bfloat16(self) -> bool:
        """Whether a step computes in bfloat16, by accelerate or by `autocast`."""
        return self.accelerator.mixed_precision == "bf16" or self.state.is_bfloat16

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, a forward pass computes in bfloat16, if that was chosen for a CPU."""
        return torch.autocast("cpu", torch.bfloat16) if self.state.is_bfloat16 else contextlib.nullcontext()

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """
        Within the context, attention is computed as was chosen for a CPU. It is for the backward pass too, which
        computes parts of the forward pass again with `gradient_checkpointing`.
        """
        return attention_by(self.unwrapped_model, self.state.attention)

    def uncompiled(self) -> contextlib.AbstractContextManager[None]:
        """
        Within the context, the blocks that Mini chose to compile run uncompiled. Evaluation and samples have other
        shapes and no gradients, and are too short to be compiled for.
        """
        return torch.compiler.set_stance("force_eager") if self.state.is_compiled else contextlib.nullcontext()

    @contextlib.contextmanager
    def full_model(self) -> Iterator[PreTrainedModel | None]:
        """
        The model to write with, whole and with the moving average if there is one, on the main process, and `None` on
        the others. If it is sharded and the memory of the main process has no room for it, all get `None`. Every
        process enters it.
        """
        has_room = free_memory() > 4 * 4 * self.unwrapped_model.num_parameters()
        if self.parallel.is_sharded and not self.parallel.from_main(has_room):
            yield None
            return
        with self.ema_weights(), self.uncompiled():
            yield self.parallel.gather_full_model(self.model)


def build_run(arguments: Arguments, hooks: Hooks = NO_HOOKS) -> Run:
    """
    Makes the parts of a run, and loads the checkpoint to resume from. Every process calls it.

    Raises:
        ValueError: for wrong input. No existing file has been changed then.
    """
    parallel = Parallel(arguments)
    accelerator = parallel.accelerator
    config_class = config_class_of(arguments, hooks)
    check_settings(arguments, parallel, config_class, has_model=hooks.has_model)
    folder = RunFolder(arguments, parallel)
    try:
        # 1. Data, and a model that fits its vocabulary.
        show_progress = accelerator.is_local_main_process and not hooks.is_quiet
        corpus = own_corpus(hooks.data, arguments.data, arguments.monitoring.max_eval_tokens, show_progress)
        set_seed(arguments.run.seed)
        model, start = make_model(arguments, corpus, config_class, hooks, parallel)
        batches, held_out = corpus.make_batches(arguments, model.config)
        held_out_text = corpus.text_of(held_out.ids)
        state = TrainerState(
            corpus=corpus.settings,
            architecture=architecture_of(model.config),
            methods=methods_of(arguments),
            order=order_of(arguments, has_examples=isinstance(corpus, ExampleCorpus)),
            tracker_id=uuid.uuid4().hex[:8],
        )
        # 2. The model on its device, and what moves its weights.
        blocks = blocks_of(model)
        wrapped: nn.Module = parallel.parallelize(model)
        if start is not None:
            start.materialize(accelerator.device)
            if not arguments.run.resume:  # otherwise the checkpoint fills it
                start.fill(arguments.run.seed)
        optimizers = make_optimizers(model, arguments.optimization)
        if parallel.is_deepspeed:
            wrapped, *optimizers = accelerator.prepare(model, *optimizers)
        unwrapped = accelerator.unwrap_model(wrapped)
        decay = arguments.optimization.ema_decay
        run = Run(
            arguments=arguments,
            parallel=parallel,
            run_folder=folder,
            corpus=corpus,
            batches=batches,
            held_out=held_out,
            held_out_bytes=len(held_out_text),
            compressors=compressor_bits_per_byte(held_out_text),
            config=model.config,
            model=wrapped,
            unwrapped_model=unwrapped,
            blocks=blocks,
            optimizers=optimizers,
            ema=ExponentialMovingAverage(unwrapped, decay) if decay else None,
            state=state,
            problems=[sentence for sentence in (folder.problem, name_code(model), corpus.problem) if sentence],
        )
        # 3. Where the run stood, if it goes on.
        if arguments.run.resume:
            load_state(run)
        return run
    except BaseException:
        folder.release()
        raise


def load_state(run: Run) -> None:
    """
    Loads the newest checkpoint that is whole.

    Raises:
        ValueError: if there is none, or it belongs to other data or another model, or cannot go on with these settings.
    """
    found, problems, error = None, [], None
    if run.accelerator.is_main_process:
        try:
            found, problems = find_state(run.folder)
        except ValueError as nothing_found:
            error = nothing_found
    run.parallel.raise_everywhere(error)
    found, problems = run.parallel.from_main((found, problems))
    state = read_state(found)
    new = run.state
    check_state(run.folder, state, new.corpus, new.architecture, new.methods, new.order)
    if state.sequences is None:
        state.sequences = state.step * run.batches.batch_size
        if state.methods.get("optimizer") == "muon":
            problems.append(
                "This run began with torch's Muon. Mini has its own now, whose steps have another size at the same "
                "learning_rate: watch the loss, or begin anew with --overwrite."
            )
    if not state.order:
        state.order = new.order
    run.weights.load(found)
    run.batches.start_at(state.step, state.sequences)
    run.batches.load_state_dict(state.stream)
    run.state, run.problems = state, run.problems + problems


def description_of(run: Run, micro_batches: int, peak_flops: float | None) -> list[str]:
    """
    Lines that say what is about to happen.

    Args:
        micro_batches: how many the share of a process in a batch is split into.
        peak_flops: what MFU is a share of.
    """
    accelerator, corpus, arguments = run.accelerator, run.corpus, run.arguments
    beginning = f"Resuming at step {run.state.step}" if run.state.step else "Training"
    precision = "bf16" if run.is_bfloat16 else "float32"
    count = torch.get_num_threads()
    threads = f" with {count} thread{'s' * (count > 1)}" if accelerator.device.type == "cpu" else ""
    parallel = f" ({run.parallel.name})" if run.parallel.name else ""
    split = f", each batch in {micro_batches} micro-batches" if micro_batches > 1 else ""
    peak = f", MFU of {peak_flops / 1e12:g} TFLOP/s each" if peak_flops else ""
    parameters = f"{run.unwrapped_model.num_parameters() / 1e6:.2f}M parameters"
    lines = [
        f"{beginning}: {parameters} on {corpus.train_size} of {corpus.name} "
        f"({len(corpus.validation):,} held out), "
        f"{accelerator.num_processes} x {accelerator.device.type}{threads}{parallel}, {precision}{split}{peak}.",
        *corpus.notes,
    ]
    if arguments.model.model is not None:
        sequences = arguments.optimization.train_batch_size // run.parallel.data_processes // micro_batches
        length, checkpointing = run.config.max_position_embeddings, arguments.run.gradient_checkpointing
        about = describe_training(run.unwrapped_model, sequences, length, run.is_bfloat16, checkpointing)
        lines.append(f"From {arguments.model.model}: {about}.")
    if notes := run.batches.notes():
        lines.append(notes)
    return lines


def check_settings(
    arguments: Arguments, parallel: Parallel, config_class: type[PreTrainedConfig] | None, has_model: bool
) -> None:
    """
    Args:
        config_class: that of the model, if it is no Mini.
        has_model: whether the caller brings the model itself.

    Raises:
        ValueError: for settings that do not fit the number of processes or the checkpoint to resume from. This is
            before any data is read.
    """
    optimization = arguments.optimization
    shares = parallel.data_processes * optimization.gradient_accumulation_steps
    if optimization.train_batch_size % shares:
        apart = " that have data of their own" if parallel.tensor_size > 1 else ""
        raise ValueError(
            f"train_batch_size ({optimization.train_batch_size}) must be divisible by the number of processes{apart} "
            f"({parallel.data_processes}) times gradient_accumulation_steps "
            f"({optimization.gradient_accumulation_steps})."
        )
    if parallel.tensor_size > 1 and not has_model:
        base = arguments.model.model
        shape = arguments.model.model_config(config_class) if base is None else load_config(base, False)
        check_mesh(shape, parallel.tensor_size)
    if arguments.run.resume and (states := states_of(arguments.output_dir)):
        try:
            state = read_state(states[-1])
        except (OSError, ValueError, TypeError):
            return  # damaged: `load_state` takes the checkpoint before it, and checks that
        from_tokenizer = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        known = {}
        if arguments.model.model is None and not has_model:  # otherwise its shape is known only when it is loaded
            architecture = architecture_of(arguments.model.model_config(config_class))
            known = {name: value for name, value in architecture.items() if name not in from_tokenizer}
        corpus = {}
        if not arguments.data.is_encoded:  # otherwise the tokenizer lies with the encoded corpus
            corpus["tokenizer"] = tokenizer_key(arguments.data, make_tokenizer(arguments.data))
        check_state(arguments.output_dir, state, corpus, known, methods_of(arguments), order_of(arguments, False))


def make_model(
    arguments: Arguments,
    corpus: Corpus,
    config_class: type[PreTrainedConfig] | None,
    hooks: Hooks,
    parallel: Parallel,
) -> tuple[PreTrainedModel, ShardedStart | None]:
    """
    The model to train: a new one for the vocabulary of the corpus, the one of `--model`, or that of the caller, with an
    adapter if that was asked for. The tokens that end an answer in the corpus also end what the model generates.

    Returns:
        The model, and if it will be sharded, what fills it afterwards: until then its weights are on the meta device.

    Raises:
        ValueError: if the model cannot be loaded, cannot read the corpus, has a context of one token, or needs more
            memory than there is.
    """
    start: ShardedStart | None = None
    is_sharded = parallel.is_sharded and not arguments.adapter.lora_r
    check = functools.partial(check_memory, arguments, parallel)
    if hooks.has_model:
        model = given_model(hooks.model, corpus)
        check(model.config)
    elif arguments.model.model is not None:
        start = ShardedStart.of_checkpoint(arguments.model.model) if is_sharded else None
        model = trained_model(arguments, start)
        check(model.config)
    else:
        model, start = new_model(arguments, corpus, config_class, is_sharded, check)
    if model.config.max_position_embeddings < 2:
        raise ValueError("max_position_embeddings must be at least 2: with 1, a model cannot continue what it reads.")
    corpus.tokenizer.model_max_length = model.config.max_position_embeddings
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known] if known is not None else []
    if new := [token for token in corpus.end_ids if token not in known]:
        model.generation_config.eos_token_id = [*known, *new]
    if arguments.run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return add_lora(model, arguments.adapter) if arguments.adapter.lora_r else model, start


def new_model(
    arguments: Arguments,
    corpus: Corpus,
    config_class: type[PreTrainedConfig] | None,
    is_sharded: bool,
    check: Callable[[PreTrainedConfig], None],
) -> tuple[PreTrainedModel, ShardedStart | None]:
    """A model with new weights, and settings for sampling that suit small models; `check` may refuse its shape."""
    token_ids = token_ids_of(corpus.tokenizer)
    config = arguments.model.model_config(config_class, vocab_size=len(corpus.tokenizer), **token_ids)
    check(config)
    start = ShardedStart(lambda: AutoModelForCausalLM.from_config(config)) if is_sharded else None
    model = start.model if start is not None else AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**token_ids, **SAMPLING)
    return model, start


def given_model(model: PreTrainedModel, corpus: Corpus) -> PreTrainedModel:
    """
    The model of the caller, which learns in place, with the special tokens of the corpus.

    Raises:
        ValueError: if it cannot read the corpus.
    """
    if model.config.vocab_size < len(corpus.tokenizer):
        raise ValueError(
            f"The model has a vocabulary of {model.config.vocab_size:,} tokens, and the tokenizer "
            f"{len(corpus.tokenizer):,}: make it with vocab_size={len(corpus.tokenizer)}, or name its own tokenizer."
        )
    is_new = model.generation_config.to_dict() == GenerationConfig.from_model_config(model.config).to_dict()
    for name, token_id in token_ids_of(corpus.tokenizer).items():
        setattr(model.config, name, token_id)
        setattr(model.generation_config, name, token_id)
    if is_new:
        model.generation_config.update(**SAMPLING)
    return model


def token_ids_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens by the names that a configuration has for them."""
    eos = tokenizer.eos_token_id
    known = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_token_id}
    return {name: eos if token_id is None else token_id for name, token_id in known.items()}


def trained_model(arguments: Arguments, start: ShardedStart | None = None) -> PreTrainedModel:
    """
    The checkpoint of `--model`, with the dropout that was asked for; on the meta device if `start` is to fill it.

    Raises:
        ValueError: if it cannot be loaded, or is no checkpoint that can be trained.
    """
    name, quantization = arguments.model.model, arguments.adapter.quantization
    model = start.model if start is not None else None
    if model is None:
        model, _ = load_checkpoint(name, dtype=torch.float32, quantization=quantization)
    if getattr(model, "is_quantized", False) and not arguments.adapter.lora_r:
        raise ValueError(
            f"The weights of {name!r} are quantized and cannot be trained: give --lora_r 8 for an adapter."
        )
    for field, probability in arguments.model.dropouts.items():
        if not hasattr(model.config, field):
            raise ValueError(f"The model {name!r} has no {field}.")
        setattr(model.config, field, probability)
        for module in model.modules():
            part = getattr(module, field, None)
            if isinstance(part, nn.Dropout):
                part.p = probability
            elif isinstance(part, float):
                setattr(module, field, probability)
    return model
