#!/usr/bin/env bash
# Everything that waits for a GPU, on a machine with one: scripts/gpu_session.sh [OUTPUT_FOLDER]
#
# Needs torch with CUDA. Where megatron-core or pytest are not installed, WHEELS=FOLDER names a
# folder with their wheels, which are unpacked beside the output. PYTHON chooses the interpreter.
# PARTS="probe ipc" runs only those; by default all. Each part has a time limit (45 minutes in all)
# and leaves a log and, where it measures, a JSON file; a failure does not stop the others.
# Exit status: 0 all done, 1 something failed, 77 no CUDA device.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

out=${1:-runs/gpu}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
: >"$out/summary.txt"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$out/torch.log"; then
  echo "no CUDA device: skipped" | tee "$out/summary.txt"
  exit 77
fi

export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
path=$PWD
if [[ -n ${WHEELS:-} ]]; then
  for wheel in "$WHEELS"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$out/site" # a wheel is a zip file: no registry needed
  done
  path=$path:$out/site
  "$python" -m compileall -q "$out/site" >/dev/null # once, not in every process
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}

failed=0
part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 started=$SECONDS status
  shift 2
  [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
  timeout --kill-after=60 "$seconds" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) verdict="done" ;;
    77) verdict=skipped ;;
    124 | 137) verdict="not over after $seconds s" failed=1 ;;
    *) verdict="failed with status $status" failed=1 ;;
  esac
  printf '%-12s %-28s %4d s\n' "$name" "$verdict" $((SECONDS - started)) | tee -a "$out/summary.txt"
}

tests() { # NAME SECONDS FILES...
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$python" -m pytest -p no:cacheprovider -rA -m gpu "$@" \
    --junitxml "$out/$name.xml"
}

part machine 30 bash -c 'nvidia-smi; nvidia-smi topo -m; nvidia-smi --query-gpu=index,uuid --format=csv,noheader; df -h /dev/shm; free -g'
part probe 180 "$python" benchmarks/gpu_probe.py --output "$out/probe.json"
tests streams 120 tests/gpu/test_streams.py
tests ipc 150 tests/gpu/test_ipc.py
part copies 90 "$python" benchmarks/copies.py --output "$out/copies.json"
part doctor 90 "$python" -m megatron_bpipe doctor
tests layers 60 tests/gpu/test_layers_saved.py
tests rehearsal 280 tests/gpu/test_rehearsal.py
part stages 240 "$python" benchmarks/rehearsal.py --micro-batches 2 --seconds 75 \
  --output "$out/rehearsal.json"
part turns 160 "$python" benchmarks/rehearsal.py --micro-batches 2 --modes stock ipc --turns \
  --seconds 75 --output "$out/turns.json"
for mode in stock ipc; do
  part "largest_$mode" 420 "$python" benchmarks/rehearsal.py --largest-in 12 --modes "$mode" \
    --steps 5 --seconds 75 --output "$out/largest_$mode.json"
done
part table5 420 "$python" benchmarks/table5.py --output "$out/table5.json"
echo "logs and figures: $out"
exit "$failed"
