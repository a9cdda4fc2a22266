"""Several processes, on CPUs over gloo: they train as one does, and a launch that silently is another is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from helpers import fork_server
from helpers.programs import ROOT, free_port
from helpers.runs import ON_CPU, QUICK, forked, losses, metrics, train, wait_for_steps, weights
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from training_mini import distributed
from training_mini import launch as launch_module
from training_mini.arguments import OptimizationArguments
from training_mini.checkpoints import damage_of, states_of

CONFIGS = ROOT / "configs" / "accelerate"
SETTINGS = "--max_steps 12 --eval_steps 6 --save_steps 6 --max_eval_tokens 1100".split()


def command(
    config: str | None, *arguments: object, flags: tuple[str, ...] = (), python: str | None = None
) -> list[str]:
    launch = [python or fork_server.python(), "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    if config is None:
        launch += "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    else:
        launch += ["--config_file", str(CONFIGS / config)]
    launch += ["--main_process_port", "0", *flags]
    return [*launch, str(ROOT / "train_accelerate.py"), *map(str, arguments)]


def launch(config: str | None, cwd: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with one of the configurations, or flags, on two CPU processes with a thread each."""
    return subprocess.run(
        command(config, *arguments), cwd=cwd, env={**os.environ, **ON_CPU, **environment},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def evaluations(run: Path) -> list[float]:
    return [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that the others are compared with."""
    cwd = tmp_path_factory.mktemp("one")
    assert train(cwd, *SETTINGS, "--output_dir", "run", OMP_NUM_THREADS="1").returncode == 0
    return cwd / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "spread", "parts"),
    [
        ("launched by cpu.yaml", "DDP", 1),
        ("launched by flags", "DDP", 2),
        ("launched by cpu_fsdp2.yaml", "FSDP2", 1),
        ("forked cpu_fsdp2.yaml", "FSDP2", 2),
    ],
)
def test_two_processes_equal_one(how: str, spread: str, parts: int, one: Path, tmp_path: Path) -> None:
    arguments = (*QUICK, *SETTINGS, "--gradient_accumulation_steps", parts, "--output_dir", "run")
    arguments += ("--async_save", "true" if parts == 2 else "false")
    start, _, config = how.rpartition(" ")
    if start == "forked":
        output = forked(config, tmp_path, *arguments)
    else:
        result = launch(None if config == "flags" else config, tmp_path, *arguments)
        assert result.returncode == 0, result.stderr
        output = result.stdout
    assert f"2 x cpu with 1 thread ({spread})" in output
    assert output.count("Trained 12 steps") == 1
    run = tmp_path / "run"
    assert losses(run) == pytest.approx(losses(one), abs=1e-5)
    assert evaluations(run) == pytest.approx(evaluations(one), abs=1e-5)
    rates = [[line["learning_rate"] for line in metrics(folder) if "loss" in line] for folder in (run, one)]
    assert rates[0] == rates[1]
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=0, atol=2e-4)
    assert [damage_of(state) for state in states_of(run)] == ["", ""], "that of step 6 was written in the background"
    saved = FileSystemReader(states_of(run)[0]).read_metadata().state_dict_metadata
    chunks = len(saved["model.model.layers.0.mlp.up_proj.weight"].chunks)
    assert chunks == (2 if spread == "FSDP2" else 1), "a sharded matrix is saved in its parts"


HEADS = ("--num_attention_heads", 4, "--num_key_value_heads", 2)
METHODS = ("--max_grad_norm", 0.5, "--ema_decay", 0.9)


@pytest.fixture(scope="module")
def one_with_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process whose heads can be shared out."""
    cwd = tmp_path_factory.mktemp("one")
    forked(None, cwd, *QUICK, *SETTINGS, *HEADS, *METHODS, "--output_dir", "run")
    return cwd / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "mesh", "chunks"),
    [
        ("cpu_hsdp.yaml", "2 dp_replicate x 2 dp_shard", {"mlp.up_proj": 2, "input_layernorm": 2}),
        (
            "cpu_tensor_parallel.yaml",
            "2 dp_shard x 2 tp",
            {"mlp.up_proj": 4, "self_attn.o_proj": 4, "self_attn.q_norm": 2},
        ),
    ],
)
def test_meshes_equal_one_process(
    config: str, mesh: str, chunks: dict[str, int], one_with_heads: Path, tmp_path: Path
) -> None:
    """With Muon, clipping, a moving average and micro-batches."""
    methods = (*METHODS, "--gradient_accumulation_steps", 2, "--async_save", "true")
    output = forked(config, tmp_path, *QUICK, *SETTINGS, *HEADS, *methods, "--output_dir", "run")
    assert f"4 x cpu with 1 thread (FSDP2, {mesh})" in output
    run = tmp_path / "run"
    assert losses(run) == pytest.approx(losses(one_with_heads), abs=1e-5)
    assert evaluations(run) == pytest.approx(evaluations(one_with_heads), abs=1e-5)
    norms = [[line["grad_norm"] for line in metrics(folder) if "grad_norm" in line] for folder in (run, one_with_heads)]
    assert norms[0] == pytest.approx(norms[1], abs=1e-4) and max(norms[1]) > 0.5, "gradients were clipped"
    for name, tensor in weights(one_with_heads).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=0, atol=2e-4)
    saved = FileSystemReader(states_of(run)[-1]).read_metadata().state_dict_metadata
    assert {name: len(saved[f"model.model.layers.1.{name}.weight"].chunks) for name in chunks} == chunks


