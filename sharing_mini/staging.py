"""
What goes up: a copy of the files that a model is made of, each looked at before it is shown to the world.

A file that is not known, a pickle, something that looks like a token or key, or a weight that is no number ends the
push before anything is sent.
"""

import json
import re
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from configuration_mini import MiniConfig
from files_mini import (
    ADAPTER_CONFIG,
    BOX,
    MODEL_CONFIG,
    find_checkpoint,
    read_json,
    read_text,
    run_of,
    write_text,
    writing,
)
from huggingface_hub import save_torch_state_dict
from jinja2 import TemplateSyntaxError
from modeling_mini.loading.checkpoints import check_generation_config
from modeling_mini.remote_code import AUTO_MAP, remote_code_files, write_remote_code
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils.chat_template_utils import render_jinja_template

CURVES = "curves.png"
COMMON = [r"README\.md", r"LICENSE(\.txt|\.md)?", r"curves\.png"]
TOKENIZER = [
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json",
    r"merges\.txt",
    r"chat_template\.jinja",
]
MODEL = [
    r"(config|generation_config)\.json",
    r"model(-\d{5}-of-\d{5})?\.safetensors",
    r"model\.safetensors\.index\.json",
]
ADAPTER = [r"(adapter_config|generation_config)\.json", r"adapter_model\.safetensors"]
CODE = [re.escape(name) for name in remote_code_files()]
# What from_pretrained looks at.
LOADED = [*TOKENIZER, *MODEL, *ADAPTER, *CODE]
# What a folder of each kind may hold, as regular expressions of the path in it.
EXPECTED = {
    "model": [*COMMON, *TOKENIZER, *MODEL],
    "adapter": [*COMMON, *TOKENIZER, *ADAPTER],
    "gguf": [*COMMON, r"[\w.-]+\.gguf"],
    "onnx": [
        *COMMON, *TOKENIZER, r"(config|generation_config)\.json", r"(onnx/)?[\w.-]+\.onnx(_data(_\d+)?|\.data)?",
        r"[\w-]+\.(html|css|js|mjs)", r"labels\.json", r"vendor/[\w.-]+\.(js|mjs|wasm)",
    ],
}  # fmt: skip
# Files that are no text, so that no secret is looked for in them.
BINARY = re.compile(r".*\.(safetensors|gguf|onnx(_data(_\d+)?|\.data)?|png|wasm)")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill", ".msgpack")
NOT_OF_THE_FOLDER = (".cache/huggingface/", ".git/", ".gitattributes")
SECRETS = {
    "a Hugging Face token": r"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "an AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a Weights & Biases key": r"(?i)\bwandb[\w. ]*key\W{1,4}[0-9a-f]{40}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+]*://[^\s/:@\"']+:[^\s/:@\"']+@",
}


@dataclass
class Source:
    """
    What the user named.

    Attributes:
        folder: the files of the model.
        run: the run that made it, if it is there.
        kind: a key of `EXPECTED`.
    """

    folder: Path
    run: Path | None
    kind: str


@dataclass
class Staged:
    """
    The files as they will be on the Hub, in a folder of their own.

    Attributes:
        config: of the model or the adapter; empty for formats that have none.
    """

    folder: Path
    kind: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path]:
        """Path in the repository to path here."""
        return files_of(self.folder)

    @property
    def has_code(self) -> bool:
        return "auto_map" in self.config


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a folder, by their path in it, without what `hf download` and git put beside them for themselves."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in paths.items() if not name.startswith(NOT_OF_THE_FOLDER)}


def find_source(name: str) -> Source:
    """
    The model under the name of a run, a checkpoint, an adapter or a folder with an export.

    Raises:
        ValueError: if there is no model under that name here.
    """
    folder = BOX.get(name, Path(name))
    if not folder.exists():
        raise ValueError(f"There is no run or checkpoint folder {name!r}.")
    for kind, pattern in (("gguf", "*.gguf"), ("onnx", "*.onnx"), ("onnx", "onnx/*.onnx")):
        if any(folder.glob(pattern)):
            return Source(folder, None, kind)
    folder = Path(find_checkpoint(name))
    run = run_of(folder)
    if run is not None and not (run / "config.yaml").is_file():
        run = None
    return Source(folder, run, "adapter" if not (folder / MODEL_CONFIG).is_file() else "model")


