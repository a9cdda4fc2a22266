"""Where the files for launching lie."""

import subprocess
import sys

import pytest
from helpers.programs import ROOT
from training_mini.launch_files import find_launch_file, launch_files


def test_names_and_paths() -> None:
    expected = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    for name in ("fsdp2", "fsdp2.yaml", "configs/accelerate/fsdp2.yaml", str(expected)):
        assert find_launch_file(name).resolve() == expected
    assert find_launch_file("train.sh") == ROOT / "configs" / "slurm" / "train.sh"
    assert len(launch_files()) == len(list((ROOT / "configs").glob("*/*.*")))
    with pytest.raises(ValueError, match="There is no configuration file 'fsdp3', did you mean 'fsdp2"):
        find_launch_file("fsdp3")


@pytest.mark.slow
def test_the_command_prints_a_path_or_the_list() -> None:
    command = [sys.executable, "-m", "training_mini.launch_files"]
    run = {"cwd": ROOT, "capture_output": True, "text": True, "check": False}
    assert subprocess.run([*command, "hsdp"], **run).stdout == f"{ROOT}/configs/accelerate/hsdp.yaml\n"
    lines = subprocess.run(command, **run).stdout.splitlines()
    assert len(lines) == len(launch_files()) and any(line.startswith("train.sh    ") for line in lines)
    assert all(line.endswith(".") for line in lines), "each has a whole sentence"
    result = subprocess.run([*command, "x"], **run)
    assert result.returncode == 2 and result.stderr.startswith("error: There is no configuration file 'x'")
