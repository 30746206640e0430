"""SigLIP 2's staged training (arXiv 2502.14786, 2.2 and 2.3) on the quickstart's corpus: sigmoid contrast, and in the
last fifth of the steps self-distillation and masked prediction beside it.

Published, and kept: the last fifth, the teacher that begins as the student, half of the patches hidden, weights of 1
and 0.25. For the small corpus: tiny's model (there a ViT with attention pooling and a text tower) and rates, 2 local
views in place of 8, 256 prototypes, a momentum for 120 steps, the sigmoid's bias. Local views are crops of the picture
that the contrast sees, without flips or colours of their own: captions name left and right, and colours.

Left out: LocCa's decoder, which in SigLIP 2 is trained beside the contrast.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.self_distillation import SelfDistillation
from pretrain.recipes import tiny

CONTRAST = Contrastive(loss="sigmoid", bias=-4.0)
STAGE = replace(tiny.RECIPE.stages["scratch"], objectives=(CONTRAST,), steps=480)
DISTILLED = SelfDistillation(
    views=2, area=(0.2, 0.6), momentum=0.98, prototypes=256, hidden_dim=256, bottleneck_dim=64
)  # a smaller part of a drawn scene would be empty

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_siglip2",
    stages={
        "contrast": STAGE,
        "dense": replace(
            STAGE,
            init_from="contrast",
            objectives=(CONTRAST, DISTILLED),
            optim=replace(STAGE.optim, lr=3e-4),  # which the first stage's cosine passes before its end
            steps=120,
        ),
    },
)
