#!/usr/bin/env bash
# All that is to be known of a GPU, in 8 minutes of it: `benchmarks/gpu_check.sh OUT`.
#
# OUT gets gpu_check.json, gpu_check.txt (tables, and what was left out) and
# log.txt. They are written anew after every part, and each part has a time of
# its own, so that one that fails or hangs costs only itself.
#
# PYTHON   the interpreter of an environment with jax[cuda], this package's
#          extra `test`, and torch; python3
# SCALE    full, or smoke: a few steps of everything, to try the script itself
# FACTOR   so many times the seconds, for a slower machine; 1
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: [PYTHON=python3] [SCALE=full|smoke] [FACTOR=1] $0 OUT" >&2
  exit 2
fi
for tool in timeout mktemp; do
  command -v "$tool" >/dev/null || { echo "$0: needs $tool" >&2; exit 2; }
done
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
SCALE=${SCALE:-full}
FACTOR=${FACTOR:-1}
if ! [[ $FACTOR =~ ^[1-9][0-9]?$ ]]; then
  echo "FACTOR=$FACTOR: give 1 to 99" >&2
  exit 2
fi
TOTAL=$((480 * FACTOR)) # seconds that all parts may take
LEAST=10                # without so many a part is not begun

parts=$(mktemp -d) || exit 2
child=
trap 'rm -rf "$parts"' EXIT
trap '[ -z "$child" ] || kill "$child" 2>/dev/null; exit 130' INT TERM

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Parts compile the same programs, and one of them holds several processes.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$parts/cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_PYTHON_CLIENT_PREALLOCATE=false

case $SCALE in
  full)
    lanes=1,8,32,128,auto memory_lanes=32 cohort=128 pairs=3 flute_lanes=10
    study=(--set=server.rounds=50 --set=server.eval_every=50 --seeds=4
      "--vary=client.learning_rate=log(0.01,0.3,16)" --shell=1 --warm=2)
    ;;
  smoke)
    lanes=1,2 memory_lanes=2 cohort=4 pairs=1 flute_lanes=1
    study=(--set=server.rounds=2 --seeds=1
      "--vary=client.learning_rate=0.1,0.3" --shell=1 --warm=1)
    ;;
  *)
    echo "SCALE=$SCALE: give full or smoke" >&2
    exit 2
    ;;
esac

say() {
  printf '%s\n' "$*" | tee -a "$out/log.txt"
}

# part NAME SECONDS COMMAND...: run it, for so long at most.
part() {
  local name=$1 budget=$((FACTOR * $2)) began=$SECONDS status=0
  local limit=$budget
  shift 2
  if ((TOTAL - SECONDS < limit)); then
    limit=$((TOTAL - SECONDS))
  fi
  if ((limit < LEAST)); then
    status='left out'
    : >"$parts/$name.txt"
  else
    timeout --kill-after=5 "$limit" "$@" >"$parts/$name.txt" 2>&1 &
    child=$!
    wait "$child" || status=$?
    child=
  fi
  printf '%s\t%s\t%d\t%d\n' "$name" "$status" $((SECONDS - began)) "$budget" \
    >>"$parts/parts.tsv"
  say "== $name: status $status, $((SECONDS - began)) of $budget s"
  cat "$parts/$name.txt" >>"$out/log.txt"
  "$PYTHON" -m benchmarks.gpu_report "$parts" "$out" >>"$out/log.txt" 2>&1
}

# engine CASE SECONDS [OPTION...]: the engine against the bare loop and PyTorch.
engine() {
  local case=$1 budget=$2
  shift 2
  # Half of the time, since the first and the last turn may take long.
  part "engine_$case" "$budget" "$PYTHON" -m benchmarks.engine \
    --cases="$case" --devices=1 --lanes="$lanes" --pairs="$pairs" --scale="$SCALE" \
    --seconds=$((FACTOR * budget / 2)) --json="$parts/engine_$case.json" "$@"
}

# flute WORKLOAD SECONDS: one of FLUTE's shapes, random clients.
flute() {
  part "$1" "$2" "$PYTHON" -m benchmarks.flute --workloads="$1" --synthetic \
    --lanes="$flute_lanes" --pairs="$pairs" --scale="$SCALE" --json="$parts/$1.json"
}

: >"$out/log.txt"
: >"$parts/parts.tsv"
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader |
    tee -a "$out/log.txt"
fi

# The most telling first: what is last is left out if time runs out. The seconds
# add up to 480.
part tests 40 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py
engine lr 25 --clients-per-round="$cohort"
engine cnn 45 --clients-per-round="$cohort"
engine lstm 55 --clients-per-round="$cohort"
engine resnet18 70 --clients-per-round="$cohort"
# Loops in graphs, which are no default before they were seen to run.
part graphs 25 env FEDJAX_SIM_GPU_GRAPHS=1 "$PYTHON" -m benchmarks.engine \
  --cases=lr --devices=1 --lanes="$lanes" --pairs="$pairs" --scale="$SCALE" \
  --clients-per-round="$cohort" --seconds=$((FACTOR * 12)) \
  --json="$parts/graphs.json"
engine lr_large 20
part memory 40 "$PYTHON" -m benchmarks.memory --cases=cnn,lstm,resnet18 \
  --lanes="$memory_lanes" --clients-per-round="$cohort" --scale="$SCALE" \
  --json="$parts/memory.json"
flute cv_lr_mnist 20
flute cv_cnn_femnist 25
flute nlp_rnn_fedshakespeare 30
flute cv_resnet_fedcifar100 40
part study 45 "$PYTHON" -m benchmarks.studies --turns=1 \
  --config=configs/digits_fedavg.py "${study[@]}" --json="$parts/study.json"

cat "$out/gpu_check.txt"
