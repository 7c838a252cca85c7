#!/bin/bash
# Two nodes of eight GPUs under Slurm: from a checkout that all nodes see, with `make .venv/.installed` done in it,
#
#     sbatch examples/jobs/slurm.sh
#     RECIPE=my.yaml RUN=/shared/runs/mine sbatch --nodes=4 examples/jobs/slurm.sh
#
# A job that is preempted, or loses a node, is queued again under the same number and goes on from its last checkpoint.

#SBATCH --job-name=loratune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=loratune-%j.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
RECIPE=${RECIPE:-recipes/chat.yaml}
RUN=${RUN:-$PWD/__models/slurm-$SLURM_JOB_ID}
PORT=${PORT:-29500}

if [[ -f $RUN/lock.json ]]; then
    command=(resume "$RUN")
else
    command=(train "$RECIPE" "train.output_dir=$RUN")
fi
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# One torchrun a node, which starts a process for each of its GPUs.
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$PORT" \
    -m loratune "${command[@]}"
