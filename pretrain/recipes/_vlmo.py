"""VLMo's sizes (arXiv 2111.02358; microsoft/unilm vlmo) with masked data modeling. VLMo's own third stage contrasts,
matches and fills in words at once, in four fusion and two unimodal passes: the cost that BEiT-3's single objective set
out to remove. Here its architecture, data sizes and optimizer are VLMo's and the objective is masked data modeling;
tiny_vlmo.py has the three losses. Its word pieces (BERT uncased, 30522 ids) are replaced by a SentencePiece model of
that size.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe
from pretrain.data.sources import PairShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.optim import Optim
from pretrain.recipes import _beit3


def recipe(name: str, model: MultiwayConfig, *, lr: float) -> Recipe:
    """Stage 3: batch 1024, 200k steps, AdamW betas (0.9, 0.98), eps 1e-8, weight decay 0.01, 2.5k steps of warmup,
    linear decay to 0, drop path 0.1, captions of 40 ids; peak lr 2e-4 base, 5e-5 large [vlmo/config.py]."""
    beit3 = _beit3.recipe(name, model)
    optim = Optim(lr=lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.01, warmup_steps=2500, schedule="linear", clip=0.0)
    pairs, heldout = PairShards("$DATA/pairs", text_len=40), replace(_beit3.HELD_PAIRS, text_len=40)
    fusion = replace(
        beit3.stages["fusion"],
        mix={"pairs": pairs},
        batch=BatchSize(pairs=1024),
        optim=optim,
        steps=200_000,
        evals=(MaskedAccuracy({"pairs": heldout}, samples=5000),),
    )
    # Stage 2 opens the relative position tables too [vlmo/run.py].
    language = beit3.stages["language"]
    language = replace(
        language,
        trainable=(*language.trainable, "encoder.*relative*"),
        optim=replace(optim, lr=2e-4),  # [vlmo/config.py, task_textmlm_base]; large has none there
    )
    # VLMo contrasts inside stage 3; this stage is BEiT-3's, at VLMo's caption length.
    retrieval = replace(beit3.stages["retrieval"], mix={"dual": pairs}, evals=(Retrieval(heldout, samples=5000),))
    stages = {key: value for key, value in beit3.stages.items() if key != "pretrain"}
    return replace(beit3, stages=stages | {"language": language, "fusion": fusion, "retrieval": retrieval})
