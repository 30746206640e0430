#!/usr/bin/env bash
# Sourced in a job, after setup.sh: the ranks' meeting place, their logs and their node-local files. Leaves the command
# that starts them in the list `ranks`; what follows it goes to Python.
if [ -z "${SLURM_NTASKS_PER_NODE:-}${SLURM_NTASKS:-}" ]; then
    echo "job: how many ranks has a node? Submit by bash launch/submit.sh, which takes it from launch/cluster.env, or give" \
        "sbatch --ntasks-per-node" >&2
    exit 2
fi
trap 'echo "job: ${BASH_SOURCE[0]} line $LINENO: $BASH_COMMAND failed" >&2' ERR # set -e says nothing
begin_job
check_torch || exit

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# The address, because node names need not resolve.
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# A requeued job needs another port than before; the kernel never assigns ports below 32768 by itself.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 12000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Names the environment, for its copies and for what is compiled for it.
IMGLISH_TAG=$({ echo "$PYTHON"; cat "$(dirname "$PYTHON")/../.imglish-stamp" 2>/dev/null || true; } | sha256sum | cut -c 1-12)
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS IMGLISH_TAG

# Each life of a job has logs of its own, a file per rank: ranks that share one splice their lines.
logs=${IMGLISH_LOGS:-$PWD/logs}/${SLURM_JOB_NAME:-job}-$SLURM_JOB_ID${SLURM_RESTART_COUNT:+.$SLURM_RESTART_COUNT}
mkdir -p "$logs" || exit 2
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: the ranks write to $logs/rank*.log"

# --cpus-per-task again: since SLURM 22.05 srun does not inherit it from sbatch and may bind every task to one core.
# --kill-on-bad-exit=0: the first rank that has saved and exits with 75 must not kill the others.
# --wait: kill ranks that hang after another one has ended, but only after SLURM would notice a lost node (SlurmdTimeout,
# by default 300 s): a job that ends before that counts as failed and is not requeued on another node.
# shellcheck disable=SC2034  # the batch scripts call it
ranks=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=900 --output="$logs/rank%5t.log"
    "${SRUN[@]}" "${CONTAINER[@]}" bash launch/env/rank.sh)

if [ -n "${IMGLISH_LOCAL:-}" ]; then
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash launch/env/rank.sh --copy || true
fi

first_error() { # the first line in which a rank names a reason of its own, and not another rank's end
    local found
    cd "$logs" || return
    found=$(grep -HE '^([0-9]{2}:){2}[0-9]{2} (error|bug on rank|rank [0-9]+ of)' rank*.log |
        grep -v 'another rank d' | sort -s -t: -k2,4 | head -n 1 || true)
    if [[ $found == *"bug on rank"* ]]; then
        found+=$(tail -n 1 "${found%%:*}" | sed 's/^/: /')
    elif [ -z "$found" ]; then # no rank knew what befell it
        found=$(grep -H . rank*.log 2>/dev/null | tail -n 1 || true)
    fi
    echo "first error: ${found:-none in the logs of the ranks; see above what srun said}"
}
