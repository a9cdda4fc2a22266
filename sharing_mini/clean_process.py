"""
A stranger's process: it knows transformers and torch, and nothing of Mini but what lies in the folder or repository.

Run by `verification.py` as a file of its own: a request as JSON on standard input, and the answer as JSON in the last
line of standard output.
"""

import json
import sys
from typing import Any


def is_of_mini(module: str) -> bool:
    """Whether a module is that of a Mini that is installed, and not the copy that came with the model."""
    package = module.split(".")[0]
    return package.endswith("_mini") or package == "tokenization"


def load(request: dict[str, Any]) -> tuple[Any, Any]:
    """The model, with nothing missing and nothing left over, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    name_or_path, options = request["name_or_path"], {"trust_remote_code": request["trust_remote_code"]}
    if request["revision"] is not None:
        options["revision"] = request["revision"]
    if request["kind"] == "adapter":
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(request["base"], trust_remote_code=request["trust_remote_code"])
        tokenizer = AutoTokenizer.from_pretrained(request["base"], trust_remote_code=request["trust_remote_code"])
        revision = {name: value for name, value in options.items() if name == "revision"}
        model = PeftModel.from_pretrained(base, name_or_path, **revision)
        if request["is_chat"]:  # with the settings of its base, an answer does not end
            model.generation_config = GenerationConfig.from_pretrained(name_or_path, **revision)
        return model, tokenizer
    model, report = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **options)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[name]:
            keys = sorted(map(str, report[name]))
            raise ValueError(
                f"the weights do not fit the configuration, {name.replace('_', ' ')}: {', '.join(keys[:3])}"
            )
    return model, AutoTokenizer.from_pretrained(name_or_path, **options)


def main() -> None:
    request = json.load(sys.stdin)
    import torch
    from transformers import set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = load(request)
    model.eval()
    if request["is_chat"]:
        messages = [{"role": "user", "content": request["prompt"]}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(request["prompt"], return_tensors="pt")
    inputs = inputs.to(model.device)
    inputs.pop("token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize  # recurrent models have none
    most = max(1, min(request["tokens"], context - length))
    with torch.no_grad():
        logits = model(**inputs).logits.float()
        greedy = model.generate(**inputs, do_sample=False, max_new_tokens=most)[0].tolist()
        set_seed(request["seed"])
        sample = model.generate(**inputs, do_sample=True, max_new_tokens=most)[0]
    if not torch.isfinite(logits).all():
        raise ValueError("the model's predictions are not finite")
    answer = {
        "ids": greedy,
        "logits": logits[0, -1, :8].tolist(),
        "sample": tokenizer.decode(sample[length if request["is_chat"] else 0 :], skip_special_tokens=True),
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "loaded_of_mini": list(filter(is_of_mini, sys.modules)),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        # Whatever it is, in one line, and the last: `verification.py` shows that one.
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
