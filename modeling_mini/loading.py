"""From what a user calls a model to a model and its tokenizer."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

RUNS_FOLDER = Path("runs")
# In a run, what to write with: the best model so far, or what a crash left of it, or the last one.
CHECKPOINTS_OF_A_RUN = ("best", ".best.previous", "final", ".final.previous")


def find_checkpoint(model: str | None) -> str:
    """
    The checkpoint folder, or Hub name, that `--model` means.

    Raises:
        ValueError: if there is none.
    """
    if model is None:
        folders = [
            path.parent for run in RUNS_FOLDER.glob("*") for name in CHECKPOINTS_OF_A_RUN
            for path in run.glob(f"{name}/config.json")
        ]  # fmt: skip
        if not folders:
            raise ValueError(f"There is no trained model under {RUNS_FOLDER}/: train one first, or name it by --model.")
        newest_run = max(folders, key=lambda folder: (folder / "config.json").stat().st_mtime).parent
        return find_checkpoint(str(newest_run))
    folder = Path(model)
    if not folder.exists():
        if model.count("/") == 1 and not model.startswith(".") and not folder.parent.is_dir():
            return model
        raise ValueError(f"There is no run or checkpoint folder {model!r}.")
    if (folder / "config.json").is_file():
        return model
    for name in CHECKPOINTS_OF_A_RUN:
        if (folder / name / "config.json").is_file():
            return str(folder / name)
    if (folder / "trainer_state.json").is_file():
        raise ValueError(f"{model!r} is a state to resume training from; name its run, or the folder best or final.")
    raise ValueError(f"{model!r} holds no trained model: it has no config.json, and no best or final folder with one.")


def load_checkpoint(
    name_or_path: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The model, in evaluation mode and on a GPU if there is one, and the tokenizer.

    Raises:
        ValueError: if a file is missing or damaged, naming it.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
            raise ValueError(f"{name_or_path!r} has no weights: model.safetensors is missing.")
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{name_or_path!r} has no tokenizer: tokenizer.json is missing.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except SafetensorError as error:
        raise ValueError(f"The weights in {name_or_path!r} are damaged or cut short ({error}).") from None
    except OSError as error:
        raise ValueError(f"No model could be loaded from {name_or_path!r}: {error}") from None
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
