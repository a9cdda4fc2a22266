"""A push from beginning to end: look, prove, describe, send, prove again."""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cards_mini import CARD, PROMPT, first_prompt
from entry_points_mini import quiet_libraries
from files_mini import MODEL_CONFIG, read_json_lines
from modeling_mini.export import export
from rich.console import Console

from .arguments import SharingArguments, check_name, license_of
from .card import gather, write_card
from .hub import Hub, check_token
from .space import write_space
from .staging import Source, Staged, check_secrets, files_of, find_source, stage
from .upload import Pushed, Repository, check_architecture, check_card
from .verification import Proof, check_listing, check_same, prove

console = Console(stderr=True)


@dataclass
class Result:
    """
    What came out, for the report of the entry point.

    Attributes:
        sizes: of the files, by path in the repository.
        pushed, space: `None` after a dry run.
        verified: whether the model was loaded from the Hub and wrote the same.
    """

    repository: str
    arguments: SharingArguments
    sizes: dict[str, int]
    card: str
    pushed: Pushed | None = None
    space: Pushed | None = None
    verified: bool = False
    notices: list[str] = field(default_factory=list)


def push(
    source: str,
    repository: str,
    arguments: SharingArguments | None = None,
    notify: Callable[[str], None] = lambda sentence: console.print(
        sentence, highlight=False, markup=False, soft_wrap=True
    ),
) -> Result:
    """
    Shares what lies in a run, checkpoint, adapter or export folder.

    Args:
        repository: `user/name`.
        notify: gets sentences on the way.

    Raises:
        ValueError: for what the user has to set right, in one sentence; nothing has been made public then, unless the
            sentence says that what is on the Hub is not what was sent, or does not load from there.
        ConnectionError: for what may be right later; the same call goes on where this one ended.
    """
    arguments = arguments or SharingArguments()
    check_name(repository)
    if arguments.token:
        check_token(arguments.token)
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="mini-push-") as temporary:
        folder = Path(temporary)
        found = exported(source, arguments.format, folder) if arguments.format else find_source(source)
        (folder / "model").mkdir()
        staged = stage(found, folder / "model", arguments.max_shard_size, arguments.token)
        merged = merged_of(found)
        base = base_of(staged, arguments, merged)
        hub = None
        if not arguments.dry_run:
            hub = Hub(repository, arguments.token, notify)
            hub.user = hub.try_to("log in", hub.api.whoami)["name"]
            check_secrets(staged, hub.token)
        target = Repository(hub, repository, revision=arguments.revision) if hub is not None else None
        if target is not None:
            check_target(target, staged, arguments)
            check_base(hub, staged)
        there = target.text(CARD) if target is not None and not arguments.replace and target.information() else None
        card = gather(found, staged, there)
        license = arguments.license or card.metadata.get("license") or ask_for_license()
        proof = None
        if not arguments.no_verify:
            notify("Loading the folder in a clean process ...")
            is_chat = card.facts.is_chat
            prompt = first_prompt(card.facts) if is_chat else prompt_of(found.run)
            proof = prove(staged, str(staged.folder), prompt, base, is_chat=is_chat)
        named = None if arguments.revision == "main" or arguments.create_pr else arguments.revision
        write_card(card, staged, repository, license, proof, named)
        check_secrets(staged, hub.token if hub is not None else arguments.token)
        result = Result(
            repository, arguments, {name: path.stat().st_size for name, path in staged.files.items()},
            (staged.folder / CARD).read_text(encoding="utf-8"),
        )  # fmt: skip
        if card.is_own:
            result.notices.append("README.md is somebody's own: its text stays, and its metadata are completed.")
        if merged is not None:
            result.notices.append(f"This is the adapter alone. {str(merged)!r} is the whole model, and needs no base.")
        if license is None:
            result.notices.append("It has no licence, so nobody else may use it: --license apache-2.0, for instance.")
        space_folder = folder / "space"
        if arguments.space:
            space_folder.mkdir()
            write_space(repository, staged, space_folder, license)
            result.sizes |= {f"space: {name}": path.stat().st_size for name, path in files_of(space_folder).items()}
        if hub is None:
            return result
        send(result, target, staged, proof, space_folder, notify)
        return result


def exported(source: str, format: str, folder: Path) -> Source:
    """An export of a checkpoint, made on the way."""
    original = find_source(source)
    found = find_source(str(export(format, original.folder, folder / format)))
    return Source(found.folder, original.run, found.kind)


def merged_of(source: Source) -> Path | None:
    """The folder of the model that an adapter of a run was merged into, if the run has one."""
    folder = source.run / "merged" if source.kind == "adapter" and source.run is not None else None
    return folder if folder is not None and (folder / MODEL_CONFIG).is_file() else None


