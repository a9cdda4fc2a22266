"""
Stand-in for what the parallelism mixins use to start their ranks: processes on the CPU that talk through gloo.

The ranks are forked from a server that has imported torch, transformers and Mini once, which takes the start of a rank
from seconds to milliseconds; the server has run nothing, so no thread is lost in the fork.
"""

import functools
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from conformance_mini import constructions

# What the tests take here is seconds: a rank that waits longer waits for one that will not come.
TIMEOUT_SECONDS = 180

PRELOADED = [
    "modeling_mini",
    "conformance_mini.constructions",
    "transformers_tests.test_fsdp_mixin",
    "transformers_tests.test_tensor_parallel_mixin",
]


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """A rank on the CPU has no device of its own to choose."""


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """
    Runs `function(rank, *args)` in `nprocs` processes and waits for them.

    Raises:
        AssertionError: with the traceback of every rank that failed, or if they do not end in time.
    """
    context = _server()
    connections, processes, outcomes = [], [], {}
    for rank in range(nprocs):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(theirs, rank, function, args), daemon=True)
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    try:
        while len(outcomes) < nprocs:
            waiting = {connections[rank]: rank for rank in range(nprocs) if rank not in outcomes}
            ready = wait(waiting, timeout=TIMEOUT_SECONDS)
            if not ready:
                raise AssertionError(f"Ranks {sorted(waiting.values())} did not end within {TIMEOUT_SECONDS} seconds.")
            for connection in ready:
                try:
                    outcome = connection.recv()
                except EOFError:
                    outcome = {"error": "the process died", "constructions": {}}
                outcomes[waiting[connection]] = outcome
            if any(outcome["error"] for outcome in outcomes.values()):
                break  # The others may wait for this one for ever.
    finally:
        for process in processes:
            process.join(timeout=None if len(outcomes) == nprocs else 1)
            process.kill()
    for outcome in outcomes.values():
        constructions.add(outcome["constructions"])
    errors = [f"Rank {rank}: {outcome['error']}" for rank, outcome in sorted(outcomes.items()) if outcome["error"]]
    assert not errors, "\n".join(errors)


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """A decorator: the call runs in `world_size` ranks, each with its rank as the first argument."""

    def decorator(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                store = str(Path(folder, "store"))
                _start_rank_processes(_in_process_group, (store, world_size, function, args), world_size)

        return run

    return decorator


def _server() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server finds what it preloads by its environment; whatever else a test starts must not inherit these paths.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()
    return context


def _run_rank(connection: Connection, rank: int, function: Callable, args: tuple) -> None:
    import modeling_mini  # noqa: F401  the Auto classes of this process do not know Mini yet

    # As many threads as all ranks together have cores: more of them wait for each other longer than they compute.
    torch.set_num_threads(1)
    constructions.start()
    error = None
    try:
        function(rank, *args)
    except BaseException:
        error = traceback.format_exc()
    connection.send({"error": error, "constructions": constructions.counts()})


def _in_process_group(rank: int, store: str, world_size: int, function: Callable, args: tuple) -> None:
    # transformers builds its device mesh from the variables that torchrun sets.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
