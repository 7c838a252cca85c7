# What run.sh and run_multi.sh share: where results go, and steps that cannot stop one another. Sourced by both.
set -uo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
DEVICE=cuda PATIENCE=1
if [ "${1:-}" = --dry-run ]; then DEVICE=cpu PATIENCE=4; shift; fi # a busy CPU may take long; nothing depends on it
OUT=${1:-$RESULTS}
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
