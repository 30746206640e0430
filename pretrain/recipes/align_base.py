"""ALIGN (arXiv 2102.05918) with EfficientNet-B7 and BERT base, the size in which kakaobrain/align-base was released.
$BERT: a Hugging Face directory of bert-base-uncased, for its tokenizer.json.

Published, and here [sections 4.1 and 5]: 16,384 pairs at once, 1.2M steps, warmup of 10k and a linear decline to 0,
weight decay 1e-5, targets smoothed by 0.1, a learned temperature that begins at 1, random crops of 289 in 346 pixels,
flips. Other than published: AdamW in the place of LAMB, whose peak of 1e-3 becomes CLIP's 5e-4 [a choice]; 288 pixels.
"""

from dataclasses import replace

from pretrain.objectives.contrastive import Contrastive
from pretrain.optim import Optim
from pretrain.recipes._towers import ALIGN_B7, LOOK, recipe

OPTIM = Optim(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-5, warmup_steps=10_000, schedule="linear", clip=0.0)
SHARE = (289 / 346) ** 2
RECIPE = recipe(
    "align_base",
    ALIGN_B7,
    "$BERT/tokenizer.json",
    Contrastive(temperature=1.0, project=False, smoothing=0.1),
    batch=16_384,
    steps=1_200_000,
    optim=OPTIM,
    look=replace(LOOK, size=288, scale=(SHARE, SHARE), flip=True),
)
