#!/usr/bin/env bash
# One rank on its node; all arguments go to Python. What is compiled is kept on the node's own disk, and Python is the
# node's copy of the environment where there is one: rank.sh --copy makes it.
set -euo pipefail
place=${IMGLISH_LOCAL:-${TMPDIR:-/tmp}}/imglish-$(id -u)
mkdir -p "$(dirname "$place")" 2>/dev/null || true
mkdir -m 700 "$place" 2>/dev/null || true
if [ ! -O "$place" ] || [ -L "$place" ] || [ ! -w "$place" ]; then # what lies there is run: never another user's
    echo "rank: $place on $(hostname) cannot be written, or is not ours; what is compiled goes to a temporary directory" >&2
    [ "${1:-}" != --copy ] || exit 0
    place=$(mktemp -d)
fi
copy=$place/env-${IMGLISH_TAG:-}

if [ "${1:-}" = --copy ]; then
    env=$(dirname "$(dirname "$PYTHON")")
    [ -f "$env/pyvenv.cfg" ] || exit 0 # a Python of the user's own
    exec 9>"$place/lock"
    flock 9 # another job may be at it
    [ ! -e "$copy" ] || exit 0
    rm -rf "$copy".*
    mkdir "$copy.growing"
    if tar -C "$env" -cf - . | tar -C "$copy.growing" -xf - 2>/dev/null; then
        mv "$copy.growing" "$copy"
    else
        rm -rf "$copy.growing"
        echo "rank: IMGLISH_LOCAL=$IMGLISH_LOCAL on $(hostname) has no room for the environment; its ranks start from $env" >&2
    fi
    exit
fi

[ ! -x "$copy/bin/python" ] || PYTHON=$copy/bin/python
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$place/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$place/inductor}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$place/extensions-${IMGLISH_TAG:-}}
exec "$PYTHON" "$@"
