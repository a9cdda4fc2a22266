"""The samples that a model writes during training, and how many of its Python functions are valid."""

import ast
import warnings

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .build import Run
from .data.corpus import Corpus, ids_of_function

# A sample is tried up to MOST_TRIES times, until this share of it is not blank. Deeply indented source is half blank.
MOST_TRIES, LEAST_VISIBLE = 4, 0.3
FUNCTIONS = 100  # so that a share of them is a whole number of percent
LONGEST_FUNCTION = 256  # tokens


def samples_of_run(run: Run) -> list[dict[str, str]]:
    """A sample for each prompt of a run, as long as the context, on the main process. Every process calls it."""
    prompts = run.corpus.make_prompts(run.held_out, run.arguments.monitoring.sample_prompts)
    with run.full_model() as model:
        if model is None:
            return []
        return write_samples(model, run.corpus, prompts, run.config.max_position_embeddings, run.arguments.run.seed)


def functions_of_run(run: Run) -> float | None:
    """`share_of_valid_functions` of a run on Python, on the main process. Every process calls it."""
    if not run.corpus.is_python:
        return None
    with run.full_model() as model:
        return share_of_valid_functions(model, run.corpus.tokenizer) if model is not None else None


def write_samples(
    model: PreTrainedModel, corpus: Corpus, prompts: list[tuple[str, list[int]]], max_length: int, seed: int
) -> list[dict[str, str]]:
    """
    A sample for each prompt, of at most `max_length` tokens with the prompt. One that is mostly blank is written anew
    with another seed, a few times. The model does not change.
    """
    samples = []
    was_training = model.training
    model.eval()
    # A compiled model would compile again for the shape of each prompt.
    with torch.compiler.set_stance("force_eager"):
        for prompt, prompt_ids in prompts:
            ids = torch.tensor([prompt_ids[: max_length - 1]], device=model.device)  # (1, prompt)
            tries: list[tuple[float, str]] = []
            while len(tries) < MOST_TRIES and (not tries or tries[-1][0] < LEAST_VISIBLE):
                set_seed((seed + len(tries)) % 2**32)
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_length=max_length,
                    min_new_tokens=corpus.min_new_tokens(max_length - ids.shape[1]),
                )
                written = corpus.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
                # In a conversation, special tokens show who speaks.
                text = corpus.tokenizer.decode(output[0], skip_special_tokens=not corpus.is_chat)
                if prompt and not prompt.startswith("\n"):
                    text = text.lstrip("\n")  # see `ids_of_function`
                tries.append((visible_share(written), text))
            samples.append({"prompt": prompt, "text": max(tries)[1]})
    model.train(was_training)
    return samples


def visible_share(text: str) -> float:
    """The share of the characters of a text that are not blank, from 0 to 1."""
    return len("".join(text.split())) / max(1, len(text))


def share_of_valid_functions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int = FUNCTIONS,
    seed: int = 0,
    max_new_tokens: int = LONGEST_FUNCTION,
    max_seconds: float = 20.0,
) -> float:
    """
    How well a model knows the grammar of Python, in a number that everybody understands: it writes `count` functions,
    each begun with `def `, as `ids_of_function` has it, and this is the share of them, from 0 to 1, that `ast.parse`
    accepts.

    The functions are written in one batch, as `generate` samples with the model's own settings. A second call gives the
    same share. The model and the global random state do not change.

    Args:
        max_new_tokens: of one function, if the context has room for them; see `first_function` for a longer one.
        max_seconds: after this time the functions are judged as far as they are written, so that nobody waits for a
            large model on a slow machine.
    """
    ids = torch.tensor([ids_of_function(tokenizer)] * count, device=model.device)  # (count, prompt)
    capacity = model.config.max_position_embeddings - ids.shape[1]
    if capacity < 1:
        return 0.0  # the beginning fills the context
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # A compiled model would compile again for this shape.
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                max_new_tokens=min(max_new_tokens, capacity),
                max_time=max_seconds,
            )
    finally:
        model.train(was_training)
    texts = [text.lstrip("\n") for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    ends = model.generation_config.eos_token_id  # one, several or none
    ends = torch.tensor([] if ends is None else ends, device=output.device)
    has_ended = torch.isin(output[:, ids.shape[1] :], ends).any(dim=1).tolist()
    functions = [first_function(text, is_whole) for text, is_whole in zip(texts, has_ended, strict=True)]
    return sum(map(is_valid_python, functions)) / count


def first_function(text: str, is_whole: bool) -> str:
    """
    The function that a text begins with: up to the first line that is indented less than its body. Of a text that was
    cut off (`is_whole` is false) before that, the last statement of the body is left out, because it may lack its end.
    """
    lines = text.split("\n")
    body = next((number for number, line in enumerate(lines, start=1) if line.rstrip().endswith(":")), len(lines))
    depth, last = None, 0
    for number, line in enumerate(lines[body:], start=body):
        if line.strip():
            indentation = len(line) - len(line.lstrip())
            depth = indentation if depth is None else depth
            if indentation < depth:
                return "\n".join(lines[:number])
            if indentation == depth:
                last = number
    return text if is_whole else "\n".join(lines[:last])


def is_valid_python(source: str) -> bool:
    """Whether `ast.parse` accepts it. It has at least a statement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes in strings
        try:
            return bool(ast.parse(source).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError: nested too deeply
            return False
