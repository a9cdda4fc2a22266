"""
The way up: one commit holds all files, so a repository never shows half of a model.

Large files are sent before it, each by its checksum; what the Hub has already is not sent again, so a push that was
interrupted, even killed, goes on where it was when the same command is given again. An answer that is lost does no harm
either: before each try the files are compared with what is there.
"""

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files_mini import ADAPTER_CONFIG, MODEL_CONFIG
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from .hub import Hub
from .staging import LOADED, Staged
from .verification import checksums

# What makes a model another one, where two configurations differ in it.
ARCHITECTURE = (
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "norm_type", "qk_norm", "tie_word_embeddings", "peft_type",
    "base_model_name_or_path",
)  # fmt: skip
# What a repository holds, by a file that nothing else has; the first that fits.
KINDS = {
    "gguf": r"[^/]+\.gguf", "onnx": r"(onnx/)?[^/]+\.onnx", "adapter": re.escape(ADAPTER_CONFIG),
    "model": re.escape(MODEL_CONFIG),
}  # fmt: skip
WORDS = {"gguf": "GGUF files", "onnx": "a model in ONNX", "adapter": "an adapter", "model": "a model for transformers"}
# Of these requests the client itself tries each again.
CLIENT_WAITS = ()
Listing = dict[str, tuple[int, str]]


@dataclass
class Pushed:
    """
    Where the files are now.

    Attributes:
        commit: its id.
        url: of the repository, or of the pull request.
        was_there: nothing had to be sent.
    """

    commit: str
    url: str
    was_there: bool


