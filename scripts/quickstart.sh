#!/usr/bin/env bash
# Train the same GPT with stock 1F1B and with --bpipe, and compare.
#   scripts/quickstart.sh [--full] [--stages 4] [--iterations 8] [--text DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python scripts/examples/quickstart.py "$@"
