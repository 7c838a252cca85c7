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
RESULTS=gpu-results
# shellcheck source=steps.sh
source "$(dirname "$0")/steps.sh"

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
