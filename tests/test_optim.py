"""Learning rates, parameter groups and the settings' own checks."""

from __future__ import annotations

import itertools
import pkgutil

import pytest
import torch
from torch import nn

from pretrain import recipes
from pretrain.layers import PLAIN
from pretrain.optim import Optim, build_optimizer, decays, learning_rate, parameter_groups, schedule
from pretrain.recipes import find_recipe


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 4))
        self.positions = nn.Embedding(5, 4)
        self.words = nn.Embedding(6, 4)
        self.patches = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4)}) for _ in range(3))
        self.relative_position_table = nn.Parameter(torch.zeros(9, 2))
        self.head = nn.Linear(4, 2)
        self.logit_scale = nn.Parameter(torch.ones(1))


def layer_of(name: str) -> int:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 4 if name.startswith(("head", "logit_scale")) else 0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warmup_is_linear_and_the_end_is_reached(kind):
    optim = Optim(lr=0.1, min_lr=0.01, warmup_steps=4, schedule=kind)
    rates = [learning_rate(optim, step, 20) for step in range(1, 21)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[-1] == pytest.approx(0.1 if kind == "constant" else 0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[3:])), "never up again after warmup"
    middle = learning_rate(optim, 12, 20)
    assert middle == pytest.approx(0.1 if kind == "constant" else 0.055)  # half-way, both decays are at their middle


def test_wsd_is_constant_and_then_decays_and_no_step_before_depends_on_the_total():
    optim = Optim(lr=0.3, min_lr=0.1, warmup_steps=4, schedule="wsd", decay_steps=5)
    constant = Optim(lr=0.3, min_lr=0.1, warmup_steps=4, schedule="constant")
    rates = [learning_rate(optim, step, 20) for step in range(1, 21)]
    assert rates[:15] == [learning_rate(constant, step, 999) for step in range(1, 16)], "to the bit"
    assert rates[15:] == pytest.approx([0.26, 0.22, 0.18, 0.14, 0.1])
    cut = [learning_rate(optim, step, 6) for step in range(1, 7)]  # a decay longer than what warmup leaves
    assert cut == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.2, 0.1])


def test_learning_rate_at_the_edges():
    assert learning_rate(Optim(lr=1.0, warmup_steps=0), 1, 1) == 0.0  # one step is also the last
    assert learning_rate(Optim(lr=1.0, warmup_steps=100), 10, 10) == 1.0  # a warmup longer than the run is cut to it
    assert learning_rate(Optim(lr=1.0, min_lr=0.5, warmup_steps=0), 30, 20) == 0.5  # beyond the end it stays


def test_the_factor_gives_the_coming_steps_rate_to_each_group():
    optim = Optim(lr=0.1, warmup_steps=2, layer_decay=0.5)
    optimizer = build_optimizer(Named(), optim, layer_of=layer_of)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(optim, 10))
    for step in range(1, 11):
        rates = {group["lr"] for group in optimizer.param_groups}
        expected = {learning_rate(optim, step, 10) * 0.5**down for down in range(5)}
        assert sorted(rates) == pytest.approx(sorted(expected)), step
        optimizer.step()
        scheduler.step()


def test_what_is_decayed():
    decayed = {name for name, parameter in Named().named_parameters() if decays(name, parameter)}
    blocks = {f"blocks.{i}.fc.weight" for i in range(3)}
    assert decayed == {"words.weight", "patches.weight", "head.weight", *blocks}


# What has two or more dimensions and is not decayed. unilm's own lists (`no_weight_decay`) hold cls_token and pos_embed
# for BEiT and BEiT-2, {encoder,decoder}.{cls_token,pos_embed} for VQ-KD, embed_positions of both modalities and
# vision_embed.cls_token for BEiT-3; its mask token stands on none of them.
TOKENS = {"encoder.vision_embed.cls_token", "encoder.vision_embed.mask_token"}
LEARNED = TOKENS | {"encoder.vision_embed.positions", "encoder.text_embed.positions"}
VLMO = TOKENS | {"encoder.relative_position.table"}
ALBEF = {name.replace("encoder.vision", "encoder.image.vision") for name in LEARNED}
VILBERT = {name.replace("encoder.vision", "encoder.vit.vision") for name in LEARNED}
TOWERS = {f"encoder.{tower}.model.embeddings.position_embedding.weight" for tower in ("vision", "text")}
SIGLIP, BERT = TOWERS | {"encoder.vision.pool.probe"}, {"encoder.text.model.embeddings.position_embeddings.weight"}
BRIVL = BERT | {f"encoder.{tower}.pool.probe" for tower in ("vision", "text")}
EXEMPT = {
    **{"tiny": LEARNED, "tiny_vlmo": VLMO, "beit3": LEARNED, "vlmo": VLMO, "vilt": LEARNED},
    **dict.fromkeys(("albef", "tiny_albef", "blip", "tiny_blip", "depths", "tiny_depths"), ALBEF),
    **{"clip": TOWERS, "siglip": SIGLIP, "resnet50": BERT, "align": BERT},
    **dict.fromkeys(("vilbert", "tiny_vilbert", "uniter", "tiny_uniter"), VILBERT),
    **{"late": TOWERS, "tiny_late": TOWERS, "brivl": BRIVL},
}
TINY_TOWERS = {"clip": TOWERS, "siglip": SIGLIP, "resnet_bert": BERT, "align": BERT, "brivl": BRIVL}
TOKENIZER_EXEMPT = {
    f"tokenizer.{part}.{name}" for part in ("encoder", "decoder") for name in ("class_row", "positions")
}


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(recipes.__path__) if m.name[0] != "_"])
def test_what_every_recipes_models_exempt_from_decay(name):
    recipe = find_recipe(name)
    for stage_name, stage in recipe.stages.items():
        with torch.device("meta"):
            task = stage.task.build(recipe.model_of(stage), stage, PLAIN, None)
        parameters = dict(task.named_parameters())
        decayed = {key for key, parameter in parameters.items() if decays(key, parameter)}
        exempt = {key for key, parameter in parameters.items() if parameter.dim() > 1} - decayed
        listed = TOKENIZER_EXEMPT if stage_name == "tokenizer" else EXEMPT.get(name) or EXEMPT[name.split("_")[0]]
        listed = TINY_TOWERS[stage_name] if name == "tiny_towers" else listed
        absent = [part for kind, part in (("vision", "vision_"), ("language", "text_")) if kind not in stage.experts]
        built = {key for key in listed if not any(part in key for part in absent)}
        assert exempt == built, stage_name
        assert all(key.endswith(".weight") and parameters[key].dim() > 1 for key in decayed), stage_name


