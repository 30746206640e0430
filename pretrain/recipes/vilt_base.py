"""ViLT-B/32 (arXiv 2102.03334): one stream of words and patches. $BERT: a Hugging Face directory of bert-base-uncased,
for its tokenizer.json; data as for _beit3.py.

Published, and here: 12 layers of 768 with 12 heads, patches of 32 pixels, AdamW, batch 4096, 200k steps, peak 1e-4,
weight decay 0.01, warmup in a tenth of the steps and linear decay to 0, 15 % of the words hidden, a wrong picture for
half of the pairs [4.1-4.3]. Its start is a ViT trained on ImageNet: `init_from` takes ViLT's own weights by
`python -m pretrain.export from-hf vilt-b32-mlm START`.

Other than published: pictures are squares of 384 pixels (there the short side, the long one up to 640); whole words are
not hidden as one; its word-patch alignment (weight 0.1) is left out; each pair is matched once as it is, once with a
wrong text and once with a wrong picture, in a batch of its own beside that whose words are hidden; the answer is read
from the class row, not from [CLS]. Betas, eps and clipping are not published: BERT's, and none.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.recipes._beit3 import LOOK

PAIRS = PairShards("$DATA/pairs", text_len=40)  # [dandelin/ViLT config.py, max_text_len]
HELD = replace(PAIRS, shards="$DATA/heldout/pairs")
STEPS = 200_000

RECIPE = Recipe(
    name="vilt_base",
    model=MultiwayConfig(
        dim=768,
        depth=12,
        heads=12,
        ffn_dim=3072,
        image_size=384,
        patch_size=32,
        vocab_size=30_522,
        max_text_len=40,
        text_norm=True,
        norm_eps=1e-12,
        ffn="shared",
    ),
    text_tokenizer="$BERT/tokenizer.json",
    stages={
        "fusion": Stage(
            mix={"pairs": PAIRS, "dual": PAIRS},
            batch=BatchSize(pairs=4096, dual=4096),
            experts=("vision", "language"),
            objectives=(
                Matching("random"),
                MaskedData(
                    image_ratio=0,
                    pair_image_ratio=0,
                    text_ratio=0,
                    pair_text_ratio=0.15,
                    dual=False,
                    transform=True,  # [dandelin/ViLT modules/heads.py]
                ),
            ),
            transform=replace(LOOK, size=384, flip=False, jitter=0.0),
            optim=Optim(
                lr=1e-4,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=0.01,
                warmup_steps=STEPS // 10,
                schedule="linear",
                clip=0.0,
            ),
            steps=STEPS,
            evals=(MatchingAccuracy(HELD, samples=5000), MaskedAccuracy({"pairs": HELD}, samples=5000)),
        )
    },
    save_every=2000,
    max_skipped_steps=3,
)
