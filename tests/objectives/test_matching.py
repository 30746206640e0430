from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import Kinds, Layout, make_batch
from pretrain.config import BatchSize, Stage
from pretrain.data.sources import PairShards
from pretrain.distributed import rank, world_size
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.matching import Matching, MatchingHead
from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.step_batches import CONFIGS, DUAL, MODELS, Trained, dual_batch, mean_reports, train_alone, train_on_ranks
from tests.toy_models import EXPERTS, part_of, random_batch

MODEL = MODELS["paper"]
OPTIM = Optim(lr=5e-4, warmup_steps=2, clip=1.0)
STEPS, COUNT, LENGTH, DROP = 10, DUAL, 10, 0.3


def build(negatives: str = "global", sigmoid: bool = False) -> PretrainTask:
    torch.manual_seed(0)
    # A scale of 2 and not of 14, by which rounding would be multiplied.
    contrast = Contrastive(loss="sigmoid") if sigmoid else Contrastive(temperature=0.5)
    objectives = Matching(negatives), contrast
    return PretrainTask(MODEL, EXPERTS, objectives, drop_path=DROP)


@pytest.mark.parametrize("negatives", ["global", "local", "random"])
def test_the_loss_is_that_of_three_fused_passes(negatives):
    """Each by itself, and the partners as the draws say by a plain formula."""
    task, batch = build(negatives).eval(), dual_batch(1)
    head, layout = task.objectives["matching"], batch.layout
    encoded = task.encoder(batch)
    images, texts = task.objectives["contrastive"].embed(encoded, layout)
    alike = images @ texts.T / 0.5 * (negatives != "random")
    drawn = batch.draws["matching"][:, 0]
    wrong_text = [plain_draw(alike[i], i, drawn[COUNT + i]) for i in range(COUNT)]
    wrong_image = [plain_draw(alike[:, i], i, drawn[2 * COUNT + i]) for i in range(COUNT)]
    every = list(range(COUNT))
    assert all(own != other for chosen in (wrong_text, wrong_image) for own, other in zip(every, chosen, strict=True))
    losses = []
    for pictures, words, label in ((every, every, 1), (every, wrong_text, 0), (wrong_image, every, 0)):
        pair = make_batch(
            Layout(pairs=COUNT, patches=16, pair_len=LENGTH),
            images=batch.images[COUNT:][pictures],
            pair_tokens=batch.text_tokens[words],
        )
        logits = head.match(task.encoder(pair).pair_images[:, 0])
        losses.append(F.cross_entropy(logits, torch.full((COUNT,), label)))
    torch.testing.assert_close(head(encoded, batch, task.encoder)["loss"], torch.stack(losses).mean())


def plain_draw(alike: Tensor, own: int, uniform: Tensor) -> int:
    others = [place for place in range(len(alike)) if place != own]
    shares, passed = alike.double().detach()[others].softmax(-1), 0.0
    for place, share in zip(others, shares, strict=True):
        passed += share.item()
        if uniform < passed:
            return place
    raise AssertionError("the shares are one")


def test_a_draw_of_zero_never_picks_the_own_partner():
    head = MatchingHead(4)
    head.contrast = (Contrastive().build(MODEL, EXPERTS),)
    batch = dual_batch(1)
    for value, expected in ((0.0, [1, *[0] * (COUNT - 1)]), (1 - 2**-24, [*[COUNT - 1] * (COUNT - 1), COUNT - 2])):
        batch.draws["matching"].fill_(value)
        same = Kinds.split(torch.ones(batch.layout.rows, MODEL.dim), batch.layout)
        assert [chosen.tolist() for chosen in head.draw(same, batch)] == [expected] * 2


def test_partners_are_drawn_by_the_contrasts_own_scale():
    """CLIP's stays at 100 however far its parameter has grown; SigLIP's has no bound."""
    head, batch = MatchingHead(4), dual_batch(1)
    made = torch.Generator().manual_seed(3)
    close = Kinds.split(torch.randn(batch.layout.rows, MODEL.dim, generator=made) * 0.02 + 1, batch.layout)
    drawn = {}
    for loss in ("softmax", "sigmoid"):
        contrast = Contrastive(loss=loss, project=False).build(MODEL, EXPERTS)
        head.contrast = (contrast,)
        for scale in (100.0, 1e5):
            with torch.no_grad():
                contrast.logit_scale.fill_(scale).log_()
            assert contrast.scale().item() == pytest.approx(100 if loss == "softmax" else scale)
            drawn[loss, scale] = [chosen.tolist() for chosen in head.draw(close, batch)]
    assert drawn["softmax", 1e5] == drawn["softmax", 100.0] == drawn["sigmoid", 100.0] != drawn["sigmoid", 1e5]


def test_the_more_alike_is_the_more_often_drawn():
    head = MatchingHead(4)
    head.contrast = (Contrastive().build(MODEL, EXPERTS),)
    rows = torch.randn(2, COUNT, MODEL.dim, generator=torch.Generator().manual_seed(0))
    none, counts = torch.zeros(0, 0, MODEL.dim), torch.zeros(COUNT, COUNT)
    encoded = Kinds(rows[0, :, None], none, none, rows[1, :, None])
    images, texts = head.contrast[0].embed(encoded, layout := Layout(COUNT, texts=COUNT, text_len=1, dual=COUNT))
    for number in range(500):
        drawn = torch.full((2 * COUNT, 1), (number + 0.5) / 500)
        chosen, _ = head.draw(encoded, make_batch(layout, draws={"matching": drawn}))
        counts[torch.arange(COUNT), chosen] += 1
    alike = (images @ texts.T / 0.07).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(counts / 500, alike.softmax(-1).detach(), atol=4.1e-3, rtol=0)


