#!/usr/bin/env bash
# Make the environment, once: .venv in the checkout (or $IMGLISH_ENV), pinned by constraints.txt. Sourced by the scripts;
# leaves its interpreter in $PYTHON. Set IMGLISH_PYTHON to use one of your own. A node with a network is enough:
#   IMGLISH_TORCH=cuda bash launch/env/setup.sh      # or cpu, or an index such as cu126, for drivers of CUDA 12
# Without IMGLISH_TORCH a GPU that is here decides. The environment's .imglish-stamp says what it holds.
called=no
if [ "${BASH_SOURCE[0]}" = "$0" ]; then # by a person, not by a script
    called=yes
    source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
    if [ $# -gt 0 ]; then
        echo "setup: $1 is an argument, and there are none; variables say what is wanted: IMGLISH_TORCH=cuda bash" \
            "launch/env/setup.sh" >&2
        exit 2
    fi
fi
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
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

torch_build() { # that the environment should hold
    local build=${IMGLISH_TORCH:-}
    if [ -z "$build" ]; then
        has_gpu && echo cuda || echo cpu
    elif [[ $build =~ ^(cpu|cuda|cu[0-9]{3})$ ]]; then
        echo "$build"
    else
        echo "setup: IMGLISH_TORCH=$build is no build of torch; use cpu, cuda, or an index such as cu126" >&2
        return 2
    fi
}

install_torch() { # a build; the CPU's saves several GB where there is no GPU
    local build=$1 index="https://download.pytorch.org/whl/$1" version=torch==2.13.0
    if [ "$build" != cpu ]; then
        # 2.13.0 is satisfied by 2.13.0+cpu: one from before must go first.
        "$PYTHON" -m pip uninstall -q -y torch 2>/dev/null
    fi
    if [ "$build" != cuda ]; then
        "$PYTHON" -m pip install -q "$version+$build" 2>/dev/null && return
        "$PYTHON" -m pip install -q "$version+$build" --index-url "$index" --retries 0 --timeout 15 2>/dev/null && return
    fi
    if [[ $build == cu[0-9]* ]]; then
        echo "setup: pip finds no $version+$build, neither in its own index nor in $index; use another IMGLISH_TORCH" >&2
        return 2
    fi
    "$PYTHON" -m pip install -q "$version"
}

way_out() { # the one command, and where
    local first=
    if [ "${IMGLISH_TORCH:-}" != "$1" ] && grep -qs 'IMGLISH_TORCH=' "$cluster_file"; then
        first="set IMGLISH_TORCH=$1 in $cluster_file, and "
    fi
    echo "${first}call on the login node: IMGLISH_TORCH=$1 bash launch/env/setup.sh"
}

refuse_in_job() { # a job shares the environment with others, and its node may have no network
    [ -n "${SLURM_JOB_ID:-}" ] && [ "$called" = no ] || return 0
    echo "setup: $1; $(way_out "$2")" >&2
    return 2
}

make_environment() {
    local env=${IMGLISH_ENV:-$root/.venv} stamp python build have
    PYTHON=$env/bin/python
    build=$(torch_build) || return
    stamp=$(cat "$root/launch/env/constraints.txt" "$root/launch/env/setup.sh" "$root/pyproject.toml" | sha256sum)
    if [ "$(head -n 1 "$env/.imglish-stamp" 2>/dev/null)" = "$stamp" ]; then
        have=$(sed -n 2p "$env/.imglish-stamp")
        # Unasked, only a CPU build on a GPU node is wrong: it would train on the CPU, and not say so.
        if [ "$have" = "$build" ] || [[ -z ${IMGLISH_TORCH:-} && $have != cpu ]]; then return; fi
        refuse_in_job "$env holds torch's build $have, and $build is wanted here" "$build" || return
        echo "setup: $env holds torch's build $have; installing $build" >&2
    elif [ -e "$env/.imglish-stamp" ]; then
        refuse_in_job "$env was made for another version of this checkout" "$build" || return
    else
        refuse_in_job "there is no environment in $env" "$build" || return
    fi
    if [ "$build" = cpu ] && [ -z "${IMGLISH_TORCH:-}" ] && command -v sbatch >/dev/null; then
        echo "setup: no GPU is here, so this is torch's CPU build; for the GPUs of a cluster set IMGLISH_TORCH=cuda in" \
            "launch/cluster.env" >&2
    fi
    python=$(find_python) || return
    echo "setup: making the environment in $env (about a minute, once)" >&2
    [ -x "$PYTHON" ] || "$python" -m venv "$env" || return
    "$PYTHON" -m pip install -q --upgrade pip setuptools wheel || return
    install_torch "$build" || return
    "$PYTHON" -m pip install -q -c "$root/launch/env/constraints.txt" -e "${root}[test,clip,fast,parallel,prepare,serve,onnx]" || return
    # The reference implementation of the released BEiT-3; its own requirements are not needed (tests stub them).
    "$PYTHON" -m pip install -q --no-deps torchscale==0.3.0 || return
    printf '%s\n' "$stamp" "$build" >"$env/.imglish-stamp"
}

check_torch() { # torch would take the CPU beside a GPU whose driver is too old for its build, and only warn
    local cuda want=cuda code=0
    [ "${IMGLISH_TORCH:-}" != cpu ] && has_gpu || return 0
    "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)' 2>/dev/null || code=$?
    [ "$code" = 3 ] || return 0
    cuda=$(nvidia-smi | sed -nE 's/.*CUDA Version: *([0-9]+).*/\1/p')
    [ "${cuda:-13}" -ge 13 ] || want=cu126
    echo "setup: torch in $PYTHON cannot use this node's GPUs, whose driver is of CUDA ${cuda:-(unknown)};" \
        "$(way_out "$want")" >&2
    return 2
}

if [ -n "${IMGLISH_PYTHON:-}" ]; then
    PYTHON=$IMGLISH_PYTHON
else
    make_environment || exit
fi
export PYTHON NO_ALBUMENTATIONS_UPDATE=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if has_gpu; then
    # Blocks of the GPU's memory that grow: batches of another shape find room without a second cache. And glibc returns
    # large blocks of the host's at once (python -m benchmarks.build_memory); on the CPU that would cost time instead.
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1048576}"
fi
