#!/usr/bin/env bash
# Ten minutes on one NVIDIA GPU, offline: is every path right there, how fast is it, and where does the time go?
#
#     benchmarks/gpu/run.sh [RESULTS]                 # RESULTS: a folder, by default gpu-results
#     benchmarks/gpu/run.sh --dry-run [RESULTS]       # the same code in tiny sizes on the CPU, each kind of step once
#
# Each step is a process with a time limit of its own. A step appends its results to RESULTS/results.jsonl as it gets
# them, so one that fails or is cut off loses nothing before it, and the rest go on; what a step prints is in
# RESULTS/log.txt. RESULTS/results.json has all results so far after each step, and a table comes last. No model and no data travel: weights are random, the
# tokenizer has one token a byte, rows are generated. Wheels that the machine lacks: wheels.txt beside this script.
#
# PYTHON: the interpreter (python3). SECONDS_IN_ALL: when no step is started any more (585). LIMIT: the seconds of every
# step, in place of its own limit.
# The steps' limits are guesses of what an H100 takes: no GPU has run this script yet.
set -uo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
DEVICE=cuda PATIENCE=1
if [ "${1:-}" = --dry-run ]; then DEVICE=cpu PATIENCE=4; shift; fi # a busy CPU may take long; nothing depends on it
OUT=${1:-gpu-results}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
PYTHON=${PYTHON:-python3}
END=$((SECONDS + ${SECONDS_IN_ALL:-585} * PATIENCE))
export OUT DEVICE PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=$OUT/work/inductor \
  TRITON_CACHE_DIR=$OUT/work/triton LORATUNE_CACHE=$OUT/work/cache
: >"$OUT/results.jsonl" && : >"$OUT/log.txt"

step() { # NAME LIMIT COMMAND…
  local name=$1 limit=${LIMIT:-$(($2 * PATIENCE))} left=$((END - SECONDS)) started=$SECONDS code
  shift 2
  if [ $left -lt 10 ]; then code=skipped; else
    [ "$limit" -gt $left ] && limit=$left
    echo "== $name (at most $limit s)" | tee -a "$OUT/log.txt"
    timeout -k 5 "$limit" "$@" >>"$OUT/log.txt" 2>&1
    code=$?
  fi
  # A process that was killed may have left half a line.
  [ -z "$(tail -c 1 "$OUT/results.jsonl")" ] || echo >>"$OUT/results.jsonl"
  echo "{\"step\": \"$name\", \"exit\": \"$code\", \"seconds\": $((SECONDS - started))}" | tee -a "$OUT/results.jsonl"
  "$PYTHON" "$HERE/results_table.py" "$OUT" --only-json
}
# A step whose code another step of the dry run has been through: only on a GPU.
again() { [ $DEVICE = cpu ] || measure "$@"; }
measure() { local name=$1 limit=$2; shift 2; step "$name" "$limit" "$PYTHON" "$HERE/measure_$1.py" "${@:2}"; }

#       name                limit  script       arguments             what it answers
measure machine                40  kernels      machine             # versions, rates of products and copies
measure kernels               100  kernels      right               # value and gradients of each kernel, eager and compiled
measure losses                140  training     losses              # fast = stock TRL; eager, compiled, recomputed, fp8
measure waiting                40  training     waiting             # no synchronisation inside a step
measure resume                 40  training     resume              # a stopped run goes on as if it had not been
measure memory-runs-out        40  training     out-of-memory       # a step that is repeated in smaller micro-batches
measure model                  40  training     model               # random weights in the shape of Qwen2 1.5B
measure 4k                     90  training     case 4k             # the number that matters
measure 4k-profile             70  training     profile 4k-steps    # time by class of kernel, launches, gaps
measure 4k-trl                 80  training     case 4k-trl         # beside stock TRL
again   4k-eager               50  training     case 4k-eager       # what compiling gains
measure attention              50  kernels      attention           # the fastest attention of this device
measure chunks                 40  kernels      chunks              # rows of logits at a time
again   16k                    80  training     case 16k
again   1k                     50  training     case 1k
again   4k-complete            60  training     case 4k-complete
measure 16k-recomputed         80  training     case 16k-recomputed
again   4k-fp8                 70  training     case 4k-fp8
measure 4k-nf4                 70  training     case 4k-nf4
again   4k-trl-liger           60  training     case 4k-trl-liger   # TRL with Liger's kernels, where they are installed
measure answers                60  training     answers             # 64 answers, and the certificate of a merge
step    selftest               60  "$PYTHON" -m loratune selftest --json
[ $DEVICE = cpu ] || step tests 60  "$PYTHON" -m pytest -p no:cacheprovider -q "$HERE/../../tests/model/kernels"
"$PYTHON" "$HERE/results_table.py" "$OUT"
