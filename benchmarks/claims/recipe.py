"""The arms of benchmarks.claims, as stages of one recipe. $CLAIMS_CORPUS is what world.make_corpus writes, $CLAIMS_RUN
the run directory of a seed. Sizes, rates and steps were chosen by trying the first arms of each claim, once, and not
tuned for any of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.claims.foils import FoilChoice, FoilShards
from benchmarks.claims.world import ANSWERS, HELD_OUT, LOOKS
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.labelled import QuestionShards
from pretrain.data.mixture import Loading
from pretrain.data.sources import CaptionShards, ImageShards, PairShards, TextShards
from pretrain.data.transforms import ImageTransform
from pretrain.evals.captions import CaptionScore, ReferenceShards
from pretrain.evals.labelled import QuestionAccuracy
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.generation import Writing
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.teachers import Pixels
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.objectives.answering import Answering
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.objectives.momentum import MomentumContrast
from pretrain.optim import Optim
from pretrain.recipes import blip_base
from pretrain.tasks.tokenizer import TrainTokenizer

HELD_OUT_SAMPLES = HELD_OUT * LOOKS
CORPUS, CODES, CAPTION_LEN = "$CLAIMS_CORPUS", 256, 16
IMAGES, HELD_IMAGES = ImageShards(f"{CORPUS}/images/train"), ImageShards(f"{CORPUS}/images/heldout")
TEXTS, HELD_TEXTS = (TextShards(f"{CORPUS}/texts/{split}", text_len=36) for split in ("train", "heldout"))
PAIRS, HELD_PAIRS = (PairShards(f"{CORPUS}/pairs/{split}", text_len=CAPTION_LEN) for split in ("train", "heldout"))
QUESTIONS, HELD_QUESTIONS = (
    QuestionShards(f"{CORPUS}/questions/{split}", text_len=CAPTION_LEN, vocabulary=f"{CORPUS}/answers.json")
    for split in ("train", "heldout")
)

LOOK = ImageTransform(size=48, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, jitter=0.0)
OPTIM = Optim(lr=1e-3, warmup_steps=20, weight_decay=0.05, clip=3.0)
MODEL = MultiwayConfig(
    dim=96,
    depth=6,
    heads=4,
    ffn_dim=384,
    image_size=48,
    patch_size=12,
    vocab_size=136,
    max_text_len=36,
    fusion_layers=3,
    init_std=0.08,
)
COMMON: dict[str, Any] = {"transform": LOOK, "optim": OPTIM}

TOKENIZER = Stage(
    mix={"images": IMAGES},
    batch=BatchSize(images=64),
    model=VQKDConfig(
        dim=96, depth=1, heads=3, decoder_depth=0, image_size=48, patch_size=12, codes=CODES, code_dim=32,
        target_dim=48, distill="mse", decay=0.95, restart_after=20,
    ),
    task=TrainTokenizer(teacher=Pixels()),
    transform=LOOK,
    optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup_steps=20, weight_decay=1e-4),
    steps=300,
)  # fmt: skip


def masked_stage(steps: int, **counts: int) -> Stage:
    """Masked data modeling with these counts of images, pairs and texts a step. No patch of a pair is masked."""
    sources: dict[str, Any] = {"images": IMAGES, "pairs": PAIRS, "texts": TEXTS}
    held: dict[str, Any] = {"images": HELD_IMAGES, "pairs": HELD_PAIRS, "texts": HELD_TEXTS}
    kinds = set(counts)
    hidden = MaskedData(
        image_ratio=0.4 if "images" in kinds else 0.0,
        text_ratio=0.15 if "texts" in kinds else 0.0,
        pair_text_ratio=0.4 if "pairs" in kinds else 0.0,
        pair_image_ratio=0.0,
        dual=False,
        image_codes=CODES,
    )
    experts = {"vision": {"images", "pairs"}, "language": {"texts", "pairs"}, "fusion": {"pairs"}}
    return Stage(
        mix={kind: sources[kind] for kind in counts},
        batch=BatchSize(**counts),
        experts=tuple(name for name, readers in experts.items() if readers & kinds),
        objectives=(hidden,),
        visual_tokenizer="tokenizer" if "images" in kinds else None,
        steps=steps,
        evals=(MaskedAccuracy({kind: held[kind] for kind in counts}, samples=HELD_OUT_SAMPLES),),
        **COMMON,
    )


def matching_stage(negatives: str, steps: int, init: str | None) -> Stage:
    return Stage(
        mix={"dual": PAIRS},
        batch=BatchSize(dual=32),
        objectives=(Contrastive(), Matching(negatives)),
        init_from=init,
        steps=steps,
        evals=(
            MatchingAccuracy(HELD_PAIRS, HELD_OUT_SAMPLES, HELD_OUT),
            FoilChoice(FoilShards(HELD_PAIRS.shards, CAPTION_LEN), HELD_OUT_SAMPLES),
        ),
        **COMMON,
    )


def question_stage(init: str | None, **more: Any) -> Stage:
    """Fine-tuning on questions."""
    return Stage(
        mix={"pairs": QUESTIONS},
        batch=BatchSize(pairs=32),
        objectives=(Answering(len(ANSWERS)),),
        init_from=init,
        steps=200,
        evals=(QuestionAccuracy(HELD_QUESTIONS),),
        **COMMON,
        **more,
    )


def retrieval_stage(init: str | None) -> Stage:
    """Fine-tuning on retrieval, by contrast alone."""
    return Stage(
        mix={"dual": PAIRS},
        batch=BatchSize(dual=32),
        experts=("vision", "language"),
        objectives=(Contrastive(),),
        init_from=init,
        steps=80,
        evals=(Retrieval(HELD_PAIRS, samples=HELD_OUT),),
        **COMMON,
    )


def frozen_attention(stage: Stage, expert: str, init: str | None) -> Stage:
    """With attention frozen, as in VLMo's stage 2 (vlmo/run.py): only this expert, its embedding, the last norm and the
    heads are trained."""
    embed = {"vision": "vision_embed", "language": "text_embed"}[expert]
    trainable = (f"encoder.{embed}.*", f"encoder.blocks.*.experts.{expert}.*", "encoder.norm.*", "objectives.*")
    return replace(stage, init_from=init, trainable=trainable)


IMAGES_ALONE, TEXTS_ALONE, PAIRS_ALONE = (
    masked_stage(300, images=64),
    masked_stage(300, texts=32),
    masked_stage(300, pairs=32),
)
TOGETHER = masked_stage(300, images=64, pairs=32, texts=32)
# As many FLOPs as TOGETHER (a test counts them). Negatives are random, because with hard ones matching takes longer to
# learn anything.
THREE = replace(
    matching_stage("random", 188, None),
    mix={"dual": PAIRS, "pairs": PAIRS},
    batch=BatchSize(dual=32, pairs=32),
    objectives=(Contrastive(), Matching("random"), *PAIRS_ALONE.objectives),
    evals=(),
)

BLIP = EncoderDecoder(
    dim=96, heads=4, ffn_dim=384, image_depth=3, text_depth=3, image_size=48, patch_size=12, vocab_size=136 + 2,
    max_text_len=CAPTION_LEN, init_std=0.08,
)  # fmt: skip


def blip(pairs: PairShards, steps: int, init: str | None = None) -> Stage:
    """BLIP's three losses, with random negatives (benchmarks/README.md says why)."""
    held = HELD_PAIRS.shards
    contrast = MomentumContrast(embed_dim=96, momentum=0.98, queue=256, ramp_steps=150, projection_bias=True)
    return Stage(
        mix={"dual": pairs},
        batch=BatchSize(dual=32),
        model=BLIP,
        objectives=(contrast, Matching("random"), blip_base.WORDS),
        init_from=init,
        steps=steps,
        evals=(
            Retrieval(HELD_PAIRS, samples=HELD_OUT),
            MatchingAccuracy(HELD_PAIRS, HELD_OUT_SAMPLES, HELD_OUT),
            FoilChoice(FoilShards(held, CAPTION_LEN), HELD_OUT_SAMPLES),
            CaptionScore(ReferenceShards(held, CAPTION_LEN), samples=HELD_OUT, writing=Writing(1, 1.0, max_words=15)),
        ),
        **COMMON,
    )


