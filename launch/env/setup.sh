#!/usr/bin/env bash
# Make the environment, once: .venv in the checkout (or $IMGLISH_ENV), pinned by constraints.txt. Sourced by
# quickstart.sh and tests/run.sh; leaves its interpreter in $PYTHON. Set IMGLISH_PYTHON to use one of your own.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3; do
        if "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "setup: no Python of 3.11 or newer is on the PATH; install one, or set IMGLISH_PYTHON" >&2
    return 2
}

has_gpu() { nvidia-smi >/dev/null 2>&1; }

install_torch() { # the CPU build saves several GB where there is no GPU
    if has_gpu; then
        # 2.13.0 is satisfied by 2.13.0+cpu: one from before must go first.
        "$PYTHON" -m pip uninstall -q -y torch 2>/dev/null
    else
        local cpu=(-q 'torch==2.13.0+cpu')
        "$PYTHON" -m pip install "${cpu[@]}" 2>/dev/null && return
        "$PYTHON" -m pip install "${cpu[@]}" --index-url https://download.pytorch.org/whl/cpu \
            --retries 0 --timeout 15 2>/dev/null && return
    fi
    "$PYTHON" -m pip install -q 'torch==2.13.0'
}

make_environment() {
    local env=${IMGLISH_ENV:-$root/.venv} stamp python
    PYTHON=$env/bin/python
    stamp=$(cat "$root/launch/env/constraints.txt" "$root/launch/env/setup.sh" "$root/pyproject.toml" | sha256sum)
    if [ "$(head -n 1 "$env/.imglish-stamp" 2>/dev/null)" = "$stamp" ]; then
        # One made on a login node without a GPU would train on the CPU of a GPU node, and not say so.
        if ! has_gpu || grep -q '^cuda$' "$env/.imglish-stamp"; then return; fi
        if [ -n "${SLURM_JOB_ID:-}" ]; then # other jobs may be running on it
            echo "setup: $env holds the CPU build of torch and there is a GPU here; remove it and call" \
                "launch/env/setup.sh on a GPU node, or set IMGLISH_ENV to another place" >&2
            return 2
        fi
        echo "setup: $env holds the CPU build of torch and there is a GPU here; installing the CUDA build" >&2
    fi
    python=$(find_python) || return
    echo "setup: making the environment in $env (about a minute, once)" >&2
    [ -x "$PYTHON" ] || "$python" -m venv "$env" || return
    "$PYTHON" -m pip install -q --upgrade pip setuptools wheel || return
    install_torch || return
    "$PYTHON" -m pip install -q -c "$root/launch/env/constraints.txt" -e "$root[test,clip,parallel,prepare]" || return
    # The reference implementation of the released BEiT-3; its own requirements are not needed (tests stub them).
    "$PYTHON" -m pip install -q --no-deps torchscale==0.3.0 || return
    { echo "$stamp" && { has_gpu && echo cuda || echo cpu; }; } >"$env/.imglish-stamp"
}

if [ -n "${IMGLISH_PYTHON:-}" ]; then
    PYTHON=$IMGLISH_PYTHON
else
    make_environment || exit
fi
export PYTHON NO_ALBUMENTATIONS_UPDATE=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