@dataclass
class Repository:
    """A repository of the Hub, of models or Spaces."""

    hub: Hub
    name: str
    type: str = "model"
    revision: str = "main"

    @property
    def url(self) -> str:
        return f"{self.hub.api.endpoint}/{'spaces/' if self.type == 'space' else ''}{self.name}"

    def information(self, revision: str | None = None) -> Any | None:
        """What the Hub says of it at a revision, or `None` where there is none."""

        def ask() -> Any | None:
            try:
                return self.hub.api.repo_info(self.name, repo_type=self.type, revision=revision)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None

        return self.hub.try_to(f"look at {self.name!r}", ask)

    def create(self, private: bool, sdk: str | None = None) -> None:
        """
        Makes the repository and the branch where there are none.

        Raises:
            ValueError: if it is public and should be private.
        """
        self.hub.try_to(
            f"create {self.name!r}",
            lambda: self.hub.api.create_repo(
                self.name, repo_type=self.type, private=private or None, space_sdk=sdk, exist_ok=True
            ),
        )
        if private and not self.information().private:
            raise ValueError(
                f"{self.name!r} exists and is public: push without --private, to another name, or make it private in "
                f"its settings first."
            )
        if self.revision != "main":
            self.hub.try_to(
                f"create the branch {self.revision!r} of {self.name!r}",
                lambda: self.hub.api.create_branch(self.name, branch=self.revision, repo_type=self.type, exist_ok=True),
            )

    def listing(self, revision: str) -> Listing:
        """Path to size and checksum: SHA-256 of a large file, that of git for others."""

        def ask() -> Listing:
            entries = self.hub.api.list_repo_tree(self.name, recursive=True, revision=revision, repo_type=self.type)
            return {
                entry.path: (entry.size, entry.lfs.sha256 if entry.lfs is not None else entry.blob_id)
                for entry in entries if isinstance(entry, RepoFile)
            }  # fmt: skip

        return self.hub.try_to(f"list the files of {self.name!r}", ask, waits=CLIENT_WAITS)

    def text(self, name: str) -> str | None:
        """A file of text that is there now; `None` where there is none."""
        with tempfile.TemporaryDirectory() as folder:

            def ask() -> str | None:
                try:
                    path = self.hub.api.hf_hub_download(
                        self.name, name, repo_type=self.type, revision=self.revision, cache_dir=folder
                    )
                except (RemoteEntryNotFoundError, RevisionNotFoundError):
                    return None
                return Path(path).read_text(encoding="utf-8", errors="replace")

            return self.hub.try_to(f"read {name} of {self.name!r}", ask)

    def configuration(self) -> dict[str, Any]:
        """
        `config.json` or `adapter_config.json` of what is there now; empty where there is neither.

        Raises:
            ValueError: if it is no JSON object, so that nobody can say what is there.
        """
        for name in (MODEL_CONFIG, ADAPTER_CONFIG):
            if (text := self.text(name)) is not None:
                try:
                    found = json.loads(text)
                except json.JSONDecodeError:
                    found = None
                if not isinstance(found, dict):
                    raise ValueError(
                        f"{name} in {self.name!r} on the Hub is broken: push to another name, or replace it by "
                        f"--replace."
                    )
                return found
        return {}

    def kind(self) -> str | None:
        """What is there now, by the names of the files: a key of `EXPECTED`, or `None` where there is no model."""
        information = self.information(self.revision)
        names = [sibling.rfilename for sibling in information.siblings or []] if information is not None else []
        for kind, pattern in KINDS.items():
            if any(re.fullmatch(pattern, name) for name in names):
                return kind
        return None

    def commit_of_tag(self, tag: str) -> str | None:
        refs = self.hub.try_to(
            f"list the tags of {self.name!r}", lambda: self.hub.api.list_repo_refs(self.name, repo_type=self.type)
        )
        return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)

    def check_tag(self, name: str, files: dict[str, Path], kind: str | None) -> None:
        """Raises ValueError if the tag stands for other files already."""
        commit = self.commit_of_tag(name) if self.information() is not None else None
        if commit is not None:
            local = {path: checksums(file) for path, file in files.items()}
            if self.missing(files, local, kind, commit) != ([], []):
                raise ValueError(
                    f"{self.name!r} has a tag {name!r} already, for other files (commit {commit[:7]}): a version keeps "
                    f"its name, so choose another."
                )

    def tag(self, name: str, commit: str) -> None:
        """Gives a commit a name, once."""
        if self.commit_of_tag(name) == commit:
            return

        def set_it() -> None:
            try:
                self.hub.api.create_tag(self.name, tag=name, revision=commit, repo_type=self.type)
            except HfHubHTTPError as error:
                # The answer to an earlier try may have been lost.
                if error.response.status_code != 409 or self.commit_of_tag(name) != commit:
                    raise

        self.hub.try_to(f"tag {self.name!r}", set_it)

    def push(self, files: dict[str, Path], message: str, kind: str | None = None, create_pr: bool = False) -> Pushed:
        """
        Sends the files in one commit.

        Args:
            kind: files of a model of this kind that are there and not among `files` (shards of yesterday) are removed;
                whatever else is there stays.
        """
        local = {name: checksums(path) for name, path in files.items()}
        head = self.information(self.revision).sha
        if self.missing(files, local, kind, self.revision) == ([], []):
            return Pushed(head, self.url, True)
        additions = self.additions(files)
        self.hub.try_to(
            f"upload to {self.name!r}",
            lambda: self.hub.api.preupload_lfs_files(
                self.name, additions, repo_type=self.type, revision=self.revision, create_pr=create_pr
            ),
            waits=CLIENT_WAITS,
        )
        attempt = self.propose if create_pr else self.commit
        return self.hub.try_to(f"commit to {self.name!r}", lambda: attempt(files, local, message, kind, head))

    def additions(self, files: dict[str, Path]) -> list[CommitOperationAdd]:
        return [CommitOperationAdd(name, path) for name, path in files.items()]

    def missing(
        self, files: dict[str, Path], local: dict[str, list[tuple[int, str]]], kind: str | None, revision: str
    ) -> tuple[list[str], list[str]]:
        """What has to be sent to a revision and what to be removed from it, for it to hold the files."""
        there = self.listing(revision)
        changed = [name for name in files if there.get(name) not in local[name]]
        return changed, [name for name in there if name not in files and is_replaced(name, kind)]

    def commit(self, files: dict[str, Path], local: dict, message: str, kind: str | None, head: str) -> Pushed:
        """One try, which finds the commit of an earlier one whose answer was lost."""
        changed, stale = self.missing(files, local, kind, self.revision)
        if not changed and not stale:
            return Pushed(self.information(self.revision).sha, self.url, False)
        operations = [*self.additions(files), *(CommitOperationDelete(name, is_folder=False) for name in stale)]
        done = self.hub.api.create_commit(
            self.name, operations, commit_message=message, repo_type=self.type, revision=self.revision,
            parent_commit=head,
        )  # fmt: skip
        return Pushed(done.oid, self.url, False)

    def propose(self, files: dict[str, Path], local: dict, message: str, kind: str | None, head: str) -> Pushed:
        """One try at a pull request, which finds one of ours that holds the files already."""
        for number in self.own_pull_requests(message):
            revision = f"refs/pr/{number}"
            if self.missing(files, local, kind, revision) == ([], []):
                return Pushed(self.information(revision).sha, f"{self.url}/discussions/{number}", True)
        _, stale = self.missing(files, local, kind, self.revision)
        operations = [*self.additions(files), *(CommitOperationDelete(name, is_folder=False) for name in stale)]
        done = self.hub.api.create_commit(
            self.name, operations, commit_message=message, repo_type=self.type, create_pr=True, parent_commit=head
        )
        return Pushed(done.oid, done.pr_url, False)

    def own_pull_requests(self, title: str) -> list[int]:
        found = self.hub.api.get_repo_discussions(
            self.name, author=self.hub.user, discussion_type="pull_request", discussion_status="open",
            repo_type=self.type,
        )  # fmt: skip
        return [each.num for each in found if each.title == title]


