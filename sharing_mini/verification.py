"""
Proof that a stranger can use what is shared: the folder before the upload, and the repository after it, are loaded in a
process that is as bare as theirs, and have to write the same.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import sha

from .staging import Staged

CLEAN_PROCESS = Path(__file__).with_name("clean_process.py")
TOKENS, ANSWER_TOKENS, SEED = 60, 100, 42
LARGEST_IN_GIT = 10_000_000  # bytes; the Hub takes larger files by LFS alone


@dataclass
class Proof:
    """
    What the model did.

    Attributes:
        ids: of a greedy text, the prompt first.
        sample: a text drawn with the settings of its generation config; of a model that answers, the answer alone.
        is_chat: the prompt is the message of a user.
    """

    prompt: str
    ids: list[int]
    logits: list[float]
    sample: str
    parameters: int
    is_chat: bool = False


def prove(
    staged: Staged,
    name_or_path: str,
    prompt: str,
    base: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    is_chat: bool = False,
) -> Proof | None:
    """
    Loads a folder, or a repository at a revision, in a clean process and lets it write.

    Args:
        base: where the model of an adapter is.
        token: for a repository that is private; what is public has to load without one.
        is_chat: whether the prompt is to be answered, and not continued.

    Returns:
        `None` for a format whose runtime is not installed here.

    Raises:
        ValueError: if it cannot be loaded, with the reason.
    """
    if staged.kind in ("gguf", "onnx"):
        return prove_export(staged, name_or_path) if revision is None else None
    request = {
        "name_or_path": name_or_path, "kind": staged.kind, "prompt": prompt, "base": base, "revision": revision,
        "tokens": ANSWER_TOKENS if is_chat else TOKENS, "seed": SEED, "is_chat": is_chat,
        "trust_remote_code": staged.has_code or staged.kind == "adapter",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mini-clean-") as folder:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": f"{folder}/modules", "TRANSFORMERS_VERBOSITY": "error"}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        if revision is not None:
            # An empty cache, and a stranger's rights: nothing that lies here already may help.
            environment |= {"HF_HUB_CACHE": f"{folder}/hub", "HF_HUB_OFFLINE": "0"}
            environment.pop("HF_TOKEN", None)
            environment |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"} if token is None else {"HF_TOKEN": token}
        elif base is None or Path(base).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"  # all that is needed is here
        # -P: the folder of the program, which is Mini's, is not searched for modules.
        result = subprocess.run(
            [sys.executable, "-P", str(CLEAN_PROCESS)], input=json.dumps(request), env=environment, cwd=folder,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {result.returncode}"
        raise ValueError(f"In a process without Mini, {name_or_path!r} does not load: {reason}")
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    if answer["loaded_of_mini"]:
        raise ValueError(
            f"The process was not clean: it found {answer['loaded_of_mini'][0]} outside of {name_or_path!r}."
        )
    return Proof(prompt, answer["ids"], answer["logits"], answer["sample"], answer["parameters"], is_chat)


def check_same(before: Proof, after: Proof, repository: str) -> None:
    """Raises ValueError if what the Hub gives out writes anything else than what was sent."""
    near = all(abs(a - b) <= 1e-4 * max(1.0, abs(a)) for a, b in zip(before.logits, after.logits, strict=True))
    if before.ids != after.ids or not near:
        raise ValueError(
            f"{repository!r} on the Hub does not write what the folder here writes: do not use it, push again."
        )


def check_listing(staged: Staged, listing: dict[str, tuple[int, str]], repository: str) -> None:
    """
    Args:
        listing: of the repository, path to size and checksum (SHA-256 of a large file, that of git for others).

    Raises:
        ValueError: if a file is missing there, or another one.
    """
    for name, path in staged.files.items():
        if name not in listing or listing[name] not in checksums(path):
            raise ValueError(f"{name} in {repository!r} on the Hub is not the file that was sent: push again.")


def checksums(path: Path) -> list[tuple[int, str]]:
    """Size and checksum of a file, as the Hub gives them for a large file and for others."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        large = [(size, sha.sha_fileobj(file).hex())]
    return large if size > LARGEST_IN_GIT else [*large, (size, sha.git_hash(path.read_bytes()))]


def prove_export(staged: Staged, name_or_path: str) -> Proof | None:
    """What can be made sure of with the runtimes that are here: that each file loads."""
    folder = Path(name_or_path)
    if staged.kind == "gguf" and importlib.util.find_spec("gguf") is not None:
        import gguf

        for path in folder.glob("*.gguf"):
            try:
                gguf.GGUFReader(path)
            except (ValueError, IndexError, OSError) as error:
                raise ValueError(f"{path.name} cannot be read: {error}") from None
    if staged.kind == "onnx" and importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        for path in folder.rglob("*.onnx"):
            try:
                onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's own types have no common base
                raise ValueError(f"{path.name} does not load: {' '.join(str(error).split())}") from None
    return None
