#!/usr/bin/env bash
# Submit the stages of a recipe as a chain of jobs, each after the previous one has succeeded; prints the job ids:
#   bash launch/chain.sh "tokenizer codes vision language fusion retrieval" \
#       --recipe beit3_base --ds ds_configs/zero1_bf16.json --run-dir runs/base
# SBATCH_OPTIONS goes to sbatch: SBATCH_OPTIONS="--nodes=4" bash launch/chain.sh ... Call it again at any time: finished
# stages are left out, and those in the queue stay there. --dry-run checks, and prints what it would submit. `codes` is no
# stage: it stores the visual tokenizer's codes for the stages behind it; without it they run the tokenizer in each step.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env/usage.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${1:-}" != --dry-run ] || set -- "${@:2}" --dry-run
if [ $# -lt 2 ] || [[ $1 == -* ]]; then
    usage launch/chain.sh >&2
    exit 2
fi
exec bash launch/submit.sh "--chain=$1" launch/stage.sbatch "${@:2}"
