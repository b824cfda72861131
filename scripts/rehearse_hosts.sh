#!/usr/bin/env bash
# Two hosts on this machine, as namespaces joined by a cable: transports, slow links, hosts that fail.
#   scripts/rehearse_hosts.sh [--report FILE]
# Needs root (namespaces). Exit status: 0 all as it should be, 1 not, 77 it cannot run here (one line
# says why).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m scripts.rehearsals.hosts "$@"
