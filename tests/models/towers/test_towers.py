"""Towers in training: ranks under ZeRO against one process, what a stage may ask of them, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.calls import Calls, on_device
from pretrain.batch import Batch, Layout
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.data.transforms import ImageTransform
from pretrain.distributed import rank, world_size
from pretrain.layers import PLAIN, Layers
from pretrain.models.towers.dual import DualTowers
from pretrain.models.towers.tower import Tower
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.run.build import check_model
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.models.towers.others import LENGTH, SIZES, dual_batch
from tests.step_batches import CONFIGS, Trained, mean_reports, train_alone, train_on_ranks
from tests.toy_models import part_of

RESNET = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
MODEL = DualTowers(
    Tower("resnet", RESNET, "attention"),
    Tower("bert", SIZES | {"initializer_range": 0.1}, "mean"),
    image_size=32,
    patch_size=8,
    vocab_size=40,
    max_text_len=LENGTH,
)
CLIP = replace(MODEL, vision=Tower("clip_vision_model", SIZES), text=Tower("clip_text_model", SIZES, "eos"))
OPTIM, STEPS, COUNT, STAGES = Optim(lr=1e-3, warmup_steps=1, clip=1.0), 3, 8, [2, 3]


def build(layers: Layers = PLAIN) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, (), (Contrastive(embed_dim=12, temperature=0.5),), layers)


def micro_batch(step: int, part: int = 0, parts: int = 1) -> Batch:
    whole = dual_batch(40, seed=step, count=COUNT)
    whole = replace(whole, image_codes=torch.zeros(COUNT, 16, dtype=torch.long))
    own = slice(part * COUNT // parts, (part + 1) * COUNT // parts)
    return part_of(whole, own, slice(0), own, dual=COUNT // parts)


def train_zero(stages: list[int]) -> list[Trained]:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, partitioned_init
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.sizes import Parallel
    from pretrain.parallel.tensor import parallel_layers

    runs, ranks = [], world_size()
    for zero in stages:
        path = CONFIGS / f"zero{zero}.json"
        config = load_ds_config(path, micro=COUNT // ranks, accumulation=1, world=ranks, clip=OPTIM.clip)
        config.pop("bf16", None)
        mesh = create_mesh(Parallel())
        with partitioned_init(config):
            task = build(parallel_layers(mesh))
        engine = build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, STEPS), config)
        runs.append(train_on_ranks(engine, mesh, micro_batch, STEPS))
    return runs


def test_ranks_under_zero_give_the_losses_and_statistics_of_one_process():
    """The batch statistics are those of all ranks, and under ZeRO-3 transformers draws the weights that it draws
    alone."""
    alone = train_alone(build(), OPTIM, [micro_batch(step) for step in range(1, STEPS + 1)])
    ranks = run_ranks(train_zero, 2, STAGES)
    for number, zero in enumerate(STAGES):
        reports = mean_reports([runs[number] for runs in ranks])
        off = [abs(own["loss"] - want["loss"]) for own, want in zip(reports, alone.reports, strict=True)]
        assert max(off) <= 1e-6, (zero, off)
        weights = ranks[0][number].weights
        assert weights.keys() == alone.weights.keys()
        for name in weights:
            torch.testing.assert_close(
                weights[name].to(alone.weights[name].dtype), alone.weights[name], rtol=0, atol=2e-5
            )
    assert alone.reports[-1]["loss"] < alone.reports[0]["loss"]


def statistics() -> list[torch.Tensor]:
    from pretrain.models.towers.batch_norm import GlobalBatchNorm

    norm = GlobalBatchNorm(torch.nn.BatchNorm2d(3), PLAIN.gather)
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).chunk(world_size())[rank()].requires_grad_()
    out = norm(x)
    (out**3).mean().backward()
    return [out.detach(), x.grad / world_size(), norm.running_mean, norm.running_var]


def test_batch_norm_over_ranks_is_torchs_over_the_whole_batch():
    plain = torch.nn.BatchNorm2d(3)
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = plain(x)
    (out**3).mean().backward()
    ranks = run_ranks(statistics, 2)
    torch.testing.assert_close(torch.cat([own[0] for own in ranks]), out.detach())
    torch.testing.assert_close(torch.cat([own[1] for own in ranks]), x.grad)
    for own in ranks:
        torch.testing.assert_close(own[2:], [plain.running_mean, plain.running_var])


def test_batch_norm_remembers_nothing_of_a_step_that_is_not_finite():
    """Such a step is skipped; in the running statistics it would stay, and a checkpoint with them could not be read."""
    from pretrain.models.towers.batch_norm import GlobalBatchNorm

    norm, x = GlobalBatchNorm(torch.nn.BatchNorm2d(3), PLAIN.gather), torch.randn(8, 3, 4, 4)
    norm(x)
    before = norm.running_mean.clone(), norm.running_var.clone()
    x[0, 1] = torch.inf
    norm(x)
    for now, then in zip((norm.running_mean, norm.running_var), before, strict=True):
        assert now.isfinite().all() and now[1] == then[1] and now[0] != then[0]


def test_positions_fit_another_picture_and_a_shorter_text():
    task = PretrainTask(CLIP, (), (Contrastive(embed_dim=12),))
    larger = replace(CLIP, image_size=64, max_text_len=LENGTH - 2)
    wanted = {
        name: tuple(v.shape) for name, v in PretrainTask(larger, (), (Contrastive(embed_dim=12),)).state_dict().items()
    }
    state = task.state_dict()
    state["encoder.vision.model.embeddings.position_embedding.weight"][1:] = 3.0
    adapted = larger.adapt(state, CLIP, wanted)
    assert {name: tuple(value.shape) for name, value in adapted.items()} == wanted
    patches = adapted["encoder.vision.model.embeddings.position_embedding.weight"]
    torch.testing.assert_close(patches[1:], torch.full((64, 16), 3.0))
    assert patches[0].equal(state["encoder.vision.model.embeddings.position_embedding.weight"][0])


def test_flops_count_the_towers():
    """A ViT's as the formula for transformers has them, to the attention of the class row."""
    layout = Layout(images=2, texts=3, patches=16, text_len=LENGTH, dual=2)
    pictures, words = (CLIP.flops(replace(layout, **{name: 0})) for name in ("texts", "images"))
    assert CLIP.flops(layout) == pictures + words
    per_row = 3 * 2 * (2 * (4 * 16 * 16 + 2 * 16 * 32))  # two layers, forward and backward
    assert words == 3 * (LENGTH * per_row + 3 * 2 * 4 * LENGTH * LENGTH * 16)
    assert 0.9 < pictures / (2 * (17 * per_row + 3 * 2 * 4 * 17 * 17 * 16 + 3 * 2 * 16 * 192 * 16)) < 1.1
    assert MODEL.flops(replace(layout, texts=0)) > 0


