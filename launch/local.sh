#!/usr/bin/env bash
# Run one stage on this machine, one process per GPU (or one on the CPU); all arguments go to pretrain.train:
#   bash launch/local.sh --recipe beit3_base --stage vision --ds ds_configs/zero1_bf16.json --run-dir runs/base
# --dry-run checks the arguments, the layout and the data, and starts nothing.
# With DeepSpeed's own launcher: deepspeed --module pretrain.train --recipe ... (see launch/README.md).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env/usage.sh"
source "$(dirname "${BASH_SOURCE[0]}")/env/setup.sh"
check_torch || exit

# Threads that wait must not spin: beside one busy process that takes three times as long as sleeping does.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
arguments=()
for word in "$@"; do
    [ "$word" = --dry-run ] && dry=yes || arguments+=("$word")
done
if [ -n "${dry:-}" ]; then
    exec "$PYTHON" -m pretrain.launch --gpu "$GPU" --local "$((gpus > 1 ? gpus : 1))" -- "${arguments[@]}"
fi
if [ "$gpus" -le 1 ]; then
    exec "$PYTHON" -m pretrain.train "$@"
fi
exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-endpoint localhost:0 \
    -m pretrain.train "$@"
