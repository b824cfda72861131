#!/usr/bin/env bash
# Make the environment and run the tests: scripts/test.sh [--all] [pytest arguments]
# --all adds those marked `long` and `cluster`, and writes docs/results/equality.md.
# Two processes: one trains, the other does the rest. `-n 0` is pytest as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export OMP_NUM_THREADS=1
selection=(-m 'not long and not cluster')
if [[ ${1:-} == --all ]]; then
  selection=(--equality-table docs/results/equality.md)
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
types=$(mktemp)
.venv/bin/mypy >"$types" 2>&1 & # beside the tests, which leave a core idle now and then
mypy=$!
status=0
.venv/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 10 \
  "${selection[@]}" "$@" || status=$?
if ! wait "$mypy"; then
  cat "$types"
  status=1
fi
rm -f "$types"
exit "$status"
