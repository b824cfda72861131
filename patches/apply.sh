#!/usr/bin/env bash
# Make `pretrain_gpt.py --bpipe` work in a Megatron-LM checkout, or undo that.
#
#   patches/apply.sh [--revert] CHECKOUT
#
# A few guarded lines go into CHECKOUT/pretrain_gpt.py; nothing else is touched. Doing it twice
# changes nothing. Exit status: 0 done or nothing to do, 1 the tree does not fit, 2 wrong usage.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  local status=$1
  shift
  printf 'apply.sh: %s\n' "$@" >&2
  exit "$status"
}

revert=false
if [[ ${1:-} == --revert ]]; then
  revert=true
  shift
fi
(($# == 1)) || fail 2 "usage: patches/apply.sh [--revert] CHECKOUT"
command -v git >/dev/null || fail 2 "git is not installed; it applies the patches"
[[ -d $1 ]] || fail 2 "no folder $1: give the path of a Megatron-LM checkout"
checkout=$(cd "$1" && pwd -P)
script=$checkout/pretrain_gpt.py
[[ -f $script ]] || fail 2 "no pretrain_gpt.py in $checkout: give the top folder of a checkout"

# A repository around the checkout must not change what paths mean.
export GIT_CEILING_DIRECTORIES
GIT_CEILING_DIRECTORIES=$(dirname "$checkout")

sum() { sha256sum <"$1" | cut -d " " -f 1; }

try() { # try PATCH [git apply options]: does it fit?
  local patch=$1
  shift
  git -C "$checkout" apply --check "$@" "$patch" 2>/dev/null
}

# The release whose listed fingerprint this file has: its tag, or nothing.
listed() {
  awk -v column="$1" -v sum="$(sum "$script")" '$1 !~ /^#/ && $column == sum { print $1 }' \
    "$here/manifest"
}

# The newest release whose patch fits, in the direction of the options: its tag, or nothing.
fitting() {
  local tag
  while read -r tag; do
    if try "$here/$tag/pretrain_gpt.patch" "$@"; then
      echo "$tag"
      return
    fi
  done < <(awk '$1 !~ /^#/ { print $1 }' "$here/manifest" | sort --version-sort --reverse)
}

patched=$(listed 4)
patched=${patched:-$(fitting --reverse)}
if $revert; then
  if [[ -z $patched ]]; then
    if grep -q megatron_bpipe "$script"; then
      fail 1 "$script has lines about megatron_bpipe that are not those of a patch here:" \
        "someone changed them, or another release of this project put them there." \
        "Remove them by hand, or run: git -C $checkout checkout pretrain_gpt.py"
    fi
    echo "apply.sh: $script is not patched; nothing to do"
    exit 0
  fi
  git -C "$checkout" apply --reverse "$here/$patched/pretrain_gpt.patch"
  echo "apply.sh: removed the patch of $patched from $script"
  exit 0
fi

if [[ -n $patched ]]; then
  echo "apply.sh: $script is patched already ($patched); nothing to do"
  exit 0
fi
if grep -q megatron_bpipe "$script"; then
  fail 1 "$script has lines about megatron_bpipe that are not those of a patch here:" \
    "someone changed them, or another release of this project put them there." \
    "Remove them first, for example: git -C $checkout checkout pretrain_gpt.py"
fi
tag=$(listed 3)
note=""
if [[ -z $tag ]]; then
  tag=$(fitting)
  note=" (this file is not that of a listed release, but the patch fits)"
fi
if [[ -z $tag ]]; then
  fail 1 "$script is not that of a listed release, and no patch fits: the lines around" \
    "its 'import torch' have changed. Put the lines that start with + in" \
    "$here/core_v0.19.0/pretrain_gpt.patch after 'import torch' by hand, or start training with" \
    "python -m megatron_bpipe run $script, which needs no patch."
fi
git -C "$checkout" apply "$here/$tag/pretrain_gpt.patch"
echo "apply.sh: applied the patch of $tag to $script$note"