@pytest.mark.parametrize("name", ["tiny_vlmo", "vlmo_base", "vlmo_large"])
def test_tables_of_relative_positions_can_say_where_a_row_stands(name):
    """They begin at 0 and are all that says so, and Adam moves a number by about its rate in a step. Those of tiny_vlmo
    once came 0.3 far, which changes odds by a third, and its words were filled in as from a bag."""
    recipe = find_recipe(name)
    for stage_name in {"vision", "language", "fusion", "published"} & recipe.stages.keys():
        stage = recipe.stages[stage_name]
        with torch.device("meta"):
            task = stage.task.build(recipe.model_of(stage), stage, PLAIN, None)
        (table,) = [key for key, _ in task.named_parameters() if key.endswith("relative_position.table")]
        assert stage.trains(table), stage_name
        task.requires_grad_(False).get_parameter(table).requires_grad_(True)
        (group,) = parameter_groups(task, stage.optim)
        # The rate of every hundredth of the steps, for all of it.
        rates = [learning_rate(stage.optim, max(stage.steps * place // 100, 1), stage.steps) for place in range(100)]
        assert group["lr"] / stage.optim.lr * sum(rates) * stage.steps / 100 > 3, stage_name


def test_groups_are_few_and_hold_each_trainable_parameter_once():
    module = Named()
    module.words.requires_grad_(False)
    groups = parameter_groups(module, Optim(lr=0.1, weight_decay=0.2))
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_layer_decay_slows_the_lower_layers():
    module = Named()
    groups = parameter_groups(module, Optim(lr=1.0, layer_decay=0.5), layer_of=layer_of)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    named = dict(module.named_parameters())
    assert rate[id(named["head.weight"])] == 1.0
    assert rate[id(named["blocks.2.fc.weight"])] == 0.5
    assert rate[id(named["blocks.0.norm.bias"])] == 0.125
    assert rate[id(named["class_token"])] == rate[id(named["words.weight"])] == 0.0625
    # A frozen head still is the top: what a stage trains does not change a layer's rate.
    module.head.requires_grad_(False)
    module.logit_scale.requires_grad_(False)
    groups = parameter_groups(module, Optim(lr=1.0, layer_decay=0.5), layer_of=layer_of)
    assert max(group["lr"] for group in groups) == 0.5


def test_heads_may_learn_faster():
    task = nn.ModuleDict({"encoder": Named(), "objectives": nn.ModuleDict({"answering": nn.Linear(4, 2)})})
    groups = parameter_groups(task, Optim(lr=0.1, head_factor=20.0))
    rates = {id(value): group["lr"] for group in groups for value in group["params"]}
    for name, value in task.named_parameters():
        assert rates[id(value)] == pytest.approx(2.0 if name.startswith("objectives.") else 0.1)
    assert groups[0]["lr"] == 0.1 and len(groups) == 4  # the first one's rate is reported
    with pytest.raises(ValueError, match=r"head_factor=0 must be above 0"):
        Optim(head_factor=0)


def test_nothing_to_train_and_layer_decay_without_layers_are_refused():
    with pytest.raises(ValueError, match="trainable"):
        parameter_groups(Named().requires_grad_(False), Optim())
    with pytest.raises(ValueError, match=r"optim.layer_decay=0.5"):
        parameter_groups(Named(), Optim(layer_decay=0.5))


@pytest.mark.parametrize(
    ("wrong", "knob"),
    [
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "optim.min_lr=0.01"),
        ({"schedule": "step"}, "optim.schedule='step'"),
        ({"schedule": "wsd"}, "optim.decay_steps=0"),
        ({"decay_steps": 5}, "optim.schedule='cosine'"),
        ({"schedule": "wsd", "decay_steps": -1}, "optim.decay_steps=-1"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"layer_decay": 0.0}, "optim.layer_decay=0.0"),
        ({"clip": -1.0}, "optim.clip=-1.0"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1"),
    ],
)
def test_wrong_settings_name_the_knob(wrong, knob):
    with pytest.raises(ValueError) as error:
        Optim(**wrong)
    assert knob in str(error.value)
