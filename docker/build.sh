#!/usr/bin/env bash
# Build the image: docker/build.sh [docker build's options], for example --tag bpipe:0.1.0
# ENGINE=podman or ENGINE=buildah use another engine. Versions: docker/versions.env.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=()
while IFS= read -r line; do
  [[ $line == \#* || -z $line ]] || arguments+=(--build-arg "$line")
done <docker/versions.env

engine=${ENGINE:-docker}
case ${engine##*/} in
  podman* | buildah*) arguments+=(--format docker) ;; # OCI's has no SHELL, so no pipefail
esac

exec "$engine" build --file docker/Dockerfile "${arguments[@]}" "$@" .
