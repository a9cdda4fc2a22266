"""The memory of a machine, and of a control group, as a container is one."""

from pathlib import Path

import memory_mini
import psutil
import pytest
from memory_mini import free_memory, total_memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the control groups are; `own` beside it says of which this process is one."""
    monkeypatch.setattr(memory_mini, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory_mini, "CONTROL_GROUPS", tmp_path / "cgroup")
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(content + "\n")


def test_without_a_limit_it_is_that_of_the_machine(groups: Path) -> None:
    machine = psutil.virtual_memory().total + psutil.swap_memory().total
    assert total_memory() == machine, "another system than Linux"
    groups.with_name("own").write_text("0::/user/job\n")
    assert total_memory() == machine, "no such group"
    files = {"memory_current": "1000", "memory_stat": "inactive_file 0"}
    write_group(groups / "user" / "job", memory_max="max", **files)
    assert total_memory() == machine and 0 < free_memory() < machine


def test_a_limit_of_version_2_may_be_that_of_a_group_above(groups: Path) -> None:
    groups.with_name("own").write_text("0::/user/job\n")
    write_group(groups / "user" / "job", memory_max="max", memory_current="0", memory_stat="inactive_file 0")
    write_group(
        groups / "user", memory_max="1000000", memory_current="700000", memory_stat="anon 1\ninactive_file 200000"
    )
    assert total_memory() == 1_000_000 + psutil.swap_memory().total
    assert free_memory() == 500_000, "pages of files that nothing uses give way"


def test_a_limit_of_version_1_in_a_container(groups: Path) -> None:
    """Its own group is what is mounted, under the name that it has outside."""
    groups.with_name("own").write_text("5:cpu,memory:/docker/0123\n1:cpuset:/\n0::/\n")
    files = {"memory_usage_in_bytes": "600000", "memory_stat": "total_inactive_file 50000"}
    write_group(groups / "memory", memory_limit_in_bytes="900000", **files)
    assert total_memory() == 900_000 + psutil.swap_memory().total
    assert free_memory() == 350_000
