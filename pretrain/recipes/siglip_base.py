"""SigLIP base, 16-pixel patches (arXiv 2303.15343). $SIGLIP: a Hugging Face directory of it, for its tokenizer.json."""

from pretrain.objectives.contrastive import Contrastive
from pretrain.optim import Optim
from pretrain.recipes._towers import SIGLIP_B16, recipe

# [SigLIP 4]: batch 32k, Adam with the second beta at 0.95, peak 1e-3, weight decay 1e-4, scale 10 and bias -10. The
# paper does not say how long the released weights were trained, nor with what warmup: 40 billion pairs and 20k steps
# are SigLIP 2's. eps and clipping are not published: torch's default, and big_vision's 1.0.
OPTIM = Optim(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4, warmup_steps=20_000, clip=1.0)
RECIPE = recipe(
    "siglip_base",
    SIGLIP_B16,
    "$SIGLIP/tokenizer.json",
    Contrastive(loss="sigmoid", project=False),
    batch=32_768,
    steps=40_000_000_000 // 32_768,
    optim=OPTIM,
)
