"""
Goes on with several runs, one after the other in the same processes, which saves their start.

    python resume_worker.py MAX_STEPS FOLDER...
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import modeling_mini  # noqa: F401  (makes the Auto classes know Mini)
from training_mini.arguments import parse_arguments
from training_mini.trainer import train

if __name__ == "__main__":
    for folder in sys.argv[2:]:
        train(parse_arguments(["--resume", "--output_dir", folder, "--max_steps", sys.argv[1]]))
    sys.stdout.flush()
    os._exit(0)  # as train_accelerate.py ends: taking down a process group over gloo hangs now and then