def base_of(staged: Staged, arguments: SharingArguments, merged: Path | None = None) -> str | None:
    """
    Where the model of an adapter is to be loaded from; the staged adapter gets its name on the Hub.

    Args:
        merged: the folder of the model that the adapter was merged into.

    Raises:
        ValueError: if strangers could not find it.
    """
    if staged.kind != "adapter":
        if arguments.base_model is not None:
            raise ValueError("base_model belongs to an adapter, and this is a whole model.")
        return None
    trained_on = staged.config.get("base_model_name_or_path") or ""
    is_local = Path(trained_on).is_dir()
    if arguments.base_model is None and (is_local or trained_on.count("/") != 1 or trained_on.startswith((".", "/"))):
        instead = f" Or push the merged model instead, which needs no base: {str(merged)!r}." if merged else ""
        raise ValueError(
            f"The adapter was trained on {trained_on!r}, which is a folder here: push that first, and name it by "
            f"--base_model user/name.{instead}"
        )
    if arguments.base_model is not None:
        staged.config["base_model_name_or_path"] = arguments.base_model
        path = staged.folder / "adapter_config.json"
        path.write_text(json.dumps(staged.config, indent=2) + "\n", encoding="utf-8")
    return str(Path(trained_on).resolve()) if is_local else staged.config["base_model_name_or_path"]


def check_target(target: Repository, staged: Staged, arguments: SharingArguments) -> None:
    """What can be known before the work: the repository is there where it has to be, and fits the model."""
    information = target.information()
    if information is None:
        if arguments.create_pr:
            raise ValueError(
                f"There is no repository {target.name!r} to propose a change of: push without --create_pr."
            )
        return
    if arguments.private and not information.private:
        raise ValueError(
            f"{target.name!r} exists and is public: push without --private, to another name, or make it private in its "
            f"settings first."
        )
    if arguments.revision != "main" and target.commit_of_tag(arguments.revision) is not None:
        raise ValueError(f"revision names a branch, and {arguments.revision!r} is a tag of {target.name!r}.")
    if not arguments.replace:
        check_architecture(target, staged)


def check_base(hub: Hub, staged: Staged) -> None:
    """Raises ValueError if the model that an adapter belongs to is not on the Hub."""
    base = staged.config.get("base_model_name_or_path") if staged.kind == "adapter" else None
    if base is not None and Repository(hub, base).information() is None:
        raise ValueError(f"There is no model {base!r} on the Hub, which the adapter belongs to: push that first.")


def prompt_of(run: Path | None) -> str:
    """What the run let its model continue, or a word."""
    samples = read_json_lines(run / "samples.jsonl") if run is not None else []
    prompts = [sample["prompt"] for sample in samples if isinstance(sample.get("prompt"), str)]
    return prompts[-1] if prompts else PROMPT


def ask_for_license() -> str | None:
    """
    A licence is the user's to choose: it is asked for where somebody can answer.

    Raises:
        ValueError: for an answer that cannot be the name of one.
    """
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return license_of(console.input("Licence of the model, such as apache-2.0, mit or cc-by-4.0 (empty: none yet): "))


def send(
    result: Result, target: Repository, staged: Staged, proof: Proof | None, space_folder: Path,
    notify: Callable[[str], None],
) -> None:  # fmt: skip
    """Everything that changes the Hub, and the look at what came of it."""
    arguments, hub = result.arguments, target.hub
    check_card(hub, staged.folder / CARD)
    if arguments.tag is not None:
        target.check_tag(arguments.tag, staged.files, staged.kind)
    if not arguments.create_pr:
        target.create(arguments.private)
    notify(f"Uploading {len(staged.files)} files, {sum(p.stat().st_size for p in staged.files.values()):,} bytes ...")
    result.pushed = target.push(staged.files, arguments.commit_message, staged.kind, arguments.create_pr)
    check_listing(staged, target.listing(result.pushed.commit), target.name)
    if proof is not None:
        notify("Loading it from the Hub in a clean process ...")
        after = prove(
            staged,
            target.name,
            proof.prompt,
            staged.config.get("base_model_name_or_path"),
            result.pushed.commit,
            hub.token if target.information().private else None,
            proof.is_chat,
        )
        if after is not None:
            check_same(proof, after, target.name)
            result.verified = True
    if arguments.tag is not None:  # not before: it names one set of files for good
        target.tag(arguments.tag, result.pushed.commit)
    if arguments.space:
        space = Repository(hub, target.name, type="space")
        check_card(hub, space_folder / CARD, "space")
        space.create(arguments.private, sdk="gradio")
        result.space = space.push(files_of(space_folder), arguments.commit_message)
        if arguments.private:
            result.notices.append("The model is private: give the Space a secret HF_TOKEN that may read it.")
