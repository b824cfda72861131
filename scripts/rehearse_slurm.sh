#!/usr/bin/env bash
# Real Slurm on this machine, two virtual nodes: both batch scripts train, fail, are requeued.
#   scripts/rehearse_slurm.sh [--report FILE]
# Needs root (namespaces); installs Slurm with apt-get where it is missing. Exit status: 0 all as it
# should be, 1 not, 77 it cannot run here (one line says why).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m scripts.rehearsals.slurm "$@"
