"""UNITER base (arXiv 1909.11740): words and a picture's features in a single stream, masked words, matching, and
words aligned with patches by optimal transport. $BERT: a Hugging Face directory of its tokenizer, bert-base-cased, for
its tokenizer.json; data as for _beit3.py.

Published, and here: 12 blocks of BERT base [3.1]; 15 % of the words hidden [3.2]; [ChenRocks/UNITER
config/pretrain-indomain-base-8gpu.json, config/uniter-base.json]: 200k steps, AdamW with betas (0.9, 0.98), weight
decay 0.01, a peak of 5e-5, 10k steps of warmup, linear decay, clipping at 5, 60 ids, alignment with a weight of 0.1,
28,996 ids in all; a wrong partner, drawn with equal chances, for half of the pairs [itm_neg_prob].

Other than published: features are the rows of a ViT that is trained with the rest (there up to 100 regions of a frozen
Faster R-CNN with their places), and none of them is hidden (there 15 %, whose features and classes are predicted); all
objectives in each step (there one that is drawn: of six steps two match and two hide words); each pair is matched once
as it is, once with a wrong text and once with a wrong picture; BOS and EOS are not aligned; it starts from scratch
(there from BERT); no dropout (there 0.1). A batch is 10,240 rows on each of 8 GPUs there, twice accumulated: about 1500
pairs of 100 rows; 1536 is a choice, as are 224 pixels and a ViT-B's size.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.models.fusion.single_stream import SingleStream
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.recipes._beit3 import LOOK

PAIRS = PairShards("$DATA/pairs", text_len=60)
HELD = replace(PAIRS, shards="$DATA/heldout/pairs")

RECIPE = Recipe(
    name="uniter_base",
    model=SingleStream(
        dim=768,
        heads=12,
        ffn_dim=3072,
        depth=12,
        vit_dim=768,
        vit_heads=12,
        vit_depth=12,
        image_size=224,
        patch_size=16,
        vocab_size=28_996,
        max_text_len=60,
    ),
    text_tokenizer="$BERT/tokenizer.json",
    stages={
        "fusion": Stage(
            mix={"pairs": PAIRS, "dual": PAIRS},
            batch=BatchSize(pairs=1536, dual=1536),
            objectives=(
                Matching("random", alignment=0.1),
                MaskedData(image_ratio=0, pair_image_ratio=0, text_ratio=0, pair_text_ratio=0.15, dual=False),
            ),
            transform=replace(LOOK, flip=False, jitter=0.0),
            optim=Optim(
                lr=5e-5,
                betas=(0.9, 0.98),
                eps=1e-8,
                weight_decay=0.01,
                warmup_steps=10_000,
                schedule="linear",
                clip=5.0,
            ),
            steps=200_000,
            evals=(MatchingAccuracy(HELD, samples=5000), MaskedAccuracy({"pairs": HELD}, samples=5000)),
        )
    },
    save_every=2000,
    max_skipped_steps=3,
)