NOISY = replace(PAIRS, shards=f"{CORPUS}/pairs/noisy")
FILTERED = CaptionShards("$CLAIMS_RUN/capfilt", CAPTION_LEN, draw=True)
CLEAN = replace(PAIRS, shards=f"{CORPUS}/pairs/clean")

PRETRAINED = ("pairs", "stagewise", "joint", "joint_small_steps", "three")

STAGES = {
    "tokenizer": TOKENIZER,
    "vision": IMAGES_ALONE,
    "language": TEXTS_ALONE,
    # attention from the other modality
    "language_on_vision": frozen_attention(TEXTS_ALONE, "language", "vision"),
    "language_on_random": frozen_attention(TEXTS_ALONE, "language", None),
    "language_from_vision": replace(TEXTS_ALONE, init_from="vision"),
    "vision_on_language": frozen_attention(IMAGES_ALONE, "vision", "language"),
    "vision_on_random": frozen_attention(IMAGES_ALONE, "vision", None),
    "both": masked_stage(300, images=64, texts=32),
    # what comes before fusion
    "pairs": PAIRS_ALONE,
    "stagewise": replace(PAIRS_ALONE, init_from="language_on_vision"),
    "joint": TOGETHER,
    # The same samples in more steps: the stages have 900 in all.
    "joint_small_steps": masked_stage(960, images=20, pairs=10, texts=10),
    "three": THREE,
    "no_fusion_expert": replace(PAIRS_ALONE, model=replace(MODEL, fusion_layers=0)),
    # negatives
    "random_first": matching_stage("random", 200, "pairs"),
    "random": matching_stage("random", 200, "random_first"),
    "hard": matching_stage("global", 200, "random_first"),
    "hard_from_the_start": matching_stage("global", 400, "pairs"),
    # captions
    "clean": blip(PAIRS, 300),
    "noisy": blip(NOISY, 300),
    "filtered": blip(FILTERED, 300),
    **{f"{name}_tuned": blip(CLEAN, 60, name) for name in ("clean", "noisy", "filtered")},
    # what the others are judged by
    "questions_scratch": question_stage(None),
    "retrieval_scratch": retrieval_stage(None),
    **{f"questions_{name}": question_stage(name) for name in PRETRAINED},
    **{f"retrieval_{name}": retrieval_stage(name) for name in PRETRAINED},
    "questions_no_fusion_expert": question_stage("no_fusion_expert", model=replace(MODEL, fusion_layers=0)),
}

RECIPE = Recipe(
    name="claims",
    model=MODEL,
    text_tokenizer=f"{CORPUS}/text.model",
    stages=STAGES,
    loading=Loading(workers=0, streams=2, block_shards=4),
    log_every=10,
    save_every=100_000,
    save_in_background=False,
)
