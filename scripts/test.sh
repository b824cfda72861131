#!/usr/bin/env bash
# Make the environment and run the tests: scripts/test.sh [--all] [pytest arguments]
# --all adds those marked `long` and `cluster`, and writes docs/results/equality.md.
# Two processes, which share what they train. `-n 0` is pytest as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
selection=(-m 'not long and not cluster')
if [[ ${1:-} == --all ]]; then
  selection=(--equality-table=docs/results/equality.md)
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .

export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # what one process has compiled the next need not
# Pytest's own folders stay where they are looked for after a failure; all other temporary files
# go into one folder, in which nothing may be left: whoever leaves it there leaves it in /tmp too.
export PYTEST_DEBUG_TEMPROOT=${PYTEST_DEBUG_TEMPROOT:-${TMPDIR:-/tmp}}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/tmp" "$scratch/torch"
export TMPDIR=$scratch/tmp
export TORCHINDUCTOR_CACHE_DIR=$scratch/torch # a cache, which torch keeps

.venv/bin/mypy >"$scratch/types" 2>&1 & # beside the tests, which leave a core idle now and then
mypy=$!
status=0
.venv/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 10 \
  "${selection[@]}" "$@" || status=$?
if ! wait "$mypy"; then
  cat "$scratch/types"
  status=1
fi
if [[ -n $(ls -A "$TMPDIR") ]]; then
  echo "test.sh: left behind in the folder for temporary files:" >&2
  ls -lAR "$TMPDIR" >&2
  status=1
fi
exit "$status"
