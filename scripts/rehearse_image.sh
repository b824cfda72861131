#!/usr/bin/env bash
# Build docker/Dockerfile with buildah on a base made here, and train inside what was built.
#   [MEGATRON_MIRROR=DIR] scripts/rehearse_image.sh [--report FILE]
# Needs root; installs buildah and mmdebstrap with apt-get where they are missing. Exit status: 0 all
# as it should be, 1 not, 77 it cannot run here (one line says why).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python -m scripts.rehearsals.image "$@"
