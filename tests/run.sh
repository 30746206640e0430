#!/usr/bin/env bash
# The whole test-suite from a bare checkout, or what the pytest arguments choose: bash tests/run.sh tests/data -k order
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env/setup.sh
source launch/env/download.sh

# The tests of launch/ run on a SLURM of their own. Not where systemd would start its services for good.
install_slurm() {
    if { command -v slurmctld && command -v munged; } >/dev/null || [ "$(id -u)" != 0 ] || [ -d /run/systemd/system ] ||
        ! grep -qs '^ID=debian' /etc/os-release; then
        return
    fi
    echo "tests: installing Debian's SLURM (10 s, once)" >&2
    {
        apt-get update -o Acquire::Retries=0 -o Acquire::http::Timeout=10
        DEBIAN_FRONTEND=noninteractive timeout 180 apt-get install -y --no-install-recommends \
            slurmctld slurmd slurm-client munge
    } >/dev/null 2>&1 || echo "tests: SLURM could not be installed; the tests that need it are skipped" >&2
}
if [ $# -eq 0 ] || [[ "$*" == *slurm* ]]; then install_slurm; fi

if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
# Hundreds of processes import this checkout: where the environment forbids it to be compiled once, each compiles it anew.
export PYTHONDONTWRITEBYTECODE=
# One thread per process: the tests run several processes on few cores.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
