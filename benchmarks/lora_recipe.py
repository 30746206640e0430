"""The quickstart's retrieval, trained whole and in part, from the weights of its fusion stage: for benchmarks.lora.
$QUICKSTART is the quickstart's run directory. `full` is the quickstart's own stage, and `locked_image` has its learning
rate; adapters, and heads alone, have ten times as much, which is usual for them, was chosen once and was not tuned."""

from __future__ import annotations

from dataclasses import replace

from pretrain.models.lora import Lora
from pretrain.optim import Optim
from pretrain.recipes import tiny

FULL = replace(tiny.RETRIEVAL, init_from="$QUICKSTART/fusion")
HIGH: Optim = replace(FULL.optim, lr=6e-3)
PART = replace(FULL, optim=HIGH)
EVERY_LAYER = ("*.attention.*", "*.experts.*")
STAGES = {
    "full": FULL,
    "lora_16_every_layer": replace(PART, lora=Lora(rank=16, alpha=16, targets=EVERY_LAYER)),
    "lora_4": replace(PART, lora=Lora(rank=4, alpha=4)),
    "locked": replace(PART, trainable=("objectives.*",)),
    # Attention is shared, so that it is part of the tower that stays.
    "locked_image": replace(
        FULL, trainable=("encoder.text_embed.*", "encoder.blocks.*.experts.language.*", "objectives.*")
    ),
    "lora_16": replace(PART, lora=Lora(rank=16, alpha=16)),
}
RECIPE = replace(
    tiny.RECIPE, name="lora", stages=STAGES, text_tokenizer="$QUICKSTART/corpus/text.model", save_every=1000
)
