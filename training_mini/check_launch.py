"""
Does a launch configuration work on this machine? `python -m training_mini.check_launch fsdp2`

It trains a small model as the configuration says, and resumes that run from its checkpoint. Then it trains the same
model on one process, and compares the losses. Use it where there are several GPUs: the tests have none.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from entry_points_mini import name_of_program, one_sentence_errors
from files_mini import read_json_lines

from .launch_files import find_launch_file

PROGRAM = Path(__file__).parent.parent / "train_accelerate.py"
STEPS = 20
# Both runs in float32, because bfloat16 would round differently on another number of processes.
RUN = f"""--dataset sample --size tiny --max_position_embeddings 32 --train_batch_size 64 --warmup_steps 5
--max_steps {STEPS} --eval_steps {STEPS // 2} --save_steps {STEPS // 2} --logging_steps 1 --bf16 false
--max_eval_tokens 2048 --lr_scheduler_type constant --optimizer adamw""".split()  # which DeepSpeed takes too
TOLERANCE = 2e-3  # nats; TF32 and another order of sums stay below it


def main() -> None:
    parser = argparse.ArgumentParser(prog=name_of_program(), description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "config_file", help="a configuration of accelerate, or the name of one of Mini's, such as fsdp2"
    )
    parser.add_argument("launch_flags", nargs="*", help="more flags for accelerate launch, after --")
    arguments = parser.parse_args()
    with one_sentence_errors(), tempfile.TemporaryDirectory() as folder:
        config_file = find_launch_file(arguments.config_file)
        one, many = Path(folder) / "one", Path(folder) / "many"
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
        launch += ["--config_file", str(config_file), "--mixed_precision", "no", *arguments.launch_flags]
        # First what may not work.
        first = run([*launch, str(PROGRAM), *RUN, "--max_steps", str(STEPS // 2), "--output_dir", str(many)])
        run([*launch, str(PROGRAM), "--resume", "--output_dir", str(many), "--max_steps", str(STEPS)])
        run([sys.executable, str(PROGRAM), *RUN, "--output_dir", str(one)])
        layout = next(line for line in first.splitlines() if line.startswith("Training: "))
        print(layout)
        differences = [abs(a - b) for a, b in zip(losses(one), losses(many), strict=True)]
        print(f"largest difference of {len(differences)} losses from those of one process: {max(differences):.2e} nats")
        if max(differences) > TOLERANCE:
            step = next(i for i, difference in enumerate(differences, start=1) if difference > TOLERANCE)
            raise ValueError(f"The losses part at step {step}: this configuration does not train as one process does.")
        print("The configuration works: it trains as one process does, and goes on from its checkpoint.")


def run(command: list[str]) -> str:
    """The output of a program that must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        raise ValueError(
            (sentences or result.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        )
    return result.stdout


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if "loss" in line]


if __name__ == "__main__":
    main()
