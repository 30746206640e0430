"""A ResNet-50 and a BERT base under CLIP's contrast: the pair that is often fine-tuned together. Nobody published a
recipe for it: every number is a choice but the towers' sizes. $BERT: a Hugging Face directory of bert-base-uncased, for
its tokenizer.json.

    python -m pretrain.export from-hf resnet-50 runs/start --text $BERT
    python -m pretrain.train --recipe resnet50_bert --stage retrieval --set init_from=runs/start ...
"""

from pretrain.objectives.contrastive import Contrastive
from pretrain.optim import Optim
from pretrain.recipes._towers import RESNET50_BERT, recipe

OPTIM = Optim(lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, warmup_steps=1000, clip=1.0)
RECIPE = recipe(
    "resnet50_bert",
    RESNET50_BERT,
    "$BERT/tokenizer.json",
    Contrastive(embed_dim=512),
    batch=4096,
    steps=5 * 21_000_000 // 4096,
    optim=OPTIM,
)