def stage(source: Source, into: Path, max_shard_size: str = "5GB", token: str | None = None) -> Staged:
    """
    Copies the files, after a look at each.

    Args:
        into: a folder that is empty.
        token: is looked for too.

    Raises:
        ValueError: for what must not go up, or is missing, naming the file.
    """
    inode = source.folder.stat().st_ino  # a save replaces the folder by a new one
    check_files(source)
    files = files_of(source.folder)
    if source.run is not None and (source.run / CURVES).is_file():
        files[CURVES] = source.run / CURVES
    for name, path in files.items():
        with writing(into / name):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, into / name)
    if not source.folder.is_dir() or source.folder.stat().st_ino != inode:
        raise ValueError(f"{str(source.folder)!r} was replaced by a newer one meanwhile: give the same command again.")
    staged = Staged(into, source.kind)
    name = {"adapter": ADAPTER_CONFIG, "gguf": None}.get(source.kind, MODEL_CONFIG)
    if name is not None:
        staged.config = read_json(into / name)
    if source.kind == "model" and staged.config.get("model_type") == MiniConfig.model_type and not staged.has_code:
        # As the model that comes with Mini: here its code is that of Mini itself.
        write_remote_code(into)
        staged.config["auto_map"] = AUTO_MAP
        write_text(into / MODEL_CONFIG, json.dumps(staged.config, indent=2) + "\n")
    for path in staged.files.values():
        if path.suffix == ".safetensors":
            check_weights(path)
    check_secrets(staged, token)
    split_weights(staged, max_shard_size)
    return staged


def check_files(source: Source) -> None:
    """
    Nothing is there that should not be, nothing is missing, and what is read without a word where it is damaged can be
    read.

    Raises:
        ValueError: naming the file.
    """
    files = files_of(source.folder)
    check_expected(source, files)
    for name, path in files.items():
        if path.suffix == ".json" and any(re.fullmatch(pattern, name) for pattern in LOADED):
            read_json(path)  # from_pretrained passes over some that are cut short
    check_generation_config(source.folder)
    check_chat_templates(source.folder)
    check_missing(source, files)


def check_expected(source: Source, files: dict[str, Path]) -> None:
    """Raises ValueError for a file that is no part of a model, may run code, or is a link that would be left out."""
    expected = list(EXPECTED[source.kind])
    if source.kind == "model":
        expected += map(re.escape, code_files(source.folder))
    for name, path in files.items():
        if is_pickle(path):
            raise ValueError(
                f"{name!r} in {str(source.folder)!r} is a pickle, which can run code on the machine that loads it: "
                f"save weights as safetensors (save_pretrained does), and remove it."
            )
    others = [name for name in files if not any(re.fullmatch(pattern, name) for pattern in expected)]
    if others:
        listed = ", ".join(map(repr, others[:5])) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(
            f"{listed} in {str(source.folder)!r} {'is' if len(others) == 1 else 'are'} none of the files that a shared "
            f"{source.kind} consists of: remove what should not go up, or move it elsewhere."
        )
    for path in source.folder.rglob("*"):
        if path.is_symlink() and not path.is_file():
            raise ValueError(f"{str(path)!r} is a link to a folder or to nothing: put what it means in its place.")


def check_chat_templates(folder: Path) -> None:
    """Raises ValueError for a chat template that is no Jinja: the model loads and writes, and fails in a chat."""
    config = folder / "tokenizer_config.json"
    named = read_json(config).get("chat_template") if config.is_file() else None
    found = [(config, each) for each in (named if isinstance(named, list) else [named])]
    if (path := folder / "chat_template.jinja").is_file():
        found.append((path, read_text(path)))
    for path, template in found:
        if isinstance(template, dict):
            template = template.get("template")
        if template is None:
            continue
        try:
            render_jinja_template([], chat_template=template)
        except (TemplateSyntaxError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"{str(path)!r} holds a chat template that is no Jinja: {reason}.") from None


