"""CLIP ViT-B/16 (arXiv 2103.00020). $CLIP: a Hugging Face directory of it, for its tokenizer.json."""

from pretrain.objectives.contrastive import Contrastive
from pretrain.optim import Optim
from pretrain.recipes._towers import CLIP_B16, recipe

# [CLIP tables 18, 19, 20]: batch 32,768, 32 epochs of 400M pairs, 2000 steps of warmup, weight decay 0.2, betas (0.9,
# 0.98) and eps 1e-6 for ViTs, peak 5e-4, temperature 0.07, clamped at 100; cosine [2.5]. Clipping: none is named.
OPTIM = Optim(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, warmup_steps=2000, clip=0.0)
RECIPE = recipe(
    "clip_base",
    CLIP_B16,
    "$CLIP/tokenizer.json",
    Contrastive(embed_dim=512),
    batch=32_768,
    steps=32 * 400_000_000 // 32_768,
    optim=OPTIM,
)
