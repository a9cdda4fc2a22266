"""
Prints the path of a file for launching that comes with Mini, also when Mini was installed by pip. Without a name, it
lists these files.

    accelerate launch --config_file "$(python -m training_mini.launch_files fsdp2.yaml)" -m train_accelerate ...
    sbatch --nodes 2 "$(python -m training_mini.launch_files train.sh)" runs/big ...
"""

import argparse
from pathlib import Path

from entry_points_mini import name_of_program, one_sentence_errors
from shape_mini import nearest_name

from .arguments import files_of_mini


def launch_files() -> dict[str, Path]:
    """The configurations of accelerate and the script for Slurm, by their names."""
    files = [file for pattern in ("accelerate/*.yaml", "slurm/*.sh") for file in files_of_mini(f"configs/{pattern}")]
    return {file.name: file.resolve() for file in reversed(files)}


def find_launch_file(name: str) -> Path:
    """
    The file that a path means, or the name of one that comes with Mini: `fsdp2` or `fsdp2.yaml`.

    Raises:
        ValueError: for a name of neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = launch_files()
    for candidate in (Path(name).name, f"{name}.yaml"):
        if candidate in known:
            return known[candidate]
    raise ValueError(
        f"There is no configuration file {name!r}{nearest_name(name, list(known)) or '.'} With Mini come "
        f"{', '.join(sorted(known))}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog=name_of_program(), description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("name", nargs="?", help="such as fsdp2 or train.sh")
    name = parser.parse_args().name
    with one_sentence_errors():
        if name is not None:
            print(find_launch_file(name))
            return
        for known, file in sorted(launch_files().items()):
            lines = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
            sentence = " ".join(lines).partition(". ")[0]
            print(f"{known:24} {sentence.removesuffix('.')}.")


if __name__ == "__main__":
    main()