def is_replaced(name: str, kind: str | None) -> bool:
    """Whether a push of this kind takes the place of a file: what loads a model must not find parts of another."""
    patterns = LOADED if kind in ("model", "adapter") else []
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def check_architecture(repository: Repository, staged: Staged) -> None:
    """
    Raises:
        ValueError: if the repository holds another model, naming what differs.
    """
    kind = repository.kind()
    if kind is not None and kind != staged.kind:
        raise ValueError(
            f"{repository.name!r} holds {WORDS[kind]}, and this is {WORDS[staged.kind]}, whose card would take the "
            f"place of the one there: push to another name, or do it all the same by --replace."
        )
    there = repository.configuration()
    if not there or not staged.config:
        return
    for name in ARCHITECTURE:
        old, new = there.get(name), staged.config.get(name)
        if old != new:
            raise ValueError(
                f"{repository.name!r} holds another model ({name} is {old!r} there and {new!r} here): push to another "
                f"name, or replace it by --replace."
            )


def check_card(hub: Hub, card: Path, repo_type: str = "model") -> None:
    """
    Asks the Hub whether it takes the metadata, before anything is made.

    Raises:
        ValueError: with the Hub's reason, for instance a licence that it does not know.
    """

    def ask() -> None:
        try:
            ModelCard.load(card, ignore_metadata_errors=True).validate(repo_type)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError):
                raise
            raise CardRefused(errors_of(str(error))) from None

    try:
        hub.try_to("check the card", ask)
    except CardRefused as refused:
        raise ValueError(f"The Hub does not take the card: {refused}.") from None


class CardRefused(Exception):
    """The Hub's reasons."""


def errors_of(answer: str) -> str:
    try:
        reasons = [each["message"] for each in json.loads(answer)["errors"]]
    except (json.JSONDecodeError, KeyError, TypeError):
        reasons = [answer]
    return " ".join("; ".join(reasons).split()).rstrip(".")
