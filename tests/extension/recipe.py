"""Three stages made of parts that pretrain/ does not know; $DATA is what test_extension.py writes."""

from __future__ import annotations

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.mixture import Loading
from pretrain.data.sources import PairShards
from pretrain.data.transforms import ImageTransform
from pretrain.evals.retrieval import Retrieval
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.contrastive import Contrastive
from pretrain.optim import Optim
from tests.extension.answering import AnswerAccuracy, Answering, Questions
from tests.extension.matching import Matching, MatchingAccuracy
from tests.extension.towers import DualTower

PAIRS, QUESTIONS = PairShards("$DATA/pairs", text_len=8), Questions("$DATA/questions", text_len=8)
MODEL = MultiwayConfig(
    dim=32, depth=2, heads=2, ffn_dim=64, image_size=32, patch_size=8, vocab_size=64, max_text_len=16, fusion_layers=1,
    init_std=0.1,
)  # fmt: skip
COMMON = {
    "transform": ImageTransform(size=32, scale=(0.8, 1.0), jitter=0.0),
    "optim": Optim(lr=2e-3, warmup_steps=2),
    "steps": 10,
}

RECIPE = Recipe(
    name="extension",
    model=MODEL,
    text_tokenizer="$DATA/text.model",
    log_every=1,
    save_every=5,
    loading=Loading(workers=0, streams=4, block_shards=2),
    stages={
        "towers": Stage(
            mix={"dual": PAIRS},
            batch=BatchSize(dual=8),
            model=DualTower(),
            objectives=(Contrastive(embed_dim=12),),
            evals=(Retrieval(PAIRS, batch=8),),
            **COMMON,
        ),
        "matching": Stage(
            mix={"dual": PAIRS},
            batch=BatchSize(dual=8),
            objectives=(Contrastive(), Matching()),
            evals=(Retrieval(PAIRS, batch=8), MatchingAccuracy(PAIRS)),
            **COMMON,
        ),
        "answers": Stage(
            mix={"pairs": QUESTIONS},
            batch=BatchSize(pairs=8),
            objectives=(Answering(4),),
            init_from="matching",
            evals=(AnswerAccuracy(QUESTIONS),),
            **COMMON,
        ),
    },
)
