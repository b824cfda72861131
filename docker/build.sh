#!/usr/bin/env bash
# Build the image: docker/build.sh [docker build's options], for example --tag bpipe:0.1.0
# ENGINE=podman uses another engine. Versions: docker/versions.env.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=()
while IFS= read -r line; do
  [[ $line == \#* || -z $line ]] || arguments+=(--build-arg "$line")
done <docker/versions.env

exec "${ENGINE:-docker}" build --file docker/Dockerfile "${arguments[@]}" "$@" .
