"""What every test needs: no network, small caches of its own, and ways to run the programs as a user does."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

# Before transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# And before torch is: threads that wait for others leave them the core, as in train_accelerate.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores already
    gc.disable()  # until all is imported, of which nothing is garbage
else:  # and this folder, in which the decoding step is compiled once
    os.environ["MINI_CACHE"] = tempfile.mkdtemp(prefix="mini-test-cache-")
# Whatever Mini writes is flushed, and a disk takes milliseconds for that, some 50 times in the shortest run. Where
# there is room, and programs may run from there, the folders of tests lie in memory; pytest removes those of tests that
# pass.
if (
    os.access("/dev/shm", os.W_OK)
    and not os.statvfs("/dev/shm").f_flag & os.ST_NOEXEC
    and min(shutil.disk_usage("/dev/shm").free, psutil.virtual_memory().available) > 10 * 2**30
):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import pytest
from helpers import fork_server
from helpers.modules import lies_in
from helpers.programs import run_program

# torch is not imported here: the process that hands the tests out to workers needs none, and workers wait for it.

if TYPE_CHECKING:
    from helpers.browser import Opener

LONG = (
    "test_gpu_benchmark.py", "test_training_benchmark.py", "test_decoding_benchmark.py", "test_reliability.py",
    "test_finetuning_doc.py", "test_package.py", "test_parallel.py", "test_elastic.py",
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file of slow tests alone is not imported where these are left out: what it needs takes seconds to load."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    The longest test begins first, and other long ones as the first of the second worker: at the end, one worker would
    run them while the others have nothing to do. Each worker begins with an equal share of the list.
    """
    first = [item for item in items if item.nodeid.endswith("test_readme.py::test_blocks")]
    long = [item for item in items if item.path.name in LONG]
    others = [item for item in items if item not in {*first, *long}]
    share = len(items) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) - len(first)
    items[:] = [*first, *others[:share], *long, *others[share:]]


def pytest_collection_finish() -> None:
    fork_server.environment.update(os.environ)
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["MINI_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def no_variables_are_left() -> Iterator[None]:
    """With other variables than the server that forks programs, each program of a later test would start afresh."""
    yield
    left = dict(os.environ)
    assert fork_server.are_of_server(left, fork_server.environment), "the test has left variables behind"


@pytest.fixture(autouse=True, scope="module")
def no_modules_are_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test wrote would be taken for that of a later test which writes one of the same name."""
    before = set(sys.modules)
    yield
    new = {name: sys.modules[name] for name in set(sys.modules) - before if not name.startswith("transformers_modules")}
    # A name with a slash, as lm_eval gives to the files of its tasks, is one that no import has.
    left = [name for name, module in new.items() if "/" not in name and lies_in(module, tmp_path_factory.getbasetemp())]
    assert not left, f"the tests of this file have left modules behind: {left}"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Tests give the same result in any order."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for tests that only read it."""
    from helpers.runs import QUICK

    cwd = tmp_path_factory.mktemp("quick")
    steps = ["--max_steps", 40, "--eval_steps", 20, "--save_steps", 20, "--max_eval_tokens", 8192]
    result = run_program("train_accelerate.py", *QUICK, *steps, cwd=cwd, PYTEST_DRAWS="1")
    assert result.returncode == 0, result.stderr
    return cwd / "runs" / "tiny-sample"


@pytest.fixture(scope="module")  # and not longer: while it is there, its thread has an event loop
def opened() -> "Iterator[Opener]":
    """Opens pages in a Chromium that the tests of a file share."""
    from helpers.browser import chromium

    with chromium() as opener:
        yield opener
