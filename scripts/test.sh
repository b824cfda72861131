#!/usr/bin/env bash
# Make the environment and run the tests: scripts/test.sh [--all] [pytest arguments]
# --all adds the tests marked `long` and writes docs/results/equality.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
export OMP_NUM_THREADS=1
selection=(-m 'not long')
if [[ ${1:-} == --all ]]; then
  selection=(--equality-table docs/results/equality.md)
  shift
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "${selection[@]}" "$@"
