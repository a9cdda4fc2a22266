"""
Writes checkpoints. Each is written beside its place, flushed and renamed, so that it is complete or absent.

In the background, training goes on as soon as the tensors are copied into the memory of the host. These are the two
halves of `torch.distributed.checkpoint.async_save`, its stager and its save in a thread, called one by one: between
them, the processes agree that each has its copy, and the checksums are computed in the same thread.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from files_mini import replace_folder, write_text
from memory_mini import GIB, free_memory
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from .build import Run
from .checkpoints import (
    CHECKSUMS,
    STATE,
    TrainerState,
    Weights,
    save_tensors,
    sha256,
    states_of,
    step_of,
    without_settings,
)
from .distributed import Parallel
from .lora import has_lora
from .muon import local
from .rehearsal import bytes_of_gradients, memory_of_step

LARGE = 2**26  # bytes of a checkpoint, for each process
T = TypeVar("T")


class CheckpointWriter:
    """
    Writes `checkpoints/step_N` of a run, one at a time. Then it removes older checkpoints, except the newest
    `keep_last` and those whose step is a multiple of `keep_every`.

    Every process calls each method at the same step, and all must see one file system.

    Attributes:
        pending: the folder of the checkpoint that is being written in the background, or `None`.
    """

    def __init__(self, run_folder: Path, parallel: Parallel, keep_last: int, keep_every: int) -> None:
        self.run_folder, self.parallel = run_folder, parallel
        self.keep_last, self.keep_every = keep_last, keep_every
        self.pending: Path | None = None
        self._writing: Future[None] | None = None
        self._stager: DefaultStager | None = None
        self._thread: ThreadPoolExecutor | None = None

    def save(self, state: TrainerState, weights: Weights, in_background: bool) -> None:
        """
        Writes a checkpoint, or begins to. If one is being written in the background, call `wait` first.

        Raises:
            OSError: on every process, if one of them could not write its part, or had no memory for its copy. The older
                checkpoints are still there.
        """
        assert self.pending is None, "one checkpoint at a time"
        target = self.run_folder / "checkpoints" / f"step_{state.step}"
        contents = json.dumps(asdict(state), indent=2) + "\n"  # now: training changes the state
        self._all(target, self._begin)
        if not in_background:
            self._write(target, contents, weights.save)
            return
        copies: list[dict[str, Any]] = []
        self._all(target, lambda _: copies.append(self._copy(weights)))
        group = self.parallel.background_group

        def write() -> None:
            self._write(target, contents, lambda partial: save_tensors(copies.pop(), partial, group), group)

        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing, self.pending = self._thread.submit(write), target

    def is_written(self) -> bool:
        """Whether the checkpoint in the background is written, or has failed, on every process."""
        return self._writing is not None and not self.parallel.anyone(not self._writing.done())

    def wait(self) -> None:
        """
        Waits for the checkpoint in the background.

        Raises:
            OSError: as `save` does.
        """
        if self._writing is not None:
            writing, self._writing, self.pending = self._writing, None, None
            writing.result()

    def close(self) -> None:
        """Waits for the checkpoint in the background, whatever becomes of it, and gives its memory back."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._stager is not None:
            self._stager.close()
        self._writing = self.pending = self._thread = self._stager = None

    def _copy(self, weights: Weights) -> dict[str, Any]:
        """A copy of the tensors. Its memory is used again for the next checkpoint."""
        if self._stager is None:
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=torch.cuda.is_available(),
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            )
        return self._stager.stage(without_settings(weights.tensors()))

    def _begin(self, partial: Path) -> None:
        if self.parallel.accelerator.is_main_process:
            for left_over in partial.parent.glob(".step_*"):  # of a process that was killed
                shutil.rmtree(left_over)
            partial.mkdir(parents=True)

    def _write(
        self,
        target: Path,
        contents: str,
        save: Callable[[Path], None],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Writes the tensors by `save`, the state (`contents`) and the checksums, and then names the folder."""
        accelerator = self.parallel.accelerator
        sums: dict[str, str] = {}

        def write(partial: Path) -> None:
            save(partial)
            if accelerator.is_main_process:
                write_text(partial / STATE, contents)

        def checksums(partial: Path) -> dict[str, str]:
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            mine = files[accelerator.process_index :: accelerator.num_processes]
            return {path.relative_to(partial).as_posix(): sha256(path) for path in mine}

        def finish(partial: Path) -> None:
            if not accelerator.is_main_process:
                return
            write_text(partial / CHECKSUMS, json.dumps(sums, indent=2))
            replace_folder(partial, target)
            for old in states_of(self.run_folder)[: -self.keep_last]:
                if not self.keep_every or step_of(old) % self.keep_every:
                    # Renamed first: a folder called step_N is complete, even if this process is killed here.
                    shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))

        self._all(target, write, group)
        for part in self._all(target, checksums, group):
            sums |= part
        self._all(target, finish, group)

    def _all(self, target: Path, action: Callable[[Path], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """`Parallel.together` on the unfinished folder. If it fails, the folder is removed."""
        partial = target.with_name(f".{target.name}.partial")
        try:
            return self.parallel.together(target, lambda: action(partial), group)
        except OSError:
            if self.parallel.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
            raise


def is_in_background(run: Run) -> bool:
    """
    Whether the checkpoints of a run are written in the background: as `async_save` says; by default if they are large,
    and the memory of the host has room for their copy beside a step. Writing a small one takes less than a step.

    Raises:
        ValueError: if it was asked for and cannot be.
    """
    asked, parallel = run.arguments.run.async_save, run.parallel
    if asked is False or (parallel.is_deepspeed and not asked):
        return False
    if parallel.is_deepspeed:
        raise ValueError("--async_save: DeepSpeed writes its checkpoints itself, and training waits; leave it out.")
    needed = max(parallel.gather(bytes_of_copy(run)))  # parts of a sharded model differ, and all decide alike
    on_machine, free = needed * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), free_memory()
    if parallel.anyone(on_machine > free) and asked:
        raise ValueError(
            f"--async_save copies the weights and the state of the optimizer, {on_machine / GIB:.1f} GiB on this "
            f"machine, and {free / GIB:.1f} GiB of its memory are free; leave it out, and training waits for each "
            f"checkpoint."
        )
    step = memory_of_step(run, run.arguments.optimization.gradient_accumulation_steps)  # which has not begun yet
    return bool(asked) or not (parallel.anyone(on_machine + step > free) or needed < LARGE)


def bytes_of_copy(run: Run) -> int:
    """
    The memory that this process needs at most for the copy of a checkpoint. The optimizer makes its state in the first
    step; AdamW's has two numbers for each weight, and no other has more.
    """
    has_adapter = has_lora(run.unwrapped_model)
    weights = [weight for weight in run.unwrapped_model.parameters() if weight.requires_grad or not has_adapter]
    return sum(local(weight).nbytes for weight in weights) + (2 + (run.ema is not None)) * bytes_of_gradients(run)
