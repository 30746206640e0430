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

IMGLISH_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
# The address, because node names need not resolve.
MASTER_ADDR=$(scontrol show node "${IMGLISH_NODES%% *}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# A rank's data workers, one for each CPU but one, need the same CPUs: threads that wait must not spin (as in local.sh).
OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# Names the environment, for its copies and for what is compiled for it.
IMGLISH_TAG=$({ echo "$PYTHON"; cat "$(dirname "$PYTHON")/../.imglish-stamp" 2>/dev/null || true; } | sha256sum | cut -c 1-12)
IMGLISH_RANKS_OF_NODE=${SLURM_NTASKS_PER_NODE:-1}
export MASTER_ADDR OMP_NUM_THREADS OMP_WAIT_POLICY IMGLISH_TAG IMGLISH_NODES IMGLISH_RANKS_OF_NODE

start=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0)

begin_life() { # of the job's ranks, the $1-th beside the first: their port, their logs, and the command that starts them
    # Another port than before: the kernel may still hold the old one. By itself it never assigns ports below 32768.
    export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} + 131 * $1) % 12000))
    # A file per rank: ranks that share one splice their lines.
    all_logs=${IMGLISH_LOGS:-$PWD/logs}/${SLURM_JOB_NAME:-job}-$SLURM_JOB_ID${SLURM_RESTART_COUNT:+.$SLURM_RESTART_COUNT}
    logs=$all_logs
    local again=()
    if [ "$1" != 0 ]; then
        logs+=-again$1
        # SLURM may think that a step of before still runs, on a node that came back, and would wait for its end for ever.
        again=(--overlap --immediate=60)
    fi
    mkdir -p "$logs" || exit 2
    echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: the ranks write to $logs/rank*.log"
    # --cpus-per-task again: since SLURM 22.05 srun does not inherit it from sbatch and may bind every task to one core.
    # --kill-on-bad-exit=0: the first rank that has saved and exits with 75 must not kill the others.
    # --wait: so long after the first rank has ended, SLURM kills those that hang. A node that is lost is another matter:
    # srun waits for its tasks until SLURM notices (SlurmdTimeout), and then SLURM requeues the job.
    # shellcheck disable=SC2034  # the batch scripts call it
    ranks=("${start[@]}" "${again[@]}" --wait=20 --output="$logs/rank%5t.log" "${SRUN[@]}" "${CONTAINER[@]}" bash launch/env/rank.sh)
}

check_nodes() { # one process on each; the first one's log says what is wrong, and with which node
    [ "${IMGLISH_PREFLIGHT:-yes}" != no ] || return 0
    local nodes=$SLURM_JOB_NUM_NODES
    MASTER_PORT=$((MASTER_PORT + 1)) timeout --kill-after=10 120 "${start[@]}" --wait=20 --nodes="$nodes" \
        --ntasks="$nodes" --ntasks-per-node=1 --output="$logs/preflight%5t.log" "${CONTAINER[@]}" \
        bash launch/env/rank.sh -m pretrain.launch.preflight "$@"
}

if [ -n "${IMGLISH_LOCAL:-}" ]; then
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash launch/env/rank.sh --copy || true
fi
