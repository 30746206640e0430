#!/usr/bin/env bash
# The whole test-suite from a bare checkout, or what the pytest arguments choose: bash tests/run.sh tests/data -k order
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env/setup.sh
source launch/env/download.sh

if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
fi
# One thread per process: the tests run several processes on few cores.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal "$@"
