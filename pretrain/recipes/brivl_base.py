"""BriVL (arXiv 2103.06561): two towers under MoCo's contrast, each picture and text against a momentum teacher's
vectors in a queue. $BERT: a Hugging Face directory of bert-base-chinese, whose ids its text tower has, for its
tokenizer.json; data as for _beit3.py.

Published, and here [BAAI-WuDao/BriVL, BriVL-code-inference/cfg/test_xyb.yml, of the released BriVL-2.0]: an
EfficientNet-B5 beside chinese-roberta-wwm-ext (a BERT base by its shape), 80 ids, a queue of 9600, momentum 0.99,
temperature 0.07.

Other than published: pictures are 448 pixels (there 456, which its stride does not divide); attention pooling stands in
the place of four blocks of self-attention over regions of 6 by 6 and coarser grids, and of as many over words; vectors
of 256 and the towers' optimizer are choices, as the code that was released does not train. Batch 960 divides the queue.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.evals.retrieval import Retrieval
from pretrain.models.towers.dual import DualTowers
from pretrain.models.towers.tower import Tower
from pretrain.objectives.momentum import MomentumContrast
from pretrain.optim import Optim
from pretrain.recipes._towers import LOOK

# Width 1.6 and depth 2.2 times B0's (arXiv 1905.11946's code); its last rows are 2048 wide.
B5 = {"width_coefficient": 1.6, "depth_coefficient": 2.2, "hidden_dim": 2048}
PAIRS = PairShards("$DATA/pairs", text_len=80)
BATCH = 960

RECIPE = Recipe(
    name="brivl_base",
    model=DualTowers(
        Tower("efficientnet", B5, "attention"),
        Tower("bert", pooling="attention"),
        image_size=448,
        patch_size=32,
        vocab_size=21_128,
        max_text_len=80,
    ),
    text_tokenizer="$BERT/tokenizer.json",
    stages={
        "retrieval": Stage(
            mix={"dual": PAIRS},
            batch=BatchSize(dual=BATCH),
            experts=("vision", "language"),
            objectives=(MomentumContrast(embed_dim=256, momentum=0.99, queue=9600, alpha=0.0),),
            transform=replace(LOOK, size=448),
            optim=Optim(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-5, warmup_steps=1000, clip=0.0),
            steps=10 * 30_000_000 // BATCH,
            evals=(Retrieval(replace(PAIRS, shards="$DATA/heldout/pairs"), samples=5000),),
        )
    },
    save_every=2000,
    max_skipped_steps=3,
)
