#!/usr/bin/env bash
# Run one stage on this machine, one process per GPU (or one on the CPU); all arguments go to pretrain.train:
#   bash launch/local.sh --recipe beit3_base --stage vision --ds ds_configs/zero2_bf16.json --run-dir runs/base
# With DeepSpeed's own launcher: deepspeed --module pretrain.train --recipe ... (see README.md).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env/setup.sh"

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -le 1 ]; then
    exec "$PYTHON" -m pretrain.train "$@"
fi
exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-endpoint localhost:0 \
    -m pretrain.train "$@"