@pytest.mark.slow
def test_an_adapter_on_a_mesh_equals_one_process(one_with_heads: Path, tmp_path: Path) -> None:
    quick = QUICK[:2] + QUICK[QUICK.index("--train_batch_size") :]  # the shape is that of the model
    settings = (*quick, "--model", one_with_heads, "--lora_r", 4, "--max_steps", 5, "--max_eval_tokens", 1100)
    settings += (*METHODS, "--output_dir")
    forked(None, tmp_path, *settings, "one")
    meshes = {"cpu_hsdp.yaml": "2 dp_replicate x 2 dp_shard", "cpu_tensor_parallel.yaml": "2 dp_shard x 2 tp"}
    for config, mesh in meshes.items():
        assert f"FSDP2, {mesh}" in forked(config, tmp_path, *settings, config)
        assert losses(tmp_path / config) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        assert evaluations(tmp_path / config) == pytest.approx(evaluations(tmp_path / "one"), abs=1e-5)
        adapters = [load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in (config, "one")]
        assert adapters[0].keys() == adapters[1].keys()
        for name, tensor in adapters[1].items():
            torch.testing.assert_close(adapters[0][name], tensor, rtol=0, atol=2e-4)
    saved = FileSystemReader(states_of(tmp_path / config)[-1]).read_metadata().state_dict_metadata
    chunks = {name: len(saved[name].chunks) for name in saved if name.startswith("model.") and "layers.1.mlp" in name}
    assert {(name.split(".")[-4], name.split(".")[-3]): count for name, count in chunks.items()} == {
        (layer, part): 4 if (part == "lora_A") == (layer == "down_proj") else 2
        for layer in ("gate_proj", "up_proj", "down_proj") for part in ("lora_A", "lora_B")
    }, "the larger one of the two matrices is shared by the processes that share the product"  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_that_is_read_by_shards_trains_as_one_that_is_loaded_whole(one: Path, tmp_path: Path) -> None:
    quick = QUICK[:2] + QUICK[QUICK.index("--train_batch_size") :]
    settings = (*quick, "--model", one, "--max_steps", 5, "--max_eval_tokens", 1100, "--output_dir")
    forked("cpu_fsdp2.yaml", tmp_path, *settings, "sharded")
    forked(None, tmp_path, *settings, "one")
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert evaluations(tmp_path / "sharded") == pytest.approx(evaluations(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--intermediate_size", 65), "tp_size 2 does not divide intermediate_size (65)"),
        (("--train_batch_size", 7), "processes that have data of their own (2) times"),
    ],
)
def test_a_mesh_that_does_not_fit_the_model_is_one_sentence(
    flags: tuple[object, ...], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError) as error:
        forked("cpu_tensor_parallel.yaml", tmp_path, *QUICK, *flags, "--max_steps", 3, "--output_dir", "run")
    assert sentence in str(error.value) and "Traceback" not in str(error.value)
    assert not (tmp_path / "run").exists()


