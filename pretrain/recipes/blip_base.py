"""BLIP (arXiv 2201.12086): contrast with a momentum teacher's soft targets and a queue, matching with hard partners,
and language modelling, over a vision encoder and one BERT that is text encoder, fusion encoder and decoder. $BERT: a
Hugging Face directory of bert-base-uncased, for its tokenizer.json; data as for _beit3.py. The captions of its second
round come from data_tools.capfilt.

Published, and here: 20 epochs of 14M pairs, 2880 at once, AdamW with weight decay 0.05, a rate that rises to 3e-4
[paper, 4.1]; ViT-B/16 at 224 pixels, 12 layers of BERT which all ask the picture and share all but self-attention with
the decoder, [DEC] and [ENC] before the texts of their roles, vectors of 256, temperature 0.07, queue 57,600, momentum
0.995, alpha 0.4 that rises over 2 epochs, negatives of the rank's own batch, the three losses counted alike, 30 ids,
crops from 0.2 [salesforce/BLIP models/blip_pretrain.py, pretrain.py]; targets of words smoothed by 0.1 [transformers'
BlipTextConfig]; warmup of 3000 steps, last rate 1e-6 [configs/pretrain.yaml].

Other than published: it starts from scratch (there from DeiT and BERT); a cosine takes the place of a step down after
each epoch; negatives are drawn by the trained vectors of both sides (there by the trained ones against the teacher's,
and 1e-4 is added to each share); no RandAugment; the temperature's scale ends at 100 and not at 1000.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.evals.captions import CaptionScore, ReferenceShards
from pretrain.evals.matching import MatchingAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.generation import Writing
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.matching import Matching
from pretrain.objectives.momentum import MomentumContrast
from pretrain.optim import Optim
from pretrain.recipes._beit3 import LOOK

PAIRS = PairShards("$DATA/pairs", text_len=30)
HELD = replace(PAIRS, shards="$DATA/heldout/pairs")
BATCH = 2880
EPOCH = 14_000_000 // BATCH
WORDS = Captioning(smoothing=0.1, mean_over="targets", tied_text_head=True, transform=True)

RECIPE = Recipe(
    name="blip_base",
    model=EncoderDecoder(
        dim=768,
        heads=12,
        ffn_dim=3072,
        image_depth=12,
        text_depth=12,
        image_size=224,
        patch_size=16,
        vocab_size=30_522 + 2,
        max_text_len=512,
    ),
    text_tokenizer="$BERT/tokenizer.json",
    stages={
        "fusion": Stage(
            mix={"dual": PAIRS},
            batch=BatchSize(dual=BATCH),
            objectives=(
                MomentumContrast(embed_dim=256, queue=57_600, ramp_steps=2 * EPOCH, projection_bias=True),
                Matching("local"),
                WORDS,
            ),
            transform=replace(LOOK, scale=(0.2, 1.0), jitter=0.0),
            optim=Optim(
                lr=3e-4, min_lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, warmup_steps=3000, clip=0.0
            ),
            steps=20 * EPOCH,
            evals=(
                Retrieval(HELD, samples=5000),
                MatchingAccuracy(HELD, samples=5000),
                # [salesforce/BLIP configs/caption_coco.yaml]: 3 beams, 5 to 20 words
                CaptionScore(ReferenceShards(HELD.shards, text_len=30), writing=Writing(3, 1.0, max_words=20)),
            ),
        )
    },
    save_every=2000,
    max_skipped_steps=3,
)
