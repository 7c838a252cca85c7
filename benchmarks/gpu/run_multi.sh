#!/usr/bin/env bash
# Ten minutes on a machine with several NVIDIA GPUs, offline: do several processes take the steps of one, with nccl and
# with a base that they share, how fast, and what happens when one of them dies? After run.sh, which tries one GPU.
#
#     benchmarks/gpu/run_multi.sh [RESULTS]                 # RESULTS: a folder, by default gpu-results-multi
#     benchmarks/gpu/run_multi.sh --dry-run [RESULTS]       # two processes with gloo on the CPU, in tiny sizes
#
# Steps, limits, results and variables are those of run.sh. PROCESSES: how many (all GPUs; two in the dry run).
# No machine with several GPUs has run this script yet.
RESULTS=gpu-results-multi
# shellcheck source=steps.sh
source "$(dirname "$0")/steps.sh"
WORK=$OUT/work
if [ $DEVICE = cpu ]; then export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=; fi
[ $DEVICE = cpu ] && default=2 || default=$(nvidia-smi --list-gpus | wc -l)
export PROCESSES=${PROCESSES:-$default} NCCL_DEBUG=${NCCL_DEBUG:-WARN}

torchrun() { # NAME LIMIT ARGUMENTS…
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$PROCESSES" "$@"
}
# The run of a recipe that a step before has written, by all processes.
together() { # NAME LIMIT RECIPE SETTINGS…
  local name=$1 limit=$2 recipe=$3
  shift 3
  torchrun "$name" "$limit" -m loratune train "$WORK/$recipe.yaml" "train.output_dir=$WORK/runs/$name" "$@" --overwrite
}

#        name       limit  script or recipe          what it answers
measure  machine       40  kernels machine         # versions, rates of products and copies
torchrun links         60  "$HERE/measure_multi.py" links  # what an all-reduce takes, from one number to 256 MiB
measure  small         60  multi alone small       # the run of one process, which the others must equal
together small-ddp     60  small train.strategy=ddp
together small-fsdp    60  small train.strategy=fsdp
measure  equal         20  multi equal small small-ddp small-fsdp
measure  lost          90  multi lost small        # a process that is killed: how the others end, and when
measure  big          120  multi alone big         # Qwen2 1.5B on one GPU
together big-ddp       90  big train.strategy=ddp
together big-fsdp     120  big train.strategy=fsdp train.compile=auto
measure  speed         20  multi equal big big-ddp big-fsdp
"$PYTHON" "$HERE/results_table.py" "$OUT"
