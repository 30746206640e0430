"""ViLBERT (arXiv 1908.02265): a stream of pictures and one of words that attend to each other. $BERT: a Hugging Face
directory of bert-base-uncased, for its tokenizer.json; data as for _beit3.py.

Published, and here [3.1, 3.2]: 12 blocks of BERT base for words; for pictures 6 blocks of 1024 with 8 heads; batch 512,
10 epochs of Conceptual Captions' 3.1M pairs, peak 1e-4, warmup and linear decay, 15 % of the words hidden, the product
of both first rows for matching. [facebookresearch/vilbert-multi-task, config/bert_base_6layer_6conect.json and
train_concap.py]: six co-attentions, before the last six blocks of words and each block of pictures, 1024 wide with 8
heads; feed-forward networks of 1024 for pictures; 36 ids; a tenth of the steps for warmup; AdamW with betas (0.9,
0.98), eps 1e-8, weight decay 0.01; a wrong text for half of the pairs.

Other than published: pictures are patches behind 12 blocks of a ViT that is trained with the rest (there up to 36
regions of a frozen Faster R-CNN with their places), and none of them is hidden (there 15 % of the regions, whose
classes are predicted); it starts from scratch (there from BERT); each pair is matched once as it is, once with a wrong
text and once with a wrong picture, in a batch of its own beside that whose words are hidden; no dropout (there 0.1).
That its pictures have 224 pixels and their ViT the depth of ViT-B is a choice.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.models.fusion.co_attention import CoAttention
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.recipes._beit3 import LOOK

PAIRS = PairShards("$DATA/pairs", text_len=36)
HELD = replace(PAIRS, shards="$DATA/heldout/pairs")
STEPS = 10 * 3_100_000 // 512

RECIPE = Recipe(
    name="vilbert_base",
    model=CoAttention(
        dim=768,
        heads=12,
        ffn_dim=3072,
        text_depth=12,
        image_dim=1024,
        image_heads=8,
        image_ffn_dim=1024,
        vit_depth=12,
        image_depth=6,
        text_at=(6, 7, 8, 9, 10, 11),
        image_at=(0, 1, 2, 3, 4, 5),
        co_dim=1024,
        co_heads=8,
        image_size=224,
        patch_size=16,
        vocab_size=30_522,
        max_text_len=36,
    ),
    text_tokenizer="$BERT/tokenizer.json",
    stages={
        "fusion": Stage(
            mix={"pairs": PAIRS, "dual": PAIRS},
            batch=BatchSize(pairs=512, dual=512),
            objectives=(
                Matching("random"),
                MaskedData(image_ratio=0, pair_image_ratio=0, text_ratio=0, pair_text_ratio=0.15, dual=False),
            ),
            transform=replace(LOOK, flip=False, jitter=0.0),
            optim=Optim(
                lr=1e-4,
                betas=(0.9, 0.98),
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
