"""ALBEF (arXiv 2107.07651): contrast with a momentum teacher's soft targets and a queue, matching with hard partners,
masked words, over a vision encoder, a text encoder, and layers in which words attend to the picture. $BERT: a Hugging
Face directory of bert-base-uncased, for its tokenizer.json; data as for _beit3.py.

Published, and here [salesforce/ALBEF configs/Pretrain.yaml, Pretrain.py, models/model_pretrain.py]: ViT-B/16 at 256
pixels, 6 + 6 layers of BERT, vectors of 256 by projections with a bias, BERT's word head over the table of words,
temperature 0.07, queue 65,536, momentum 0.995, alpha 0.4 that rises over the first of 30 epochs of 14.1M pairs, 512
pairs at once, negatives of the rank's own batch, 15 % of the words, 25 ids, AdamW from 1e-4 to 1e-5 by a cosine after
1000 steps, weight decay 0.02, crops from 0.2, flips.

Other than published: it starts from scratch (there from DeiT and BERT); masked words have no soft targets; they are
those of pairs of their own, in the same batch; no RandAugment; the temperature's scale ends at 100 and not at 1000.

ALBEF's code differs from ours in these points beside the paper (tests/models/fusion/test_reference_albef.py runs both:
the losses and gradients of a step are otherwise equal). Partners are drawn by the trained vectors against the
teacher's; here both are the trained ones, so that drawing waits for no teacher. Each rank contrasts with its own rows
and the queue; here with all ranks' rows besides, so that their number changes no loss. The mean of masked words is over
words; here each pair counts the same. BERT's dropout of 0.1 is left out, [SEP] is hidden like a word there, and the
temperature itself is learned, here the logarithm of its inverse. Pretrain.py warms up for 2000 steps (20 times 100),
the paper says 1000, which is taken here.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.objectives.momentum import MomentumContrast
from pretrain.optim import Optim
from pretrain.recipes._beit3 import LOOK

PAIRS = PairShards("$DATA/pairs", text_len=25)
HELD = replace(PAIRS, shards="$DATA/heldout/pairs")
EPOCH = 14_100_000 // 512

RECIPE = Recipe(
    name="albef_base",
    model=TextQueriesImage(
        dim=768,
        heads=12,
        ffn_dim=3072,
        image_depth=12,
        text_depth=6,
        fusion_depth=6,
        image_size=256,
        patch_size=16,
        vocab_size=30_522,
        max_text_len=25,
    ),
    text_tokenizer="$BERT/tokenizer.json",
    stages={
        "fusion": Stage(
            mix={"pairs": PAIRS, "dual": PAIRS},
            batch=BatchSize(pairs=512, dual=512),
            objectives=(
                MomentumContrast(embed_dim=256, ramp_steps=EPOCH, projection_bias=True),
                Matching("local"),
                MaskedData(
                    image_ratio=0,
                    pair_image_ratio=0,
                    text_ratio=0,
                    pair_text_ratio=0.15,
                    dual=False,
                    tied_text_head=True,
                    transform=True,
                ),
            ),
            transform=replace(LOOK, size=256, jitter=0.0),
            optim=Optim(
                lr=1e-4, min_lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02, warmup_steps=1000, clip=0.0
            ),
            steps=30 * EPOCH,
            evals=(
                Retrieval(HELD, samples=5000),
                MatchingAccuracy(HELD, samples=5000),
                MaskedAccuracy({"pairs": HELD}, samples=5000),
            ),
        )
    },
    save_every=2000,
    max_skipped_steps=3,
)
