#!/bin/bash
# Trains under Slurm, on one machine or several that see one file system. The first argument is the folder of the run, the
# others are flags of train_accelerate.py:
#   sbatch --nodes 2 configs/slurm/train.sh runs/big --size gpt2 --dataset FOLDER
# Where Mini was installed by pip, "$(python -m training_mini.launch_files train.sh)" is this file.
# Before the time is over, each process gets a signal: a checkpoint is written, and the job is queued again. A job that
# begins again, for this or another reason, goes on from the newest checkpoint.
# Sharded (FSDP2): export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 before sbatch; with a mesh too:
#   export ACCELERATE_USE_PARALLELISM_CONFIG=true PARALLELISM_CONFIG_DP_REPLICATE_SIZE=2 PARALLELISM_CONFIG_DP_SHARD_SIZE=8
#SBATCH --job-name=mini
#SBATCH --ntasks-per-node=8     # a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300       # seconds before the end; a checkpoint has to be written in them
#SBATCH --requeue
#SBATCH --open-mode=append

run=$1
shift
flags=("$@")
if compgen -G "$run/checkpoints/step_*" > /dev/null; then
  flags=(--resume)
elif [ -e "$run/config.yaml" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  flags+=(--overwrite)          # this job began the run, and ended before its first checkpoint
fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python -m train_accelerate "$@"' mini "${flags[@]}" --output_dir "$run"
code=$?
if [ "$code" -eq 75 ]; then     # "try again later": it was asked to stop
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
