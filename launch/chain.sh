#!/usr/bin/env bash
# Submit the stages of a recipe as a chain of jobs, each after the previous one has succeeded; prints the job ids:
#   bash launch/chain.sh "tokenizer vision language fusion retrieval" \
#       --recipe beit3_base --ds ds_configs/zero2_bf16.json --run-dir runs/base
# SBATCH_OPTIONS goes to sbatch: SBATCH_OPTIONS="--nodes=4 --partition=a100" bash launch/chain.sh ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# \?//p' launch/chain.sh >&2
    exit 2
fi

stages=$1
shift
before=
for stage in $stages; do
    # --kill-on-invalid-dep: if a stage fails, remove the later ones, which would otherwise wait forever.
    # shellcheck disable=SC2086  # several options in one variable
    before=$(sbatch --parsable --kill-on-invalid-dep=yes ${SBATCH_OPTIONS:-} \
        ${before:+--dependency=afterok:$before} \
        --job-name="imglish-$stage" launch/stage.sbatch --stage "$stage" "$@")
    before=${before%%;*}
    echo "$stage: job $before"
done
