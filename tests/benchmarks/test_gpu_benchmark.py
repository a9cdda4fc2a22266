"""benchmarks/gpu.py on a CPU: every part works; a crash or a time-out costs the others nothing; wrong input."""

import importlib
import json
import statistics
import time
from pathlib import Path
from types import ModuleType

import pytest
from helpers.programs import ROOT, one_sentence, run_program, start_program

PROGRAM = "benchmarks/gpu.py"
NAMES = [
    "device", "correctness", "training", "training_peers", "decoding", "decoding_gpt2", "learning", "quantization",
]  # fmt: skip


def run_for(minutes: float, flags: list[object], cwd: Path) -> str:
    """What it printed; each part gets some seconds more to stop."""
    process = start_program(PROGRAM, *flags, "--minutes", minutes, cwd=cwd, OMP_NUM_THREADS="1", COLUMNS="120")
    try:
        output, errors = process.communicate(timeout=60 * minutes + 240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return output


@pytest.mark.slow
def test_every_part_works_on_a_cpu_and_is_run_once(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    flags = ["--device", "cpu", "--output", "out", "--shakespeare", text]
    run_for(5, [*flags, "--only", "device"], tmp_path)
    run_for(0.1, flags, tmp_path)  # less than a second for each part, which is too short for most of them
    first = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert list(first) == NAMES and first["device"]["status"] == "finished"
    for name, record in first.items():
        assert record["status"] in ("finished", "timed out"), (name, record)
    output = run_for(20, flags, tmp_path)
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    for name in NAMES:
        assert parts[name]["status"] == "finished", parts[name]
        assert first[name]["status"] != "finished" or parts[name] == first[name], "it was run again"
        assert name in output
    results = {name: parts[name]["result"] for name in NAMES}
    device = results["device"]
    flops = device["bfloat16_flops_per_second"] * statistics.median(device["seconds"]["product"])
    assert flops == pytest.approx(2 * 1024**3), "of a product of 1024 x 1024"
    # Without instructions for bfloat16, a core reaches 3e8 beside another program.
    assert device["bfloat16_flops_per_second"] > 1e8 and device["bytes_per_second"] > 1e8
    assert {found["outcome"] for found in results["correctness"]["outcomes"].values()} == {"passed"}
    (mini,), (llama,) = results["training"]["contenders"], results["training_peers"]["contenders"]
    assert (mini["model"], llama["model"]) == ("Mini", "Llama") and mini["planned_memory_bytes"] > 0
    assert results["training"]["settings"]["batch_size"] == 64, "it was found"
    contenders = {row["contender"] for row in results["decoding"]["rows"]}
    assert contenders == {"Mini", "Mini, loop", "Llama", "Llama, static"}
    assert all(row["bytes_read_per_second"] > 0 for row in results["decoding"]["rows"])
    assert results["learning"]["best"]["step"] in (10, 20) and results["learning"]["best"]["eval_loss"] < 5
    learned = [row for row in results["quantization"]["rows"] if Path(row["model"]).name == "learning"]
    assert len(learned) == 4 and all(0 < row["bits_per_byte"] < 8 for row in learned)
    for shown in ("MFU", "bandwidth", "1.40; nanoGPT", "0 failed", "bits/byte", "gpu.json"):
        assert shown in output, output


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


GOOD = """
import json, sys
json.dump({"figure": 1}, open(sys.argv[1], "w"))
"""
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + ".pid", "w").write(str(child.pid))
time.sleep(600)
"""


@pytest.mark.slow
def test_a_part_that_crashes_or_hangs_costs_the_others_nothing(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "crashes": "import os; print('so far so good', flush=True); os.abort()",
        "hangs": HANGS,
        "fails": "raise ValueError('there is no such kernel')",
        "empty": "",
        "bad": GOOD,
        "good": GOOD,
        "left_out": GOOD,
    }
    out = tmp_path / "out"

    def part(name: str, program: str) -> object:
        (tmp_path / f"{name}.py").write_text(program)
        return gpu.Part(
            name,
            1,
            lambda settings: [str(tmp_path / f"{name}.py"), str(out / f"{name}.json")],
            lambda result, results: [("figure", str(result["figure"]), "")],
            lambda settings: "it needs a text" if name == "left_out" else None,
            lambda result: "it is wrong" if name == "bad" else None,
        )

    monkeypatch.setattr(gpu, "PARTS", [part(*item) for item in programs.items()])
    settings = gpu.GpuSettings(minutes=1, output=str(out), device="cpu")
    monkeypatch.setattr(gpu.Part, "share", lambda self, settings: 0.2 if self.name == "hangs" else 1.0)
    results = gpu.measure(settings)
    assert json.loads((out / "gpu.json").read_text()) == results
    parts = results["parts"]
    assert list(parts) == list(programs)
    found = {name: (record["status"], record["reason"]) for name, record in parts.items()}
    assert found["crashes"] == ("failed", "exit code -6: so far so good")
    assert found["hangs"][0] == "timed out" and parts["hangs"]["seconds"] < 30
    assert found["fails"] == ("failed", "exit code 1: ValueError: there is no such kernel")
    assert found["empty"] == ("failed", "it ended without a result")
    assert found["bad"] == ("failed", "it is wrong") and parts["bad"]["result"] == {"figure": 1}
    assert found["good"] == ("finished", None) and parts["good"]["result"] == {"figure": 1}
    assert found["left_out"] == ("left out", "it needs a text")
    wait_for_end(int((out / "hangs.json.pid").read_text()))
    # The second time, what failed is run again, and what is finished is not.
    for name in programs:
        (tmp_path / f"{name}.py").write_text(GOOD.replace('{"figure": 1}', '{"figure": 2}'))
    again = gpu.measure(settings)["parts"]
    assert again["good"] == parts["good"]
    assert {name: record.get("result") for name, record in again.items()} == {
        **{name: {"figure": 2} for name in programs},
        "good": {"figure": 1},
        "left_out": None,
    }
    with pytest.raises(ValueError, match="has results of the device 'cpu': name another folder"):
        settings.device = "cuda"
        gpu.measure(settings)


def wait_for_end(process: int) -> None:
    """What a part had started ends with it; the system may take a moment."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}/stat").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--device cpu --minutes 0", "minutes must be above 0, got 0.0."),
        ("--device cpu --only speed", "only takes device, correctness, training"),
        ("--device cpu --shakespeare nowhere", "There is no file 'nowhere'"),
        ("--device cpu --nanogpt nowhere", "There is no model.py in 'nowhere'"),
        ("", "PyTorch finds no GPU here; --device cpu tries the command without one."),
    ],
)
def test_wrong_input(flags: str, sentence: str, tmp_path: Path) -> None:
    done = run_program(PROGRAM, *flags.split(), cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert sentence in one_sentence(done) and not list(tmp_path.iterdir())
