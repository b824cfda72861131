#!/usr/bin/env bash
# Make .venv with torch, megatron-core (unmodified, from the package registry) and this package.
# Does nothing when it is up to date. PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.bpipe-setup
wanted=$(cat scripts/requirements.txt setup.py | cksum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
  exit 0
fi

fits() { # an interpreter that starts, is >= 3.12 and can make environments
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

candidates() { # best first: 3.12 has wheels of every Megatron release we support
  [[ -n ${PYTHON:-} ]] && echo "$PYTHON"
  local version pyenv_root conda_root
  pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
  conda_root=${CONDA_EXE:+$(dirname "$(dirname "$CONDA_EXE")")}
  for version in 3.12 3.13 3.14; do
    echo "python$version"
    compgen -G "$pyenv_root/versions/$version*/bin/python" || true
    command -v uv >/dev/null && uv python find "$version" 2>/dev/null || true
    for root in "${CONDA_PREFIX:-}" "$conda_root" "$HOME/miniconda3" "$HOME/anaconda3"; do
      [[ -n $root ]] && compgen -G "$root/bin/python$version" || true
      [[ -n $root ]] && compgen -G "$root/envs/*/bin/python$version" || true
    done
  done
  echo python3
}

python=
while read -r candidate; do
  if fits "$candidate"; then
    python=$candidate
    break
  fi
done < <(candidates)
if [[ -z $python ]]; then
  cat >&2 <<'MESSAGE'
setup: no Python >= 3.12 with venv found (looked at PATH, pyenv, uv, conda).
Get one with any of:
    uv python install 3.12          apt-get install python3.12-venv
    pyenv install 3.12              conda create -n py312 python=3.12
or name one: PYTHON=/path/to/python3.12 scripts/setup.sh
MESSAGE
  exit 1
fi

echo "setup: $("$python" --version) at $(command -v "$python")"
echo "setup: installing torch and megatron-core into $venv takes about 5 GB of disk;" \
  "seconds with a warm cache, minutes without"
if ! fits "$venv/bin/python"; then
  "$python" -m venv --clear "$venv"
fi
if command -v uv >/dev/null; then
  install=(uv pip install --python "$venv/bin/python")
elif "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv; then
  install=("$venv/bin/uv" pip install --python "$venv/bin/python")
else
  install=()
fi
pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
what=(-r scripts/requirements.txt --no-build-isolation -e .)
# Compiled here once: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every process of
# every run would compile torch and Megatron again. pip compiles of itself.
compiled=(--compile-bytecode)
prepare=('setuptools>=68')
if [[ ${#install[@]} -eq 0 ]] || ! { "${install[@]}" "${prepare[@]}" && "${install[@]}" "${compiled[@]}" "${what[@]}"; }; then
  echo "setup: uv is not usable here, falling back to pip (slower)"
  "${pip[@]}" "${prepare[@]}"
  "${pip[@]}" "${what[@]}"
fi
echo "$wanted" >"$stamp"
