"""VLMo's sizes (arXiv 2111.02358; microsoft/unilm vlmo) with masked data modeling. VLMo's own third stage contrasts,
matches and fills in words at once, in four fusion and two unimodal passes: the cost that BEiT-3's single objective set
out to remove. Here its architecture, data sizes and optimizer are VLMo's; the stage `fusion` has masked data modeling
in their place, and `published` the three losses, without what tiny_vlmo.py leaves out. A SentencePiece model of the
same size stands in for its word pieces (BERT uncased, 30522 ids); text_tokenizer=tokenizer.json takes the word pieces.

Its code differs from ours in these points beside the paper (tests/models/multiway/test_reference_vlmo.py runs both: the
losses and gradients of a step are otherwise equal). Matching reads [CLS], through a tanh layer; here the picture's
class row, as BEiT-3's fusion does. Texts have a dropout of 0.1, and the mean of masked words is over words and not over
pairs. And its contrast is taken over all ranks' rows, of which only a rank's own have a gradient; the mean over ranks
is then the gradient divided by their number (measured on two), so that on its 64 GPUs contrast counts a 64th beside
matching and words. Here contrast counts fully; weights={"contrastive": 1 / 64} gives theirs.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe
from pretrain.data.sources import PairShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.recipes import _beit3
from pretrain.tasks.pretrain import Pretrain


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
    # Stage 2 trains the relative position tables too [vlmo/run.py].
    language = beit3.stages["language"]
    language = replace(
        language,
        trainable=(*language.trainable, "encoder.*relative*"),
        optim=replace(optim, lr=2e-4),  # [vlmo/config.py, task_textmlm_base]; large has none there
    )
    words = MaskedData(
        image_ratio=0, text_ratio=0, pair_image_ratio=0, pair_text_ratio=0.15, dual=False, transform=True
    )
    published = replace(
        fusion,
        mix={"pairs": pairs, "dual": pairs},
        batch=BatchSize(pairs=1024, dual=1024),
        objectives=(Contrastive(), Matching(), words),
        task=Pretrain(weights={"masked": 0.25}),  # [vlmo/modules/objectives.py]
        visual_tokenizer=None,
        evals=(
            Retrieval(heldout, samples=5000),
            MatchingAccuracy(heldout, samples=5000),
            MaskedAccuracy({"pairs": heldout}, samples=5000),
        ),
    )
    # VLMo contrasts inside stage 3; this stage is BEiT-3's, at VLMo's caption length.
    retrieval = replace(beit3.stages["retrieval"], mix={"dual": pairs}, evals=(Retrieval(heldout, samples=5000),))
    stages = {key: value for key, value in beit3.stages.items() if key != "pretrain"}
    own = {"language": language, "fusion": fusion, "published": published, "retrieval": retrieval}
    return replace(beit3, stages=stages | own)
