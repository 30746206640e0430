"""Stages of two towers under a contrast: CLIP [arXiv 2103.00020], SigLIP [arXiv 2303.15343], ALIGN [arXiv 2102.05918],
and a ResNet-50 beside a BERT. Data as for _beit3.py; one stage, `retrieval`, from scratch or from `init_from`.

Released weights come in by `python -m pretrain.export from-hf DIRECTORY OUT`, and by init_from=OUT.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.data.transforms import ImageTransform
from pretrain.evals.retrieval import Retrieval
from pretrain.models.towers.dual import DualTowers
from pretrain.models.towers.released import CLIP_LOOK, IMAGENET_LOOK
from pretrain.models.towers.tower import Tower
from pretrain.objectives.contrastive import Contrastive
from pretrain.optim import Optim

# [CLIP 2.4] "a random square crop from resized images is the only data augmentation". How small the crop may be is not
# published: its smallest share is open_clip's default. [SigLIP] names no augmentation: CLIP's is a choice.
LOOK = ImageTransform(size=224, scale=(0.9, 1.0), flip=False, jitter=0.0)

# [CLIP table 20, ViT-B/16]: 12 layers of 768 with 12 heads; text 12 layers of 512 with 8; embedding 512; 77 ids. With
# CLIP's own 49,408 ids come PAD, UNK and the mask, which its tokenizer does not have.
CLIP_B16 = DualTowers(
    Tower("clip_vision_model", {"num_hidden_layers": 12}, **CLIP_LOOK),
    Tower("clip_text_model", {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}, "eos"),
    vocab_size=49_408 + 3,
    max_text_len=77,
)
# [SigLIP 4] and google/siglip-base-patch16-224's config: both towers base, 64 ids without BOS, a vocabulary of 32,000,
# attention pooling of pictures, the last row of texts. Of its tokenizer's names BOS and the mask are missing.
SIGLIP_B16 = DualTowers(
    Tower("siglip_vision_model", pooling="attention"),
    Tower("siglip_text_model", pooling="last", projection=768, bos=False),
    vocab_size=32_000 + 2,
    max_text_len=65,
)
# EfficientNet-B7 beside BERT base with 64 ids, vectors of 640 [ALIGN 5], as in kakaobrain/align-base: transformers'
# defaults. Published: 289 pixels, which its stride does not divide.
ALIGN_B7 = DualTowers(
    Tower("align_vision_model", {}, "mean"),
    Tower("align_text_model", projection=640),
    image_size=288,
    patch_size=32,
    vocab_size=30_522,
    max_text_len=64,
)
# microsoft/resnet-50 and bert-base-uncased, in the shape of their papers [1512.03385, 1810.04805].
RESNET50_BERT = DualTowers(
    Tower("resnet", {}, "mean", **IMAGENET_LOOK),
    Tower("bert"),
    patch_size=32,
    vocab_size=30_522,
    max_text_len=64,
)


def recipe(
    name: str,
    model: DualTowers,
    tokenizer: str,
    contrast: Contrastive,
    batch: int,
    steps: int,
    optim: Optim,
    look: ImageTransform = LOOK,
) -> Recipe:
    pairs = PairShards("$DATA/pairs", text_len=model.max_text_len)
    heldout = replace(pairs, shards="$DATA/heldout/pairs")
    stage = Stage(
        mix={"dual": pairs},
        batch=BatchSize(dual=batch),
        experts=("vision", "language"),
        objectives=(contrast,),
        transform=look,
        optim=optim,
        steps=steps,
        evals=(Retrieval(heldout, samples=5000),),
    )
    options: dict[str, Any] = {"save_every": 2000, "max_skipped_steps": 3}  # as _beit3.py
    return Recipe(name=name, model=model, text_tokenizer=tokenizer, stages={"retrieval": stage}, **options)
