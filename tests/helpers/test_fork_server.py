"""A program that the server starts is to its user what one is that plain `python` starts."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from helpers import fork_server
from helpers.programs import ROOT, run_program

BEFORE = """
import atexit, sys, threading, time
sys.path.insert(0, "nowhere")
atexit.register(lambda: print("the last words"))
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread that had work to do"))).start()
print("no line break", end="")
"""


@pytest.mark.slow
@pytest.mark.skipif(not fork_server.IS_POSSIBLE, reason="needs Linux")
@pytest.mark.parametrize(
    "end", ["", "sys.exit()", "sys.exit(3)", "sys.exit('a sentence')", "sys.exit(True)", "raise ValueError('wrong')"]
)
def test_what_comes_out_at_the_end(end: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(BEFORE + end)
    forked, fresh = (run_program(str(program), cwd=tmp_path, fresh=fresh) for fresh in (False, True))
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]
    assert ("Traceback" in forked.stderr) == ("Traceback" in fresh.stderr)


@pytest.mark.skipif(not fork_server.IS_POSSIBLE, reason="needs Linux")
def test_a_start_is_not_forked_with_a_variable_that_a_library_has_read(tmp_path: Path) -> None:
    started_with = fork_server.server().environment
    assert fork_server.can_start({**started_with, "RANK": "1", "MINI_CACHE": "elsewhere"})
    assert not fork_server.can_start({**started_with, "OMP_NUM_THREADS": "13"})


@pytest.mark.skipif(not fork_server.IS_POSSIBLE, reason="needs Linux")
def test_only_a_program_that_would_import_this_mini_has_it_loaded(tmp_path: Path) -> None:
    (tmp_path / "modeling_mini").mkdir()  # another Mini, beside the programs
    (tmp_path / "modeling_mini" / "__init__.py").touch()
    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "generate.py", tmp_path / "elsewhere" / "generate.py", tmp_path / "elsewhere" / "other.py"):
        path.write_text("import sys; print('modeling_mini' in sys.modules)")
        result = run_program(path, cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert result.stdout == f"{path.relative_to(tmp_path).as_posix() == 'elsewhere/generate.py'}\n"


@pytest.mark.skipif(not fork_server.IS_POSSIBLE, reason="needs Linux")
def test_what_a_program_imports_is_compiled_once_and_not_beside_the_source(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("")
    (tmp_path / "program.py").write_text("import module; print(module.__cached__)")
    compiled = []
    for _ in range(2):
        path = Path(run_program(str(tmp_path / "program.py"), cwd=tmp_path).stdout.strip())
        compiled.append((path, path.stat().st_mtime_ns))
    assert compiled[0] == compiled[1]
    assert {path.name for path in tmp_path.iterdir()} == {"module.py", "program.py"}


@pytest.mark.slow
@pytest.mark.skipif(not fork_server.IS_POSSIBLE, reason="needs Linux")
def test_a_program_that_ends_before_anyone_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LateSocket(socket.socket):
        def recv(self, *arguments: int) -> bytes:
            time.sleep(0.5)
            return super().recv(*arguments)

    (tmp_path / "program.py").write_text("import sys; sys.exit(3)")
    fork_server.server()
    monkeypatch.setattr(socket, "socket", LateSocket)
    assert run_program(str(tmp_path / "program.py"), cwd=tmp_path).returncode == 3


@pytest.mark.slow
@pytest.mark.skipif(not fork_server.IS_POSSIBLE, reason="needs Linux")
def test_processes_of_multiprocessing_are_forked_with_the_files_that_they_inherit(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("""
import multiprocessing, sys

def answer(connection):
    connection.send("torch" in sys.modules)

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=answer, args=(sender,))
        process.start()
        sender.close()
        print(method, receiver.recv())
        process.join()
        print(process.exitcode)
    multiprocessing.resource_tracker._resource_tracker._stop()
""")
    result = run_program(str(tmp_path / "program.py"), cwd=tmp_path)
    assert result.stdout == "spawn True\n0\nforkserver True\n0\n" and result.stderr == "", result.stderr


@pytest.mark.skipif(not fork_server.IS_POSSIBLE, reason="needs Linux")
def test_inherited_files_keep_their_numbers_and_end_with_the_program() -> None:
    pipes = [os.pipe() for _ in range(2)]
    readers, writers = zip(*pipes, strict=True)
    program = f"import os; [os.write(number, str(number).encode()) for number in {writers}]"
    process = subprocess.Popen([fork_server.python(), "-c", program], pass_fds=writers)
    for number in writers:
        os.close(number)
    assert [os.read(number, 100) for number in readers] == [str(number).encode() for number in writers]
    assert [os.read(number, 100) for number in readers] == [b"", b""], "nobody else holds their other end"
    assert process.wait() == 0
    for number in readers:
        os.close(number)