LAYOUTS = {
    None: "1 x cpu with 1 thread,",
    "cpu.yaml": "2 x cpu with 1 thread (DDP),",
    "cpu_fsdp2.yaml": "2 x cpu with 1 thread (FSDP2),",
    "cpu_hsdp.yaml": "4 x cpu with 1 thread (FSDP2, 2 dp_replicate x 2 dp_shard),",
    "cpu_tensor_parallel.yaml": "4 x cpu with 1 thread (FSDP2, 2 dp_shard x 2 tp),",
}


@pytest.mark.slow
def test_a_run_goes_on_in_every_layout_from_every_layout(tmp_path: Path) -> None:
    """
    On one process, two with DDP, two or four with shards, or tensor parallelism, with the same batches. The model has
    one key/value head, so that tensor parallelism shares the MLP out and leaves attention whole.
    """
    for first in LAYOUTS:
        forked(first, tmp_path, *QUICK, *SETTINGS, "--max_steps", 6, "--output_dir", f"half/{first}")
    for second in LAYOUTS:
        shutil.copytree(tmp_path / "half", tmp_path / str(second))
        folders = [f"{second}/{first}" for first in LAYOUTS]
        output = forked(second, tmp_path, 12, *folders, program="tests/helpers/resume_worker.py")
        assert output.count("Resuming at step 6") == len(LAYOUTS)
        assert output.count(LAYOUTS[second]) == len(LAYOUTS), "it went on as that configuration says"
    # Not `one`, because the cosine of the first half was that of six steps.
    expected = tmp_path / "None" / "None"
    for second in LAYOUTS:
        for first in LAYOUTS:
            run = tmp_path / str(second) / str(first)
            assert losses(run) == pytest.approx(losses(expected), abs=1e-5), f"{first}, then {second}"
            assert evaluations(run) == pytest.approx(evaluations(expected), abs=1e-5), f"{first}, then {second}"


