"""Words that attend to pictures at several depths: BridgeTower's scales (arXiv 2206.08657) under ALBEF's fusion. $BERT:
a Hugging Face directory of bert-base-uncased, for its tokenizer.json; data as for _beit3.py.

No paper has this very model. From BridgeTower it takes [paper, 3.3; microsoft/BridgeTower src/config.py,
task_mlm_itm_clip_bert]: six layers above that see a ViT-B/16 behind its blocks 7 to 12, masked words and matching
against random partners, 15 % of the words hidden, 50 ids, batch 4096, 100k steps, AdamW with weight decay 0.01, a peak
of 1e-5 and five times as much for the layers above, warmup in a tenth of the steps, linear decay.

Other than there: the layers above see a norm of a depth's rows, and no sum of them with their own; the text encoder has
six blocks, of which they see the last (there a RoBERTa's 7 to 12); pictures have no layers of their own above; 224
pixels (there 288); it starts from scratch (there from CLIP and RoBERTa). Betas and eps are AdamW's defaults; nothing
clips.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.models.fusion.several_depths import SeveralDepths
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.recipes._beit3 import LOOK

PAIRS = PairShards("$DATA/pairs", text_len=50)
HELD = replace(PAIRS, shards="$DATA/heldout/pairs")
STEPS = 100_000

RECIPE = Recipe(
    name="depths_base",
    model=SeveralDepths(
        dim=768,
        heads=12,
        ffn_dim=3072,
        image_depth=12,
        text_depth=6,
        fusion_depth=6,
        image_size=224,
        patch_size=16,
        vocab_size=30_522,
        max_text_len=50,
        image_at=(7, 8, 9, 10, 11, 12),
    ),
    text_tokenizer="$BERT/tokenizer.json",
    stages={
        "fusion": Stage(
            mix={"pairs": PAIRS, "dual": PAIRS},
            batch=BatchSize(pairs=4096, dual=4096),
            objectives=(
                Matching("random"),
                MaskedData(image_ratio=0, pair_image_ratio=0, text_ratio=0, pair_text_ratio=0.15, dual=False),
            ),
            transform=replace(LOOK, flip=False, jitter=0.0),
            optim=Optim(
                lr=1e-5,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=0.01,
                warmup_steps=STEPS // 10,
                schedule="linear",
                clip=0.0,
                factors={"encoder.fusion.*": 5.0, "encoder.depth_norms.*": 5.0},
            ),
            steps=STEPS,
            evals=(MatchingAccuracy(HELD, samples=5000), MaskedAccuracy({"pairs": HELD}, samples=5000)),
        )
    },
    save_every=2000,
    max_skipped_steps=3,
)
