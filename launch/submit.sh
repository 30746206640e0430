#!/usr/bin/env bash
# sbatch, with this cluster's options (launch/cluster.env) and with checks before: what would fail in hours fails now.
#   bash launch/submit.sh --nodes=4 launch/stage.sbatch --recipe beit3_base --stage vision --ds ds_configs/zero1_bf16.json \
#       --run-dir runs/base
#   bash launch/submit.sh --nodes=4 launch/bench.sbatch --recipe beit3_base --stage pretrain --ds ds_configs/zero1_bf16.json
#   bash launch/submit.sh --array=0-15 launch/prepare.sbatch --list laion/ --preset laion --out data/laion
# sbatch's options stand before the script, its own arguments after it. --dry-run checks, and prints what it would submit.
# bash launch/submit.sh launch/prepare.sbatch --help says what a script does.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env/usage.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=() arguments=() checks=() script=
for word in "$@"; do
    if [ "$word" = --dry-run ]; then
        checks+=(--dry-run)
    elif [ -n "$script" ]; then
        arguments+=("$word")
    elif [[ $word == --chain=* ]]; then # of chain.sh
        checks+=("$word")
    elif [[ $word == *.sbatch ]]; then
        script=$word
    else
        options+=("$word")
    fi
done
if [ -z "$script" ]; then
    usage launch/submit.sh >&2
    exit 2
fi
if [[ -f $script && ${arguments[0]:-} =~ ^(-h|--help)$ ]]; then
    usage "$script"
    exit
fi
source launch/env/cluster.sh
need_cluster
source launch/env/setup.sh

job=("${GPU_JOB[@]}")
[[ $script == *prepare.sbatch ]] && job=("${CPU_JOB[@]}")
# shellcheck disable=SC2206  # several options in one variable
job+=(${SBATCH_OPTIONS:-} "${options[@]}")
exec "$PYTHON" -m pretrain.launch "${checks[@]}" --gpu "$GPU" "${job[@]/#/--option=}" "$script" "${arguments[@]}"
