"""What a run learns from: from what `--dataset` names to the batches of each step."""
