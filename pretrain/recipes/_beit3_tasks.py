"""BEiT-3's fine-tuning, with the source of every number. [B3] arXiv 2208.10442; [U] microsoft/unilm, beit3/get_started
(a command for each task) and run_beit3_finetuning.py (its defaults: eps 1e-8, betas (0.9, 0.999), min_lr 1e-6 and
warm-up from 1e-6, no clipping; here warm-up begins at 0).

Data, under $DATA as data_tools.from_table leaves it: imagenet/{train,val} (--label-folders), vqa/{train,val} and
vqa/answers.json (data_tools.answers), nlvr2/{train,dev}, snli_ve/{train,dev}, coco/{train,val,test} of Karpathy's
dataset_coco.json, and text.model (beit3.spm for released weights). $BEIT3 is a directory of `pretrain.export
from-released`, or of a stage of one's own; for retrieval [U] takes the weights that were contrasted before
(beit3_*_itc_patch16_224).

The stages *_augmented have [U]'s augmentations, which published results need: its RandAugment (vqa, captioning); timm's
RandAugment and random erasing, crops from 8 % of the area on, mixup 0.8 and cutmix 1.0 (imagenet; [U] draws one share
for a batch, here each pair of pictures has its own), and the evaluation's square from the middle. Left out, because
there is no such code here: ImageNet's own mean and deviation (imagenet; here all pictures lie between -1 and 1),
dropping the worst fifth of the words after 12,000 steps (captioning). The average of [U]'s --model_ema, which its
commands leave off, is ema=Ema(0.9999, warmup=False). The head's 20 times higher rate (vqa, --task_head_lr_weight) is
its pooler's too here. Clipping at 3.0 is ours, a guard.

captioning_cider goes on from captioning by CIDEr optimisation, which BEiT-3 did without ([B3] 3.1.3: its captions are
"without CIDEr optimization"), so its numbers are VinVL's (microsoft/Oscar, VinVL_MODEL_ZOO.md, base): a tenth of the
rate before it, batches of 128 pictures, 75 epochs. $DATA/coco/frequencies.json is of data_tools.caption_frequencies.

Visual entailment (snli_ve) is not among BEiT-3's tasks, nor VLMo's. Its settings are ALBEF's (salesforce/ALBEF,
configs/VE.yaml, 8 GPUs of 32 pictures), a model of base's size, and large takes the same; the drop path is [U]'s for
vqa, whose head it has. Left out: ALBEF's distillation. OFA (run_scripts/snli_ve) chose 5e-5, five epochs, batches of
256 and 480 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.labelled import (
    LabelledPairShards,
    LabelledShards,
    QuestionShards,
    RewardShards,
    TwoPictureShards,
)
from pretrain.data.mixing import Mixing
from pretrain.data.rand_augment import RandAugment
from pretrain.data.sources import CaptionShards
from pretrain.data.timm_augment import RandomErasing, TimmRandAugment
from pretrain.data.transforms import ImageTransform
from pretrain.evals.captions import CaptionScore, ReferenceShards
from pretrain.evals.labelled import EntailmentAccuracy, QuestionAccuracy, TopAccuracy, TwoPictureAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.answering import Answering
from pretrain.objectives.classification import ImageClassification
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.entailment import Entailment
from pretrain.objectives.masked_captioning import MaskedCaptioning
from pretrain.objectives.reasoning import Reasoning
from pretrain.objectives.self_critical import SelfCritical
from pretrain.optim import Optim

# Pictures of an epoch. ImageNet-1k 1,281,167; COCO's train and restval 113,287 with five captions each; VQAv2's
# training questions 443,757 (unilm also trains on most of the validation ones); NLVR2's sentences 86,373; SNLI-VE's
# 529,527.
IMAGENET, COCO, QUESTIONS, SENTENCES, HYPOTHESES = 1_281_167, 5 * 113_287, 443_757, 86_373, 529_527
LENGTH = 64  # [U] --num_max_bpe_tokens, but for captions, 32

# Scale, interpolation and flip of [U] beit3/datasets.py, build_transform; whole pictures as squares in evaluation.
LOOK = ImageTransform(size=224, scale=(0.5, 1.0), flip=True, jitter=0.0, evaluation="squash")


@dataclass(frozen=True)
class Settings:
    """Of one task and one size: rate, layer decay, drop path, weight decay, pictures of a step, epochs, of which
    `warmup`."""

    lr: float
    layer_decay: float
    drop_path: float
    weight_decay: float
    batch: int
    epochs: int
    warmup: int
    size: int = 224
    betas: tuple[float, float] = (0.9, 0.999)
    head_factor: float = 1.0


ENTAILMENT = Settings(2e-5, 1.0, 0.1, 0.02, 256, 5, 1, size=384)  # ALBEF's, see above
# [U] get_started_for_image_classification.md, _vqav2.md, _nlvr2.md, _retrieval.md, _captioning.md.
BASE = {
    "imagenet": Settings(7e-4, 0.65, 0.15, 0.05, 1024, 50, 5),
    "vqa": Settings(3e-5, 1.0, 0.1, 0.01, 128, 10, 1, size=480, betas=(0.9, 0.98), head_factor=20.0),
    "nlvr2": Settings(7e-4, 0.65, 0.2, 0.2, 256, 20, 5),
    "retrieval": Settings(2e-4, 0.65, 0.2, 0.05, 3072, 15, 3, size=384),
    "captioning": Settings(4e-5, 1.0, 0.1, 0.05, 256, 10, 1, size=480),
    "snli_ve": ENTAILMENT,
}
LARGE = {
    "imagenet": Settings(2e-4, 0.8, 0.25, 0.05, 1024, 50, 5),
    "vqa": Settings(2e-5, 1.0, 0.15, 0.01, 128, 10, 1, size=480, betas=(0.9, 0.98), head_factor=20.0),
    "nlvr2": Settings(3e-4, 0.85, 0.2, 0.2, 256, 20, 5),
    "retrieval": Settings(5e-5, 0.85, 0.2, 0.05, 3072, 15, 3, size=384),
    "captioning": Settings(8e-6, 1.0, 0.1, 0.05, 256, 10, 1, size=480),
    "snli_ve": ENTAILMENT,
}


def recipe(name: str, model: MultiwayConfig, settings: dict[str, Settings]) -> Recipe:
    """A stage for each task, all from pretrained weights."""
    bare = replace(model, final_norm=False)  # as unilm's models for classes and answers
    questions = QuestionShards("$DATA/vqa/train", text_len=LENGTH, vocabulary="$DATA/vqa/answers.json")
    hypotheses = LabelledPairShards("$DATA/snli_ve/train", text_len=LENGTH)
    sentences = TwoPictureShards("$DATA/nlvr2/train", text_len=LENGTH)
    # A picture has five captions, and each step takes one of them: [U] goes through all five in an epoch.
    captions = CaptionShards("$DATA/coco/train", text_len=LENGTH, draw=True)
    short = replace(captions, text_len=32)
    stages = {
        "imagenet": _stage(
            settings["imagenet"], bare, IMAGENET, {"images": LabelledShards("$DATA/imagenet/train")},
            objectives=(ImageClassification(),), experts=("vision",),
            evals=(TopAccuracy(LabelledShards("$DATA/imagenet/val")),),
        ),
        "vqa": _stage(
            settings["vqa"], bare, QUESTIONS, {"pairs": questions}, objectives=(Answering(),),
            evals=(QuestionAccuracy(replace(questions, shards="$DATA/vqa/val")),),
        ),
        "nlvr2": _stage(
            settings["nlvr2"], model, SENTENCES, {"pairs": sentences}, objectives=(Reasoning(),),
            evals=(TwoPictureAccuracy(replace(sentences, shards="$DATA/nlvr2/dev")),),
        ),
        # COCO's 5K protocol; 1K: samples=1000.
        "retrieval": _stage(
            settings["retrieval"], model, COCO, {"dual": captions}, objectives=(Contrastive(),),
            evals=(Retrieval(replace(captions, shards="$DATA/coco/test"), samples=5000),),
        ),
        "captioning": _stage(
            settings["captioning"], model, COCO, {"pairs": short}, objectives=(MaskedCaptioning(),),
            evals=(CaptionScore(ReferenceShards("$DATA/coco/test", text_len=32)),),
        ),
        "snli_ve": _stage(
            settings["snli_ve"], bare, HYPOTHESES, {"pairs": hypotheses}, objectives=(Entailment(),),
            evals=(EntailmentAccuracy(replace(hypotheses, shards="$DATA/snli_ve/dev")),),
        ),
    }  # fmt: skip
    mixed = LabelledShards("$DATA/imagenet/train", mixing=Mixing(mixup=0.8, cutmix=1.0))
    # [U] beit3/datasets.py, build_imagenet_transform; its arguments' defaults; the crops are timm's create_transform's.
    augmented: dict[str, Any] = {"scale": (0.08, 1.0), "rand_augment": TimmRandAugment(), "erase": RandomErasing()}
    look = replace(stages["imagenet"].transform, evaluation="crop", **augmented)
    stages["imagenet_augmented"] = replace(stages["imagenet"], mix={"images": mixed}, transform=look)
    how, pictures = settings["captioning"], COCO // 5
    rewarded = RewardShards("$DATA/coco/train", text_len=32, frequencies="$DATA/coco/frequencies.json")
    stages["captioning_cider"] = _stage(
        replace(how, lr=how.lr / 10, drop_path=0.0, batch=128, epochs=75, warmup=0), model, pictures,
        {"pairs": rewarded}, objectives=(SelfCritical(),), init_from="captioning", evals=stages["captioning"].evals,
    )  # fmt: skip
    for task in ("vqa", "captioning"):
        look = replace(stages[task].transform, rand_augment=RandAugment(count=2, strength=7))
        stages[f"{task}_augmented"] = replace(stages[task], transform=look)
    return Recipe(name, model, stages, text_tokenizer="$DATA/text.model", save_every=2000)


def _stage(how: Settings, model: MultiwayConfig, epoch: int, mix: dict[str, Any], **more: Any) -> Stage:
    (kind,) = mix
    steps = epoch // how.batch
    return Stage(
        **{"experts": ("vision", "language"), "init_from": "$BEIT3"} | more,
        mix=mix,
        batch=BatchSize(**{kind: how.batch}),
        model=replace(model, image_size=how.size),
        transform=replace(LOOK, size=how.size),
        optim=Optim(
            lr=how.lr,
            min_lr=min(1e-6, how.lr),
            betas=how.betas,
            eps=1e-8,
            weight_decay=how.weight_decay,
            warmup_steps=how.warmup * steps,
            layer_decay=how.layer_decay,
            head_factor=how.head_factor,
            clip=3.0,
        ),
        steps=how.epochs * steps,
        drop_path=how.drop_path,
        activation_checkpointing=model.depth > 12,
    )
