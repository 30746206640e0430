"""The stages of BEiT-3, with the source of every number. [B3] arXiv 2208.10442; [B2] BEiT v2, arXiv 2208.06366, and
microsoft/unilm beit2 (TOKENIZER.md, run_beitv2_pretraining.py); [VLMo] arXiv 2111.02358 and microsoft/unilm vlmo.

The paper trained from scratch on all three kinds of data at once (an author, microsoft/unilm issue 1034): the stage
`pretrain`. Stagewise pretraining is VLMo's: `vision`, `language` and `fusion` do that with BEiT-3's objective, and
`fusion` has the settings of `pretrain` except for its start. Either way `retrieval` follows. The word `codes` behind
`tokenizer` in launch/chain.sh stores the tokenizer's codes for fixed crops; without it, each step computes those of new
crops.

Data, under $DATA as `data_tools` leaves it: images (ImageNet-21k, 14M [B3 table 1]), pairs (CC12M, CC3M, SBU, COCO, VG:
21M pairs of 15M images), texts (160 GB: Wikipedia, BookCorpus, OpenWebText, CC-News, Stories), text.model (a
SentencePiece model of 64k pieces); and heldout/images, heldout/pairs, heldout/texts for evaluations. $CLIP is a
Hugging Face directory of CLIP ViT-B/16, the teacher of [B2].
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.data.transforms import ImageTransform
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.reconstruction import Reconstruction
from pretrain.evals.retrieval import Retrieval
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.teachers import Clip
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
from pretrain.tasks.tokenizer import TrainTokenizer

IMAGES = ImageShards("$DATA/images")
# The length of texts in pretraining was not published. 64: the released fine-tuning code's default.
PAIRS = PairShards("$DATA/pairs", text_len=64)
# Not published either. 196: VLMo's for text alone [VLMo run.py, max_text_len_of_initckpt].
TEXTS = TextShards("$DATA/texts", text_len=196)

HELD_IMAGES = replace(IMAGES, shards="$DATA/heldout/images")
HELD_PAIRS = replace(PAIRS, shards="$DATA/heldout/pairs")
HELD_TEXTS = replace(TEXTS, shards="$DATA/heldout/texts")

# RandomResizedCrop, flip, colour jitter 0.4 at 224 pixels [B3 table 11]. The crop's smallest share is not published;
# 0.2 is [B2 PRETRAINING.md]'s and keeps most of a caption's picture in sight, and BEiT's flip is on although some
# captions say left and right.
# Evaluations see the whole picture, resized to a square by bicubic interpolation [unilm beit3/datasets.py and
# vlmo/transforms].
LOOK = ImageTransform(size=224, scale=(0.2, 1.0), flip=True, jitter=0.4, evaluation="squash")

# [B3 table 11]: AdamW, peak 1e-3, cosine, 10k steps of warmup, betas, eps, weight decay, clip 3.0, drop path 0.1.
OPTIM = Optim(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, warmup_steps=10_000, clip=3.0)
STEPS, DROP_PATH = 1_000_000, 0.1
# 6144 = 2048 images + 2048 texts + 2048 pairs [B3 table 11]. Accumulation is ours: what 8 GPUs of 80 GB hold.
BATCH = BatchSize(images=2048, pairs=2048, texts=2048, accumulation=4)
# 40 % of an image block-wise, 15 % of a text alone, 50 % of a text in a pair [B3 2.2]. 40 % of 196 patches are 78 here;
# [B2] hides 75 (--num_mask_patches). Its blocks have at least 16 of 196 patches; on the giant's grid of 16 x 16 that
# share is 21, a choice: the paper names no number. Not published, and choices:
# - whether a pair's image and text are masked at once (here: yes), 80/10/10 (here: BERT's), whether </s> is a target
#   (here: no; mask_eos=True for captioning, as unilm's beit3/datasets.py);
# - the weights of the terms. Here the loss is the mean over sequences of the mean over a sequence's targets: a word of
#   a caption weighs, by its length, 0.4 to 5.2 times what it would in a mean over words (mean_over="targets"), and the
#   loss is a quarter of the sum of the four terms (terms="sum"). AdamW itself does not see that factor, but clip 3.0
#   and eps act up to 4 times differently.
OBJECTIVE = MaskedData(image_ratio=0.4, text_ratio=0.15, pair_text_ratio=0.5, pair_image_ratio=0.4)

# 100 epochs of ImageNet-1k (1,281,167 pictures) at 64 x 8 = 512; 10 epochs of warmup [B2 TOKENIZER.md].
TOKENIZER_STEPS, TOKENIZER_WARMUP = 100 * 1_281_167 // 512, 10 * 1_281_167 // 512


def recipe(name: str, model: MultiwayConfig) -> Recipe:
    """The recipe with all stages, for a model of one size."""
    pretrain = Stage(
        mix={"images": IMAGES, "pairs": PAIRS, "texts": TEXTS},
        batch=BATCH,
        objectives=(OBJECTIVE,),
        visual_tokenizer="tokenizer",
        transform=LOOK,
        optim=OPTIM,
        steps=STEPS,
        drop_path=DROP_PATH,
        evals=(MaskedAccuracy({"images": HELD_IMAGES, "pairs": HELD_PAIRS, "texts": HELD_TEXTS}, samples=5000),),
    )
    stages = {
        "tokenizer": _tokenizer(model),
        "vision": _vision(pretrain),
        "language": _language(pretrain),
        # Not published: how long the stage with all three kinds should be after two others. As `pretrain`.
        "fusion": replace(pretrain, init_from="language"),
        "pretrain": pretrain,
        "retrieval": _retrieval("fusion"),
    }
    # A choice: one bad batch must not end a run of weeks; a run that diverged is lost in any case.
    return Recipe(
        name=name,
        model=model,
        text_tokenizer="$DATA/text.model",
        stages=stages,
        save_every=2000,
        max_skipped_steps=3,
    )


def _tokenizer(model: MultiwayConfig) -> Stage:
    """VQ-KD of [B2] on $DATA/images; its paper takes ImageNet-1k. For patches of 14 pixels (giant) no tokenizer was
    published; it is trained here with the same settings at that patch size. CLIP ViT-B/16 has 14 x 14 patches and the
    giant 16 x 16, so its features are interpolated; a choice: those of CLIP ViT-L/14 at 224 pixels would fit as they
    are (task.teacher.directory=..., model.target_dim=768)."""
    return Stage(
        mix={"images": IMAGES},
        batch=BatchSize(images=512),
        model=VQKDConfig(image_size=model.image_size, patch_size=model.patch_size, init="normal"),
        task=TrainTokenizer(teacher=Clip("$CLIP")),
        # [B2 run_vqkd_training.py]: min_crop_scale 0.08, color_jitter 0.
        transform=replace(LOOK, scale=(0.08, 1.0), jitter=0.0),
        # The script's default 5e-5 is for a batch of 128 and is scaled by the batch: 2e-4 at 512; min_lr is not
        # scaled. Betas and weight decay: [B2 TOKENIZER.md].
        optim=Optim(
            lr=2e-4,
            min_lr=1e-5,
            betas=(0.9, 0.99),
            eps=1e-8,
            weight_decay=1e-4,
            warmup_steps=TOKENIZER_WARMUP,
            clip=0.0,
        ),
        steps=TOKENIZER_STEPS,
        evals=(Reconstruction(HELD_IMAGES, samples=5000),),
    )


def _vision(pretrain: Stage) -> Stage:
    """Masked images alone, with [B2]'s batch of 2048, peak 1.5e-3, clipping at 3.0, weight decay, and betas of its
    300-epoch runs. 500k steps: VLMo publishes the lengths of its other stages only, so this one is a choice. The rest
    is `pretrain`'s, also a choice, so that the stages go on from one another; [B2 PRETRAINING.md and
    run_beitv2_pretraining.py] has eps 1e-8, drop path 0 for 300 epochs and 0.1 for 1600, min_lr 1e-5, 10 epochs of
    warmup (6255 steps on ImageNet-1k), LayerScale, relative positions, and a patch-aggregation head: two more layers
    behind layer 9 (base) or 21 (large) that must predict the codes from its patches and the last layer's class row.
    That head is not built here; [B3] does not mention it."""
    return replace(
        pretrain,
        mix={"images": IMAGES},
        batch=BatchSize(images=2048),
        experts=("vision",),
        objectives=(replace(OBJECTIVE, text_ratio=0.0, pair_text_ratio=0.0, pair_image_ratio=0.0),),
        optim=replace(OPTIM, lr=1.5e-3),
        steps=500_000,
        evals=(MaskedAccuracy({"images": HELD_IMAGES}, samples=5000),),
    )


def _language(pretrain: Stage) -> Stage:
    """Masked texts with attention and the vision expert frozen, as VLMo's second stage: batch 1024, 200k steps, peak
    2e-4, weight decay 0.01 [VLMo config.py, task_textmlm_base]. It trains the parameters that vlmo/run.py trains."""
    return replace(
        pretrain,
        mix={"texts": TEXTS},
        batch=BatchSize(texts=1024),
        experts=("language",),
        init_from="vision",
        trainable=LANGUAGE_TRAINS,
        objectives=(replace(OBJECTIVE, image_ratio=0.0, pair_text_ratio=0.0, pair_image_ratio=0.0),),
        visual_tokenizer=None,
        optim=replace(OPTIM, lr=2e-4, weight_decay=0.01, warmup_steps=2500),
        steps=200_000,
        evals=(MaskedAccuracy({"texts": HELD_TEXTS}, samples=5000),),
    )


# vlmo/run.py: text_embeddings, mlp_text, norm2_text, mlm_score, transformer.norm (our experts own their norm).
# With attention per modality, texts have projections of their own, which no stage has trained before: trained too.
LANGUAGE_TRAINS = (
    "encoder.text_embed.*",
    "encoder.blocks.*.experts.language.*",
    "encoder.blocks.*.language.*",
    "encoder.norm.*",
    "objectives.*",
)


def _retrieval(init_from: str) -> Stage:
    """Intermediate fine-tuning by contrast on the pretraining pairs [B3 appendix A]: 5 epochs of 21M pairs at 16k, one
    of them warmup, peak 3e-5, weight decay 0.05, drop path 0.3, layer decay 0.95, betas (0.9, 0.999). clip=3.0 has no
    source: it is pretraining's, kept as a guard (unilm's beit3/run_beit3_finetuning.py clips nothing by default, and
    has eps 1e-8). Not published either: min_lr, and what becomes of flip and jitter."""
    epoch = 21_000_000 // 16_384
    return Stage(
        mix={"dual": PAIRS},
        batch=BatchSize(dual=16_384),
        experts=("vision", "language"),
        init_from=init_from,
        objectives=(Contrastive(),),
        transform=replace(LOOK, flip=False, jitter=0.0),
        optim=Optim(
            lr=3e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, warmup_steps=epoch, layer_decay=0.95, clip=3.0
        ),
        steps=5 * epoch,
        drop_path=0.3,
        activation_checkpointing=True,
        # As many pairs as COCO's test split has pictures [B3 table 6 reports on 5K].
        evals=(Retrieval(HELD_PAIRS, samples=5000),),
    )
