"""Who may write into the folder of a run; two processes that both want to: tests/test_reliability.py."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from training_mini.arguments import parse_arguments
from training_mini.run_folder import RunFolder


class OneProcess:
    """Stands for `Parallel` on one process."""

    accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)

    def raise_everywhere(self, error: Exception | None) -> None:
        if error is not None:
            raise error


def claim(folder: Path, *flags: str) -> RunFolder:
    return RunFolder(parse_arguments(["--output_dir", str(folder), *flags]), OneProcess())


def test_a_folder_is_one_runs_until_it_is_released(tmp_path: Path) -> None:
    first = claim(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"^Process {os.getpid()} on .* trains into .*run' at this moment"):
        claim(tmp_path / "run")
    first.release()
    assert not (tmp_path / "run").exists(), "of a run that never began nothing is left"
    claim(tmp_path / "run").release()


def test_what_is_there_is_safe(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds files that are not a run of Mini"):
        claim(tmp_path, "--overwrite")
    for place in ("thesis.txt", "thesis.txt/run"):
        with pytest.raises(ValueError, match=r"^output_dir must be a folder, and '.*thesis.txt' is a file\.$"):
            claim(tmp_path / place, "--overwrite")
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(ValueError, match="There is a run in"):
        claim(tmp_path)
    folder = claim(tmp_path, "--overwrite")
    folder.remove(folder.files())
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "what makes it this run's stays"
    with pytest.raises(ValueError, match="at this moment"):
        claim(tmp_path)
    folder.release()


def test_checkpoints_that_lie_elsewhere_by_a_link_are_left_there(tmp_path: Path) -> None:
    scratch, run = tmp_path / "scratch", tmp_path / "run"
    (scratch / "step_2").mkdir(parents=True)
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1")
    (run / "checkpoints").symlink_to(scratch)
    folder = claim(run, "--overwrite")
    folder.remove(folder.files())
    folder.release()
    assert not run.exists() and (scratch / "step_2").is_dir()


@pytest.fixture
def permissions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions as they are for everybody but root, who may write wherever it is not mounted read-only."""

    def access(path: str | Path, mode: int) -> bool:
        return Path(path).stat().st_mode >> 6 & mode == mode

    monkeypatch.setattr(os, "access", access)


@pytest.mark.parametrize("place", ["final", "checkpoints/step_2"])
def test_a_run_that_cannot_be_removed_stays_whole(place: str, tmp_path: Path, permissions: None) -> None:
    for name in ("best", "checkpoints/step_2", "final"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("seed: 1")
    (tmp_path / place).chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    sentence = rf"^--overwrite cannot remove '.*{place}', because it is not writable .* choose another --output_dir\.$"
    with pytest.raises(ValueError, match=sentence):
        claim(tmp_path, "--overwrite")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / place).chmod(0o755)
    claim(tmp_path, "--overwrite").release()


def test_what_is_mounted_within_a_run_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 1")
    mounted = [str(tmp_path)]
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in mounted)
    claim(tmp_path, "--overwrite").release()
    mounted.append(str(tmp_path / "checkpoints"))
    with pytest.raises(ValueError, match=r"^--overwrite cannot remove .*checkpoints'"):
        claim(tmp_path, "--overwrite")


def test_a_run_that_could_keep_nothing_does_not_go_on(tmp_path: Path, permissions: None) -> None:
    (tmp_path / "checkpoints" / "step_2").mkdir(parents=True)
    parse_arguments([]).save(tmp_path / "config.yaml")
    claim(tmp_path, "--resume").release()
    (tmp_path / "checkpoints").chmod(0o555)
    with pytest.raises(ValueError, match=r"^--resume cannot write into '.*checkpoints': make it writable\.$"):
        claim(tmp_path, "--resume")


def test_what_a_run_reads_is_not_overwritten_by_it(tmp_path: Path, quick_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(quick_run, run)
    (run / "text.txt").write_text("years of work")
    tokenizer = str(run / "final")
    for flags in (
        ("--model", str(run)), ("--dataset", str(run / "text.txt")), ("--dataset", str(run / "*.txt")),
        ("--dataset", str(run)), ("--tokenizer", tokenizer),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^(model|dataset|tokenizer) .* lies in .*run', and --overwrite would"):
            claim(run, "--overwrite", *flags)
    claim(run, "--overwrite", "--model", str(quick_run), "--dataset", str(tmp_path / "*.txt")).release()
    assert (run / "best").is_dir()


def test_the_file_of_a_lock_of_a_run_that_was_killed_is_no_ones_work(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on another")
    (tmp_path / ".config.yaml.1.partial").write_text("size: ti")  # nor what it was about to write first
    claim(tmp_path).release()


def test_a_run_that_is_killed_while_it_replaces_another_can_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "config.yaml", "z"):
        (tmp_path / name).write_text("seed: 1")
    folder = claim(tmp_path, "--overwrite")
    unlink, left = Path.unlink, [2]

    def killed(path: Path, missing_ok: bool = False) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        folder.remove(folder.files())
    folder.release()
    claim(tmp_path, "--overwrite").release()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(lock: filelock.FileLock, **settings: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    folder = claim(tmp_path / "run")
    assert "has no locks, so nothing would stop a second process" in folder.problem
    folder.release()
