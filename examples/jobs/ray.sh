#!/bin/bash
# One node of eight GPUs of a Ray cluster, as a Ray job: Ray picks the node, torchrun starts the processes on it. From a checkout,
# with the cluster's address in RAY_API_SERVER_ADDRESS and a RUN that outlives the job:
#
#     ray job submit --working-dir . --entrypoint-num-gpus 8 -- env RUN=/shared/runs/mine bash examples/jobs/ray.sh
#
# The same command once more goes on with a run that was stopped.

set -euo pipefail
RECIPE=${RECIPE:-recipes/chat.yaml}
RUN=${RUN:?a folder that outlives the job, such as /shared/runs/mine}
GPUS=${GPUS:-8}

make .venv/.installed
export PATH="$PWD/.venv/bin:$PATH"
if [[ -f $RUN/lock.json ]]; then
    command=(resume "$RUN")
else
    command=(train "$RECIPE" "train.output_dir=$RUN")
fi
torchrun --standalone --nproc-per-node "$GPUS" -m loratune "${command[@]}"