def check_missing(source: Source, files: dict[str, Path]) -> None:
    """Raises ValueError if a file is missing, or the weights of two saves are there."""
    needed = {
        "model": ("tokenizer.json",), "adapter": ("adapter_model.safetensors",), "onnx": ("tokenizer.json",)
    }  # fmt: skip
    for name in needed.get(source.kind, ()):
        if not (source.folder / name).is_file():
            raise ValueError(f"{str(source.folder)!r} is not complete: {name} is missing.")
    if source.kind == "model":
        index = source.folder / "model.safetensors.index.json"
        shards = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}
        for name in sorted(shards):
            if not (source.folder / name).is_file():
                raise ValueError(f"{str(source.folder)!r} is not complete: {name} is missing.")
        if others := sorted({name for name in files if name.endswith(".safetensors")} - shards):
            raise ValueError(
                f"{str(source.folder)!r} holds the weights of two saves, of which only one is loaded ({others[0]} is "
                f"not one of {', '.join(sorted(shards)[:2])}): save the model into a new folder."
            )


def code_files(folder: Path) -> set[str]:
    """
    The names of the files of code that a model loads: those of the classes in `auto_map`, be they Mini's or the user's
    own, and what these import from the folder.

    Raises:
        ValueError: if one is missing.
    """
    names: set[str] = set()
    for value in read_json(folder / MODEL_CONFIG).get("auto_map", {}).values():
        for reference in filter(None, value if isinstance(value, list) else [value]):
            repository, _, class_name = reference.rpartition("--")
            path = folder / f"{class_name.rpartition('.')[0]}.py"
            if repository and not path.is_file():  # the code is in another repository
                continue
            try:
                names |= {path.name, *(Path(file).name for file in get_relative_import_files(path))}
            except FileNotFoundError as error:
                missing = Path(error.filename).name
                raise ValueError(
                    f"{str(folder)!r} is not complete: {missing}, code of the model, is missing."
                ) from None
    return names


def is_pickle(path: Path) -> bool:
    """By its name, or by what it begins with: a file that is renamed stays what it is."""
    if path.suffix.lower() in PICKLES:
        return True
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:2] == b"PK" and zipfile.is_zipfile(path):  # what torch.save writes
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    # Safetensors begin with the length of their header, in eight bytes, which can look like the beginning of a pickle.
    is_safetensors = start[3:] == bytes(5) + b"{"
    return len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5 and not is_safetensors


def check_weights(path: Path) -> None:
    """Raises ValueError if a weight is no number, or the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no dictionary)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    raise ValueError(
                        f"The weights are broken: {name} in {path.name} holds NaN or infinity. Push an earlier "
                        f"checkpoint."
                    )
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or cut short ({error}).") from None


def check_secrets(staged: Staged, token: str | None = None) -> None:
    """Raises ValueError, without repeating it, if something in a file of text looks like a token or a key."""
    patterns = {**SECRETS, **({"your token": re.escape(token)} if token else {})}
    for name, path in staged.files.items():
        if BINARY.fullmatch(name):
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for what, pattern in patterns.items():
            expression = re.compile(pattern)
            for number, line in enumerate(lines, start=1):
                if expression.search(line):
                    raise ValueError(
                        f"{name}, line {number}, has what looks like {what}: remove it, and revoke it if it is real."
                    )


def split_weights(staged: Staged, max_shard_size: str) -> None:
    """Weights that are large become several files with an index, as `from_pretrained` reads them."""
    path = staged.folder / "model.safetensors"
    if staged.kind != "model" or not path.is_file() or path.stat().st_size <= bytes_of(max_shard_size):
        return
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    path.unlink()
    save_torch_state_dict(tensors, staged.folder, max_shard_size=max_shard_size, metadata=metadata)


def bytes_of(size: str) -> int:
    """The bytes of a size such as 5GB, in the units of the Hub (1000)."""
    number, unit = re.fullmatch(r"([\d.]+)\s*(\w+)", size).groups()
    return int(float(number) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[unit])
