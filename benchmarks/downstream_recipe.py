"""Fine-tuning on tasks of the drawn world, from the quickstart's weights and from scratch: for benchmarks.downstream,
which writes $TASKS. $QUICKSTART is the quickstart's run directory. Numbers were chosen once and not tuned; stages from
scratch have the learning rate of the quickstart's own.

The head of `sentences` begins as large as any other: with unilm's start, a thousandth of that, it is no better than a
coin for hundreds of steps (in a trial 51.6 % after 250 of them, against 59.4 % with the larger one). `shapes` has
unilm's; nothing that was tried learns it, as this model hardly sees shapes yet. `cider` goes on from the quickstart's
captions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.labelled import (
    LabelledPairShards,
    LabelledShards,
    QuestionShards,
    RewardShards,
    TwoPictureShards,
)
from pretrain.data.sources import PairShards
from pretrain.evals.captions import CaptionScore, ReferenceShards
from pretrain.evals.labelled import EntailmentAccuracy, QuestionAccuracy, TopAccuracy, TwoPictureAccuracy
from pretrain.objectives.answering import Answering
from pretrain.objectives.classification import ImageClassification
from pretrain.objectives.entailment import Entailment
from pretrain.objectives.masked_captioning import MaskedCaptioning
from pretrain.objectives.reasoning import Reasoning
from pretrain.objectives.self_critical import SelfCritical
from pretrain.optim import Optim
from pretrain.recipes import tiny

CLASSES, ANSWERS = 40, 13  # colours with shapes that are not held out; eight colours, three numbers, yes and no
PRETRAINED = Optim(lr=6e-4, warmup_steps=30, weight_decay=0.05, clip=3.0)
SCRATCH = replace(PRETRAINED, lr=1e-3)

PICTURES = LabelledShards("$TASKS/classes/train", classes=CLASSES)
QUESTIONS = QuestionShards("$TASKS/questions/train", text_len=32, vocabulary="$TASKS/questions/answers.json")
SENTENCES, SHAPES = (TwoPictureShards(f"$TASKS/{task}/train", text_len=32) for task in ("sentences", "shapes"))
HYPOTHESES = LabelledPairShards("$TASKS/hypotheses/train", text_len=32)
CAPTIONS = PairShards("$QUICKSTART/corpus/pairs/train", text_len=24)
COMMON: dict[str, Any] = {"transform": tiny.LOOK, "optim": PRETRAINED, "init_from": "$QUICKSTART/fusion"}

STAGES = {
    "classes": Stage(
        mix={"images": PICTURES},
        batch=BatchSize(images=64),
        experts=("vision",),
        objectives=(ImageClassification(CLASSES, smoothing=0.0),),
        steps=200,
        evals=(TopAccuracy(replace(PICTURES, shards="$TASKS/classes/test")),),
        **COMMON,
    ),
    "questions": Stage(
        mix={"pairs": QUESTIONS},
        batch=BatchSize(pairs=64),
        objectives=(Answering(ANSWERS),),
        steps=200,
        evals=(QuestionAccuracy(replace(QUESTIONS, shards="$TASKS/questions/test")),),
        **COMMON,
    ),
    "sentences": Stage(
        mix={"pairs": SENTENCES},
        batch=BatchSize(pairs=32),
        objectives=(Reasoning(scale=1.0),),
        steps=250,
        evals=(TwoPictureAccuracy(replace(SENTENCES, shards="$TASKS/sentences/test")),),
        **COMMON,
    ),
    "shapes": Stage(
        mix={"pairs": SHAPES},
        batch=BatchSize(pairs=64),
        objectives=(Reasoning(),),
        steps=200,
        evals=(TwoPictureAccuracy(replace(SHAPES, shards="$TASKS/shapes/test")),),
        **COMMON,
    ),
    "hypotheses": Stage(
        mix={"pairs": HYPOTHESES},
        batch=BatchSize(pairs=64),
        objectives=(Entailment(),),
        steps=200,
        evals=(EntailmentAccuracy(replace(HYPOTHESES, shards="$TASKS/hypotheses/test")),),
        **COMMON,
    ),
    "captions": Stage(
        mix={"pairs": CAPTIONS},
        batch=BatchSize(pairs=64),
        objectives=(MaskedCaptioning(),),
        steps=200,
        evals=(CaptionScore(ReferenceShards("$QUICKSTART/corpus/pairs/heldout", text_len=24), samples=256),),
        **COMMON,
    ),
}

# A lower rate than for captions: VinVL's is a tenth of that without CIDEr (microsoft/Oscar, VinVL_MODEL_ZOO.md).
CIDER = replace(
    STAGES["captions"],
    mix={"pairs": RewardShards(CAPTIONS.shards, text_len=24, frequencies="$TASKS/frequencies.json")},
    batch=BatchSize(pairs=16),
    objectives=(SelfCritical(samples=4, baseline="mean", max_words=23),),
    optim=replace(PRETRAINED, lr=1e-4, warmup_steps=10, weight_decay=0.0),
    init_from="$QUICKSTART/captions",
    steps=40,
)

RECIPE = Recipe(
    name="downstream",
    model=tiny.MODEL,
    text_tokenizer="$QUICKSTART/corpus/text.model",
    stages=STAGES
    | {f"{name}_scratch": replace(s, init_from=None, optim=SCRATCH) for name, s in STAGES.items()}
    | {"cider": CIDER},
    loading=tiny.RECIPE.loading,
    log_every=10,
    save_every=500,
)
