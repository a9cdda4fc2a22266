"""The settings of a push: fields are the flags of `push_to_hub.py`."""

import re
from dataclasses import dataclass

from entry_points_mini import ArgumentParser, Settings, option
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# As the Hub writes names of licences; which of them there are, it says itself.
LICENSE = re.compile(r"[a-z0-9][a-z0-9._+-]*")
SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*(KB|MB|GB)")
# Of the formats of modeling_mini.export, those that hold a model for others. To import that package loads torch, for
# which `--help` should not wait.
FORMATS = ("native", "gguf", "onnx")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# Of what git takes as the name of a branch or tag, that which an address can hold and that means nothing else.
REFERENCE = re.compile(r"(?!refs/|[0-9a-f]{40}$)(?!.*(\.\.|//|\.lock$))[A-Za-z0-9_]([A-Za-z0-9_./-]*[A-Za-z0-9_-])?")


@dataclass
class SharingArguments(Settings):
    """Where to, under what name, and how careful."""

    dry_run: bool = option(False, "show every file, its size and the card, and touch nothing")
    private: bool = option(False, "a repository that only you and your organization see")
    revision: str = option("main", "branch to push to; it is made where there is none")
    tag: str | None = option(None, "name for this version, such as v1")
    create_pr: bool = option(False, "propose the files as a pull request, and change no branch")
    commit_message: str = option("Upload model", "title of the commit")
    license: str | None = option(None, "licence, such as apache-2.0 (default: that of the card, else you are asked)")
    token: str | None = option(None, "access token (default: HF_TOKEN, or that of `hf auth login`)")
    replace: bool = option(False, "push also where the repository holds another model, and replace the card there")
    base_model: str | None = option(None, "Hub name of the model that an adapter belongs to, if it is a folder here")
    format: str | None = option(None, f"push an export instead: {', '.join(FORMATS)}")
    max_shard_size: str = option("5GB", "weights larger than this are split into files of at most this size")
    space: bool = option(False, "also push the demo page, as a Space of the same name")
    no_verify: bool = option(False, "do not load the model in a clean process before the upload and from the Hub after")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in (None, *FORMATS):
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}.")
        for name in ("revision", "tag"):
            value = getattr(self, name)
            if value is not None and not REFERENCE.fullmatch(value):
                kind = {"revision": "branch, such as experiment", "tag": "version, such as v1"}[name]
                raise ValueError(f"{name} must be the name of a {kind}, got {value!r}.")
        self.license = license_of(self.license)
        if not SHARD_SIZE.fullmatch(self.max_shard_size) or not re.search("[1-9]", self.max_shard_size):
            raise ValueError(f"max_shard_size must be a size such as 5GB or 500MB, got {self.max_shard_size!r}.")
        if not self.commit_message.strip():
            raise ValueError("commit_message must not be empty.")
        if self.create_pr and self.tag is not None:
            raise ValueError("tag names a version that is there: it goes on when the pull request is merged.")
        if self.create_pr and self.revision != "main":
            raise ValueError("create_pr proposes a change of main: give it without --revision.")
        if self.create_pr and self.space:
            raise ValueError("space shows the model of main: give it without --create_pr.")
        if self.space and self.format not in (None, "native"):
            raise ValueError(f"space runs the model in transformers, and not as {self.format}.")
        if self.space and self.revision != "main":
            raise ValueError("space shows the model of main: give it without --revision.")
        if self.base_model is not None and not is_name(self.base_model):
            raise ValueError(f"base_model must be a name on the Hub, such as user/name, got {self.base_model!r}.")


def license_of(text: str | None) -> str | None:
    """
    The name of a licence as the Hub writes it; `None` for an empty text.

    Raises:
        ValueError: for what cannot be the name of one.
    """
    name = (text or "").strip().lower()
    if name and not LICENSE.fullmatch(name):
        raise ValueError(f"license must be a name that the Hub knows, such as apache-2.0, mit or other, got {text!r}.")
    return name or None


def is_name(repository: str) -> bool:
    """Whether the Hub can have a repository of that name, which belongs to somebody."""
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return False
    return NAME.fullmatch(repository) is not None


def check_name(repository: str) -> None:
    """Raises ValueError for what cannot be the name of a repository."""
    if not is_name(repository):
        raise ValueError(
            f"{repository!r} is no name on the Hub: it must be user/name or organization/name, of letters, digits, "
            f"'-', '_' and '.', with a letter or digit at both ends, and of 96 characters at most."
        )


def parse_arguments(argv: list[str]) -> tuple[str, str, SharingArguments]:
    """The run or checkpoint, the repository, and the settings from the command line."""
    parser = ArgumentParser(SharingArguments, description="Share a model on the Hub.")
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run, checkpoint, adapter or export folder, or box")
    parser.add_argument("repository", metavar="user/name", help="where it goes")
    arguments, positional = parser.parse(argv)
    check_name(positional.repository)
    return positional.source, positional.repository, arguments
