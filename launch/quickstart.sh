#!/usr/bin/env bash
# Everything once, on a small scale: environment, drawn corpus, tokenizers, stages under DeepSpeed, evaluation, report.
# Another call resumes an interrupted run. QUICKSTART_DIR=/data/q bash launch/quickstart.sh writes to another place.
# All arguments go to the training of every stage: bash launch/quickstart.sh --set seed=1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env/usage.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env/setup.sh

# Threads that wait must not spin: beside one busy process that takes three times as long as sleeping does.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
run=${QUICKSTART_DIR:-runs/quickstart}
export DATA=$run/corpus
SECONDS=0
say() { printf '\n== %s (%d:%02d)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

# A power of two, which divides the batches.
gpus=$("$PYTHON" -c 'import torch; n = min(torch.cuda.device_count(), 16); print(1 << n.bit_length() - 1 if n else 0)')
if [ "$gpus" -gt 0 ]; then
    ds=ds_configs/zero1_bf16.json
    start=("$PYTHON" -m torch.distributed.run --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-endpoint localhost:0)
else
    ds=ds_configs/zero0.json # one process: nothing to partition
    start=("$PYTHON")
fi

say "corpus"
"$PYTHON" -m data_tools.sample_corpus --out "$DATA"
say "text tokenizer"
[ -f "$DATA/text.model" ] || # with few different words BPE keeps them whole
    "$PYTHON" -m data_tools.train_text_tokenizer "$DATA/pairs/train" "$DATA/texts/train" \
        --vocab-size 256 --model-type bpe --out "$DATA/text.model"

for stage in tokenizer vision language fusion retrieval captions scratch; do
    say "$stage"
    "${start[@]}" -m pretrain.train --recipe tiny --stage "$stage" --ds "$ds" --run-dir "$run" "$@"
    "$PYTHON" -m pretrain.evaluate --run-dir "$run" --stage "$stage"
done

say "report"
"$PYTHON" -m pretrain.report --run-dir "$run"
say "done: open $run/report.html"
