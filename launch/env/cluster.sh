#!/usr/bin/env bash
# Sourced by the scripts: the settings of this cluster, from launch/cluster.env or the file that $IMGLISH_CLUSTER names.
# Without either there is no cluster, and all is as on a laptop.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cluster_file=${IMGLISH_CLUSTER:-$root/launch/cluster.env}
[ -z "${cluster_read:-}" ] || return 0
# shellcheck disable=SC2034  # the scripts read them
GPU_JOB=() CPU_JOB=() SRUN=() CONTAINER=() GPU='' cluster_read=yes
in_job() { :; }

begin_job() {
    set +u # what modules run does not stand it
    in_job
    set -u
}

cluster_problem() { # what is wrong with the file, as one sentence; nothing where it is right
    local said unknown
    if ! said=$(bash -euo pipefail -c 'source "$1"' bash "$cluster_file" 2>&1); then
        echo "${said%%$'\n'*}; correct it there"
        return
    fi
    # Names that are neither lower-case nor exported are meant for a script.
    unknown=$(sed -nE 's/^([A-Z_][A-Z_0-9]*)\+?=.*/\1/p' "$cluster_file" |
        grep -vxE 'GPU_JOB|CPU_JOB|GPU|SRUN|CONTAINER' | head -n 1)
    [ -z "$unknown" ] ||
        echo "$cluster_file: no script reads $unknown; use GPU_JOB, CPU_JOB, GPU, SRUN or CONTAINER, or export it"
}

read_cluster() {
    local problem name value
    declare -A before=()
    if [ ! -f "$cluster_file" ]; then
        [ -z "${IMGLISH_CLUSTER:-}" ] && return
        echo "cluster: IMGLISH_CLUSTER=$IMGLISH_CLUSTER does not exist; name a file like launch/cluster.env.example" >&2
        return 2
    fi
    problem=$(cluster_problem)
    if [ -n "$problem" ]; then
        echo "cluster: $problem" >&2
        return 2
    fi
    for name in $(compgen -e | grep -vx _); do before[$name]=${!name}; done
    # shellcheck source=/dev/null
    source "$cluster_file"
    [ -z "${SLURM_JOB_ID:-}" ] || return 0 # a job has what its submission exported
    for name in "${!before[@]}"; do
        value=${before[$name]}
        if [ -n "$value" ] && [[ ${!name:-} != *"$value"* ]]; then # PATH=/more:$PATH is no second say
            echo "cluster: $name=$value is exported, but $cluster_file says ${!name:-nothing}; unset one of them" >&2
            return 2
        fi
    done
}

need_cluster() { # for what talks to SLURM
    [ -f "$cluster_file" ] && return
    echo "cluster: $cluster_file does not exist; cp launch/cluster.env.example launch/cluster.env and say in it what your" \
        "cluster is like" >&2
    return 2
}

read_cluster || exit
