"""Late fusion: CLIP's two towers, and above them a product that fuses their two rows into one. Contrast compares the
towers' rows, and matching reads the fused row, for the partners that the contrast finds the most alike. $CLIP: a
Hugging Face directory of CLIP ViT-B/16, for its tokenizer.json.

Nobody published a recipe that pretrains it so: towers and contrast are clip_base's (see _towers.py), the fusion is
arXiv 1610.04325's low-rank product (see PooledFusion), and batch, steps and rate are choices, ALBEF's but for its
momentum (albef_base.py).

    python -m pretrain.export from-hf clip-vit-base-patch16 runs/start      # trained towers, for init_from
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.evals.matching import MatchingAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.fusion.late import LateFusion
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.recipes._towers import CLIP_B16, LOOK

PAIRS = PairShards("$DATA/pairs", text_len=CLIP_B16.max_text_len)
HELD = replace(PAIRS, shards="$DATA/heldout/pairs")
BATCH = 512

RECIPE = Recipe(
    name="late_base",
    model=LateFusion(
        CLIP_B16.vision,
        CLIP_B16.text,
        vocab_size=CLIP_B16.vocab_size,
        max_text_len=CLIP_B16.max_text_len,
        kind="bilinear",
    ),
    text_tokenizer="$CLIP/tokenizer.json",
    stages={
        "fusion": Stage(
            mix={"dual": PAIRS},
            batch=BatchSize(dual=BATCH),
            experts=("vision", "language"),
            objectives=(Contrastive(embed_dim=512), Matching()),
            transform=LOOK,
            optim=Optim(
                lr=1e-4, min_lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02, warmup_steps=1000, clip=0.0
            ),
            steps=30 * 14_100_000 // BATCH,
            evals=(Retrieval(HELD, samples=5000), MatchingAccuracy(HELD, samples=5000)),
        )
    },
    save_every=2000,
    max_skipped_steps=3,
)
