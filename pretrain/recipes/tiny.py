"""The quickstart: all stages on drawn scenes in minutes on two cores. $DATA is the corpus of data_tools.sample_corpus.

The numbers were chosen by trying them on that corpus; they come from no paper. `scratch` is `retrieval` without any
stage before it, with the same steps and data: what pretraining is worth.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.loader import Loading
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.data.transforms import ImageTransform
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.multiway import MultiwayConfig
from pretrain.models.vqkd import VQKDConfig
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim

IMAGES = ImageShards("$DATA/images/train")
PAIRS = PairShards("$DATA/pairs/train", text_len=32)
TEXTS = TextShards("$DATA/texts/train", text_len=48)
HELD_IMAGES = ImageShards("$DATA/images/heldout")
HELD_PAIRS = PairShards("$DATA/pairs/heldout", text_len=32)
HELD_TEXTS = TextShards("$DATA/texts/heldout", text_len=48)

# Captions name left and right, so pictures are never flipped; colours are named too, so no jitter.
LOOK = ImageTransform(size=64, scale=(0.9, 1.0), flip=False, jitter=0.0)

MODEL = MultiwayConfig(
    dim=128,
    depth=4,
    heads=4,
    ffn_dim=512,
    image_size=64,
    patch_size=8,
    vocab_size=448,
    image_codes=256,
    max_text_len=64,
    fusion_layers=1,
)

TOKENIZER = Stage(
    mix={"images": IMAGES},
    batch=BatchSize(images=128),
    tokenizer=VQKDConfig(
        dim=96,
        depth=2,
        heads=3,
        decoder_depth=1,
        image_size=64,
        patch_size=8,
        codes=256,
        code_dim=16,
        target_dim=48,
        distill="mse",
        restart_after=20,
    ),
    teacher="pixels",
    transform=LOOK,
    optim=Optim(lr=1e-3, warmup_steps=20, weight_decay=0.01),
    steps=200,
)

VISION = Stage(
    mix={"images": IMAGES},
    batch=BatchSize(images=128),
    experts=("vision",),
    objectives=(MaskedData(text_ratio=0, pair_text_ratio=0),),
    visual_tokenizer="tokenizer",
    transform=LOOK,
    optim=Optim(lr=1.5e-3, warmup_steps=30, weight_decay=0.05, clip=3.0),
    steps=250,
    evals=(MaskedAccuracy({"images": HELD_IMAGES}),),
)

LANGUAGE = Stage(
    mix={"texts": TEXTS},
    batch=BatchSize(texts=128),
    experts=("language",),
    init_from="vision",
    # VLMo's stage 2: attention, its norm and the vision expert stay as vision left them.
    trainable=("encoder.text_embed*", "encoder.*.experts.language.*", "encoder.norm*", "objectives.*"),
    objectives=(MaskedData(text_ratio=0.15),),
    optim=Optim(lr=2e-3, warmup_steps=30, weight_decay=0.05, clip=3.0),
    steps=250,
    evals=(MaskedAccuracy({"texts": HELD_TEXTS}),),
)

FUSION = Stage(
    mix={"images": IMAGES, "pairs": PAIRS, "texts": TEXTS},
    batch=BatchSize(images=16, pairs=96, texts=16),
    init_from="language",
    objectives=(MaskedData(pair_image_ratio=0.4),),
    visual_tokenizer="tokenizer",
    transform=LOOK,
    optim=Optim(lr=1.5e-3, warmup_steps=30, weight_decay=0.05, clip=3.0),
    steps=400,
    evals=(MaskedAccuracy({"images": HELD_IMAGES, "pairs": HELD_PAIRS, "texts": HELD_TEXTS}),),
)

RETRIEVAL = Stage(
    mix={"dual": PAIRS},
    batch=BatchSize(dual=256),
    experts=("vision", "language"),
    init_from="fusion",
    objectives=(Contrastive(),),
    transform=LOOK,
    optim=Optim(lr=1e-3, warmup_steps=20, weight_decay=0.05, clip=3.0),
    steps=200,
    evals=(Retrieval(HELD_PAIRS, samples=512),),
)

RECIPE = Recipe(
    name="tiny",
    model=MODEL,
    text_tokenizer="$DATA/text.model",
    stages={
        "tokenizer": TOKENIZER,
        "vision": VISION,
        "language": LANGUAGE,
        "fusion": FUSION,
        "retrieval": RETRIEVAL,
        "scratch": replace(RETRIEVAL, init_from=None),
    },
    loading=Loading(workers=1, streams=8, block_shards=4),
    log_every=5,
    save_every=200,
)