def stage(**changes: object) -> Stage:
    options: dict = {
        "mix": {"dual": PairShards("x", text_len=LENGTH)}, "batch": BatchSize(dual=8), "optim": OPTIM, "steps": 1,
        "objectives": (Contrastive(),), "transform": ImageTransform(size=32),
    }  # fmt: skip
    return Stage(**(options | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": (Contrastive(), Matching())}, r"matching reads patches, words or fused pairs, and DualTowers"),
        ({"objectives": (Contrastive(), MaskedData())}, r"masked reads patches, words or fused pairs, and DualTowers"),
        ({"drop_path": 0.1}, r"drop_path=0.1: towers of transformers have none; set it to 0"),
        (
            {"mix": {"pairs": PairShards("x")}, "batch": BatchSize(pairs=8), "objectives": (Captioning(),)},
            r"mix\.pairs does not go with DualTowers, which fuse nothing; use mix\.dual",
        ),
    ],
)
def test_stages_that_towers_refuse(changes, said):
    with pytest.raises(ValueError, match=said):
        Recipe(name="x", model=MODEL, stages={"x": stage(**changes)})


def test_unlike_widths_need_a_projection():
    model = replace(MODEL, text=Tower("bert", SIZES | {"hidden_size": 24}))
    recipe = Recipe(name="x", model=model, stages={"x": stage(objectives=(Contrastive(project=False),))})
    with pytest.raises(
        ValueError, match=r"project=False compares rows as they are, .* width of 16 and texts of 24; set"
    ):
        check_model(recipe, recipe.stages["x"])
    same = replace(model, text=replace(model.text, projection=16))
    check_model(replace(recipe, model=same), recipe.stages["x"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Tower("gpt2"), r"tower\.kind='gpt2' is unknown; use clip_vision_model, "),
        (lambda: Tower("resnet", pooling="class"), r"resnet has no class row; use mean or attention"),
        (lambda: Tower("vit", pooling="eos"), r"pooling='eos' does not go with vit; use class, mean, attention"),
        (lambda: Tower("bert", {"vocab_size": 3}), r"settings\.vocab_size follows from the model's fields"),
        (lambda: replace(MODEL, text=Tower("vit")), r"model\.text\.kind='vit' is no text tower; use clip_text_model"),
        (lambda: replace(MODEL, image_size=30), r"image_size=30 is no multiple of model\.patch_size=8; use 24"),
        (lambda: Tower("bert", {"hidden": 3}).width, r"tower\.settings\.hidden is no setting of bert"),
        (
            lambda: replace(MODEL, text=Tower("bert", SIZES | {"hidden_size": 15})).build(()),
            r"are no settings of bert|multiple",
        ),
    ],
)
def test_towers_that_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("kind", ["clip_text_model", "siglip_text_model", "bert", "roberta", "align_text_model"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_step_of_towers_waits_for_nothing(kind, pooling):
    """transformers looks whether there is any padding if it gets no mask, or one that it must complete."""
    task = PretrainTask(replace(MODEL, text=Tower(kind, SIZES, pooling)), (), (Contrastive(embed_dim=12),))
    batch = on_device(micro_batch(1))
    with Calls([*task.parameters(), *task.buffers(), *batch.every_tensor()]) as calls:
        task(batch)["loss"].backward()
    assert calls.waits.total() == 0, calls.waits