def train_zero(stages: list[int], sigmoid: bool) -> list[Trained]:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, partitioned_init
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.sizes import Parallel

    runs, ranks = [], world_size()
    for stage in stages:
        config = load_ds_config(
            CONFIGS / f"zero{stage}.json", micro=4 * COUNT // ranks, accumulation=1, world=ranks, clip=OPTIM.clip
        )
        config.pop("bf16", None)
        with partitioned_init(config):
            task = build(sigmoid=sigmoid)
        engine = build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, STEPS), config)
        runs.append(train_on_ranks(engine, create_mesh(Parallel()), dual_batch, STEPS))
    return runs


@pytest.mark.parametrize(("ranks", "stages", "sigmoid"), [(4, [1, 2, 3], False), (2, [3], True)])
def test_ranks_under_zero_give_the_losses_of_one_process(ranks, stages, sigmoid):
    alone = train_alone(build(sigmoid=sigmoid), OPTIM, [dual_batch(step) for step in range(1, STEPS + 1)])
    everywhere = run_ranks(train_zero, ranks, stages, sigmoid, timeout=280)
    for number, stage in enumerate(stages):
        reports = mean_reports([runs[number] for runs in everywhere])
        for name in ("loss", "loss/matching", "accuracy/matching"):
            off = [abs(own[name] - want[name]) for own, want in zip(reports, alone.reports, strict=True)]
            assert max(off) <= 1e-6, (stage, name, off)
    assert len({report["accuracy/matching"] for report in alone.reports}) > 1


def fetched() -> list[list[int]]:
    head, own = MatchingHead(4), rank()
    rows = 10 * own + torch.arange(2).unsqueeze(1).expand(2, 3)  # ids, not contiguous
    return [head._fetch(rows, torch.tensor(wanted) - 2 * own)[:, 0].tolist() for wanted in ([0, 5], [4, 1])]


def test_partners_come_from_every_rank():
    assert run_ranks(fetched, 3) == [[[0, 21], [20, 1]]] * 3


def test_a_ranks_only_pair_has_no_local_negative():
    task = build("local")
    batch = random_batch(Layout(images=2, texts=2, patches=16, text_len=8, dual=1), cfg=MODEL)
    with pytest.raises(ValueError, match=r"matching\.negatives='local' finds no wrong partner .* use 'global'"):
        task(replace(part_of(batch, slice(2), slice(0), slice(2), dual=1), draws={"matching": torch.zeros(4, 1)}))


def test_its_cost_is_that_of_the_pass_that_it_makes():
    seen: list[Layout] = []
    task, batch = build(), dual_batch(1)
    task.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].layout))
    task(batch)
    assert seen == [batch.layout, *(each.layout for each in Matching().passes(batch.layout))]
    assert Matching().products(batch.layout, MODEL)[0].rows == 3 * COUNT


def test_random_partners_need_no_contrast():
    torch.manual_seed(0)
    alone, beside = PretrainTask(MODEL, EXPERTS, (Matching("random"),)).eval(), build("random").eval()
    beside.load_state_dict(alone.state_dict(), strict=False)
    batch = dual_batch(1)
    assert alone(batch)["loss"].equal(beside(batch)["loss/matching"])
    Stage(
        mix={"dual": PairShards("x", text_len=8)}, batch=BatchSize(dual=4), optim=Optim(), steps=1,
        objectives=(Matching("random"),),
    )  # fmt: skip


@pytest.mark.parametrize("negatives", ["global", "local"])
def test_the_first_steps_have_random_partners(negatives):
    """And those of a stage that goes on from the state of such steps have not."""
    plain, chance, own = build(negatives), build("random"), MatchingHead(MODEL.dim, negatives, random_steps=2)
    own.contrast = plain.objectives["matching"].contrast
    batch = dual_batch(1)
    encoded = plain.encoder(batch)

    def partners(head: MatchingHead) -> list[list[int]]:
        return [chosen.tolist() for chosen in head.draw(encoded, batch)]

    hard, random = (partners(task.objectives["matching"]) for task in (plain, chance))
    assert hard != random
    for expected in (random, random, hard, hard):
        assert partners(own) == expected
        own.after_step()
    resumed = MatchingHead(MODEL.dim, negatives, random_steps=2)
    resumed.load_state_dict(own.state_dict())
    resumed.contrast = own.contrast
    assert partners(resumed) == hard and "steps" not in MatchingHead(4).state_dict()
    Matching(negatives, random_steps=2).begin(resumed)  # a stage that begins with the weights of such a one
    assert partners(resumed) == random
    Matching(negatives).begin(plain.objectives["matching"])


CONTRAST = (Contrastive(), Matching())


@pytest.mark.parametrize(
    ("count", "experts", "objectives", "said"),
    [
        (4, EXPERTS, (Matching(),), r"by the objective contrastive, and this stage has matching; add Contrastive\(\)"),
        (1, EXPERTS, CONTRAST, r"needs wrong partners and batch\.dual=1 has none; use 2 or more"),
        (4, ("vision",), CONTRAST, r"experts=\['vision'\] lacks language; add what is missing"),
    ],
)
def test_stages_that_it_refuses(count, experts, objectives, said):
    with pytest.raises(ValueError, match=said):
        Stage(
            mix={"dual": PairShards("x", text_len=8)}, batch=BatchSize(dual=count), optim=Optim(), steps=1,
            experts=experts, objectives=objectives,
        )  # fmt: skip


def test_unknown_negatives_are_refused():
    with pytest.raises(ValueError, match=r"matching\.negatives='hard' is unknown; use global, local, random"):
        Matching("hard")
    with pytest.raises(ValueError, match=r"matching\.random_steps=-1 is below 0"):
        Matching(random_steps=-1)