@pytest.mark.slow
def test_a_stream_in_parts_trains_as_one_process_and_goes_on_on_one(tmp_path: Path) -> None:
    """Each of two processes reads a file of its own, and the checkpoint knows both positions."""
    (tmp_path / "data").mkdir()
    for part in (0, 1):
        lines = [json.dumps({"text": f"{i} of {part} " + "the cat sat. " * (i % 40)}) for i in range(part, 200, 2)]
        (tmp_path / "data" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    settings = [value if value != "sample" else "data" for value in QUICK] + ["--lr_scheduler_type", "constant"]
    settings += ["--streaming", "--stream_parts", 2]
    forked(None, tmp_path, *settings, "--max_steps", 10, "--output_dir", "one")
    forked("cpu.yaml", tmp_path, *settings, "--max_steps", 6, "--output_dir", "two")
    output = forked(None, tmp_path, "--resume", "--max_steps", 10, "--output_dir", "two")
    assert "Resuming at step 6" in output and "The stream is read in 2 parts." in output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_two_machines(one: Path, tmp_path: Path) -> None:
    """Two machine ranks on loopback, as two_nodes.yaml has them, on CPUs."""
    port, processes = free_port(), []
    for rank in (0, 1):
        flags = ("--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port))
        arguments = command(
            "two_nodes.yaml", *QUICK, *SETTINGS, "--output_dir", "run", flags=("--num_processes", "2", *flags)
        )
        environment = {**os.environ, **ON_CPU}
        processes.append(
            subprocess.Popen(
                arguments, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 x cpu" in outputs[0][0] and outputs[1][0] == ""
    assert losses(tmp_path / "run") == pytest.approx(losses(one), abs=1e-5)
    assert evaluations(tmp_path / "run") == pytest.approx(evaluations(one), abs=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    # The launcher is not forked, so that its processes are its children.
    arguments = (*QUICK, "--max_steps", 100000, "--output_dir", "run")
    process = subprocess.Popen(
        command("cpu.yaml", *arguments, python=sys.executable),
        cwd=tmp_path, env={**os.environ, **ON_CPU, "PYTHON_EXEC": fork_server.python()}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_steps(tmp_path / "run", 5, process)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "LOCAL_RANK" in child.environ()
    ]
    second = next(child for child in workers if child.environ()["LOCAL_RANK"] == "1")
    second.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=100)
    step = int(output.split("Stopped at step ")[1].split(";")[0])
    assert process.returncode != 0
    assert set(re.findall(r"exitcode\s*: (\d+) \(pid: (\d+)\)", errors)) == {("75", str(w.pid)) for w in workers}, (
        errors
    )
    result = launch("cpu.yaml", tmp_path, "--resume", "--output_dir", "run", "--max_steps", step + 2)
    assert result.returncode == 0 and f"Resuming at step {step}" in result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ("--cpu --num_processes 2", {}, "accelerate was asked for 2 processes and started 1"),
        ("--multi_gpu --num_processes 2", {}, "2 processes were started and each would train alone"),
        ("--mixed_precision fp16", {}, "accelerate was told mixed_precision fp16, and Mini trains in bf16 or no"),
        ("", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed needs a GPU"),
        ("", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "Mini shards by FSDP2 only"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="these launches are right where there are GPUs")
def test_launches_that_would_silently_be_others(
    flags: str, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    # A process that is forked is not the child of its launcher, whose command line is what the first one is about.
    python = sys.executable if "--cpu" in flags else fork_server.python()
    base = [python, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--num_machines", "1"]
    base += ["--dynamo_backend", "no", "--main_process_port", "0"]
    result = subprocess.run(
        [*base, *flags.split(), str(ROOT / "train_accelerate.py"), *QUICK, "--max_steps", "3"],
        cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    sentences = {line for line in result.stderr.splitlines() if line.startswith("error: ")}
    assert result.returncode != 0 and len(sentences) == 1 and message in sentences.pop(), result.stderr
    if "processes" in message:
        assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in result.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python /env/bin/accelerate launch --cpu --num_processes 2 train_accelerate.py --seed 1", 2),
        ("python -m accelerate.commands.launch --num-processes=3 train_accelerate.py", 3),
        ("python /env/bin/accelerate launch --config_file two.yaml train_accelerate.py", 2),
        ("python /env/bin/accelerate launch --config_file gone.yaml train_accelerate.py", 1),
        ("python /env/bin/accelerate launch train_accelerate.py --num_processes 9", 4),  # by the default file
        ("python /env/bin/accelerate launch --cpu train_accelerate.py", 1),  # which does not read that file
        ("bash", 1),
    ],
)
def test_how_many_processes_were_asked_for(
    command: str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two.yaml").write_text("num_processes: 2\n")
    (tmp_path / "default.yaml").write_text("num_processes: 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_module, "default_config_file", str(tmp_path / "default.yaml"))
    assert launch_module.asked_processes(SimpleNamespace(cmdline=command.split)) == asked


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"optimizer": "muon"}, "--optimizer muon does not work with DeepSpeed; give --optimizer adamw"),
        ({"ema_decay": 0.9}, "--ema_decay does not work with DeepSpeed; leave it out"),
        ({"find_batch_size": True}, "--find_batch_size does not work with DeepSpeed; leave it out"),
    ],
    ids=str,
)
def test_what_deepspeed_cannot_do(settings: dict[str, object], advice: str) -> None:
    with pytest.raises(ValueError, match=f"{advice}, or shard by fsdp2"):
        distributed.check_deepspeed(OptimizationArguments(**{"optimizer": "adamw", **settings}))
    distributed.check_deepspeed(OptimizationArguments(optimizer="adamw"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_hold_what_accelerate_knows(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    values = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert config.num_processes == values["num_processes"]
    for line in path.read_text().splitlines():
        assert len(line) <= 120
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and "accelerate launch" in path.read_text()


def check_launch(config: str, cwd: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [
        fork_server.python(),
        "-m",
        "training_mini.check_launch",
        str(CONFIGS / config),
        "--",
        "--main_process_port",
        "0",
        *flags,
    ]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_one_command_checks_a_configuration(tmp_path: Path) -> None:
    result = check_launch("cpu_fsdp2.yaml", tmp_path, **ON_CPU)
    assert result.returncode == 0, result.stderr
    assert "2 x cpu with 1 thread (FSDP2), float32" in result.stdout and "The configuration works" in result.stdout
    result = check_launch("deepspeed_zero2.yaml", tmp_path, "--num_processes", "2")  # it has eight
    assert result.returncode == 2 and result.stderr.count("error: ") == 1 and "DeepSpeed" in result.stderr
