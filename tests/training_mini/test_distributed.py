"""How processes agree, on stand-ins for several of them; on real ones: tests/test_parallel.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers.programs import ROOT
from helpers.runs import train_here
from modeling_mini import MiniConfig
from training_mini import distributed, model_folders
from training_mini.arguments import parse_arguments
from training_mini.distributed import Parallel, check_mesh, make_accelerator, read_mesh
from transformers import GPT2Config


def parallel_of(sent: list[object], received: object = None) -> Parallel:
    """Stands for one process: what it sends goes into `sent`; it receives `received`, or what it sent if it is main."""
    parallel = object.__new__(Parallel)

    def from_main(value: object) -> object:
        sent.append(value)
        return value if received is None else received

    parallel.from_main = from_main
    return parallel


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [(OSError("full"), OSError), (FileNotFoundError(2, "gone", "x"), OSError), (ValueError("nan"), ValueError)]
    + [(KeyError("lion"), RuntimeError)],
    ids=repr,
)
def test_an_error_of_the_main_process_ends_every_process(error: Exception, elsewhere: type[Exception]) -> None:
    sent: list[object] = []
    with pytest.raises(type(error)) as raised:
        parallel_of(sent).raise_everywhere(error)
    assert raised.value is error
    with pytest.raises(elsewhere) as raised:
        parallel_of([], sent[0]).raise_everywhere(None)
    assert str(raised.value) == str(error)
    parallel_of([]).raise_everywhere(None)  # and nothing happens where nothing did


def test_a_run_has_no_tf32_of_an_earlier_one_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: SimpleNamespace(device=torch.device("cuda")))
    for flags in ([], ["--tf32", "false"], ["--tf32"]):
        make_accelerator(parse_arguments(flags))
    assert set_to == ["high", "highest", "high"]


@pytest.mark.slow
def test_a_card_that_cannot_be_made_is_told_to_the_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the outcome, and would wait for ever."""

    def no_card(*arguments: object) -> str:
        raise KeyError("lion")

    told: list[Exception | None] = []
    raise_everywhere = Parallel.raise_everywhere

    def listen(parallel: Parallel, error: Exception | None) -> None:
        told.append(error)
        raise_everywhere(parallel, error)

    monkeypatch.setattr(model_folders, "model_card", no_card)
    monkeypatch.setattr(Parallel, "raise_everywhere", listen)
    with pytest.raises(KeyError, match="lion"):
        train_here(tmp_path / "run", "--max_steps", 3)
    assert isinstance(told[-1], KeyError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "dimensions"),
    [
        ("cpu_hsdp.yaml", {"dp_replicate": 2, "dp_shard": 2}),
        ("cpu_tensor_parallel.yaml", {"dp_shard": 2, "tp": 2}),
        ("hsdp.yaml", {"dp_replicate": 2, "dp_shard": 8}),
        ("tensor_parallel.yaml", {"dp_shard": 4, "tp": 2}),
    ],
)
def test_the_mesh_of_a_configuration(config: str, dimensions: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file, through accelerate's own launcher, to what a process reads."""
    path = str(ROOT / "configs" / "accelerate" / config)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "train.py"]))
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith(("ACCELERATE_USE_", "FSDP_VERSION", "PARALLELISM_CONFIG_")):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", str(arguments.num_processes))
    for _ in range(2):  # a second run in the process reads it too
        mesh = read_mesh(is_sharded=True)
        assert mesh is not None
        assert dict(zip(*mesh._get_mesh(), strict=True)) == dimensions


@pytest.mark.parametrize(
    ("sizes", "is_sharded", "message"),
    [
        ({"dp_shard": 3, "tp": 2}, True, "dp_shard_size 3 x tp_size 2 is for 6 processes, and 4 were started"),
        ({"dp_replicate": 2, "dp_shard": 4}, True, "is for 8 processes, and 4 were started"),
        ({"tp": 4}, True, "needs a dp_shard_size of at least 2"),
        ({"dp_replicate": 2, "dp_shard": 2}, False, "A mesh of processes is for FSDP2"),
        ({"dp_shard": 2, "cp": 2}, True, "no context or sequence parallelism"),
    ],
)
def test_meshes_that_cannot_be(
    sizes: dict[str, int], is_sharded: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", str(size))
    with pytest.raises(ValueError, match=message):
        read_mesh(is_sharded)
    monkeypatch.delenv("ACCELERATE_USE_PARALLELISM_CONFIG")
    assert read_mesh(is_sharded) is None


def test_models_whose_products_cannot_be_shared() -> None:
    check_mesh(MiniConfig(num_attention_heads=4, num_key_value_heads=2), 2)
    check_mesh(
        MiniConfig(num_attention_heads=3, hidden_size=192, num_key_value_heads=1), 2
    )  # its attention stays whole
    check_mesh(MiniConfig(intermediate_size=101), 1)
    with pytest.raises(ValueError, match=r"tp_size 4 does not divide num_key_value_heads \(2\): choose another"):
        check_mesh(MiniConfig(num_attention_heads=4, num_key_value_heads=2), 4)
    with pytest.raises(ValueError, match=r"tp_size 2 does not divide intermediate_size \(101\)"):
        check_mesh(MiniConfig(intermediate_size=101), 2)
    with pytest.raises(ValueError, match="GPT2Config has no plan for tensor parallelism"):
        check_mesh(GPT2Config(), 2)
