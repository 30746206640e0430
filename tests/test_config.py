from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config import BatchSize, Recipe, Stage, to_json
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
from pretrain.parallel.sizes import Parallel
from pretrain.recipes import built_in_recipes, find_recipe, load_recipe
from pretrain.run.identity import stage_hash
from pretrain.settings import set_values
from pretrain.tasks.tokenizer import TrainTokenizer
from tests.toy_models import PAPER, VQ


@pytest.mark.parametrize("name", built_in_recipes())
def test_every_recipe_loads_and_its_stages_hang_together(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    for stage in recipe.stages.values():
        for other in (stage.init_from, stage.visual_tokenizer):
            assert other is None or other in recipe.stages or other.startswith("$")  # a file of the user's


def test_beit3_pretrains_with_the_published_numbers():
    stage = find_recipe("beit3_giant").stages["pretrain"]
    assert (stage.batch.images, stage.batch.pairs, stage.batch.texts) == (2048, 2048, 2048)
    assert stage.steps == 1_000_000 and stage.drop_path == 0.1
    optim = stage.optim
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay) == (1e-3, (0.9, 0.98), 1e-6, 0.05)
    assert (optim.warmup_steps, optim.clip, optim.schedule) == (10_000, 3.0, "cosine")
    (masked,) = stage.objectives
    assert (masked.image_ratio, masked.text_ratio, masked.pair_text_ratio) == (0.4, 0.15, 0.5)


def test_settings_are_typed_and_reach_every_depth():
    recipe, stage = load_recipe(
        "tiny",
        "fusion",
        [
            "optim.lr=3e-4",
            "steps=1e2",
            "optim.betas=0.8,0.9",
            "objectives.0.image_ratio=0.5",
            "seed=7",
            "model.dim=64",
            "mix.pairs.text_len=16",
            "init_from=null",
            "loading.cache_dir=/tmp/x",
            "model.heads=2",
        ],
    )
    assert stage.optim == replace(stage.optim, lr=3e-4, betas=(0.8, 0.9))
    assert stage.steps == 100 and isinstance(stage.steps, int)
    assert stage.objectives[0].image_ratio == 0.5
    assert stage.init_from is None
    assert (recipe.seed, recipe.model.dim, recipe.loading.cache_dir) == (7, 64, "/tmp/x")
    assert stage.mix["pairs"].text_len == 16
    several = load_recipe("tiny", "vision", ['mix.images.shards=["/a","/b"]', 'init_from="x"'])[1]
    assert several.mix["images"].shards == ("/a", "/b") and several.init_from == "x"
    assert load_recipe("tiny", "fusion")[1].optim.lr != 3e-4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.learning_rate=1", "there is no 'learning_rate' here; known: .*lr"),
        ("optmi.lr=1", "did you mean optim"),
        ("optim.warmup=1", "did you mean warmup_steps"),
        ("optim.lr=fast", "wanted float"),
        ("steps=1.5", "wanted int"),
        ("steps=1e999", "wanted int"),
        ("trace_samples=3", "wanted bool"),
        ("log_every=0", "log_every=0 is below 1"),
        ("save_every=0", "save_every=0 is below 1"),
        ("keep=0", "keep=0 is below 1"),
        ("keep_every=-1", "keep_every=-1 is below 0"),
        ("seed=1e30", "seed=.*whole number"),
        ("seed=-1", "seed=-1.*whole number"),
        ("batch.accumulation=0", "batch.accumulation=0 is below 1"),
        ("batch.pairs=-8", "batch.pairs=-8 is below 0"),
        ("model.attention=both", "wanted shared or per_modality"),
        ("stages=3", r"wanted dict; it is .{100}\.\.\. in the recipe"),
        ("evals.0.samples=0", "samples=0 is below 1"),
        ("optim.betas=0.9", "wanted tuple"),
        ("optim.lr", "has no '='"),
        ("optim.lr=-1", "must be above 0"),
        ("steps.more=1", "has no parts"),
        ("mix.videos.shards=x", "there is no 'videos'"),
        ("drop_path=1.0", r"drop_path=1\.0 is not a rate"),
        ("activation_checkpointing=-1", "activation_checkpointing=-1 is wrong"),
        ("objectives.0.image_codes=0", "image_codes=0 is wrong"),
        # What had another name or place.
        ("model.drop_path=0.1", "model.drop_path: that is now drop_path of the stage"),
        ("model.activation_checkpointing=1", "that is now activation_checkpointing of the stage"),
        ("model.image_codes=16", "is now image_codes of the objective MaskedData .*--set objectives.0.image_codes=N"),
        ("teacher=clip:x", r"that is now task=TrainTokenizer\(teacher=...\) of the stage, with .* Clip\(DIR\)"),
        ("tokenizer.codes=16", r"that is now model=VQKDConfig\(...\)"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_the_way_out(setting, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe("tiny", "fusion", [setting])
    assert "\n" not in str(caught.value)


def test_unknown_recipes_and_stages_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean beit3_base"):
        load_recipe("beit3_bas", "vision")
    with pytest.raises(ValueError, match="did you mean vision"):
        load_recipe("tiny", "visoin")
    with pytest.raises(ValueError, match="no such file that ends in"):
        load_recipe("somewhere/else.py", "vision")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch):
    """Loads a recipe file of these lines, which lies outside the repository."""
    monkeypatch.chdir(tmp_path)

    def load(*lines: str) -> Recipe:
        Path("mine.py").write_text("from dataclasses import replace\n" + "".join(f"{line}\n" for line in lines))
        return load_recipe("./mine.py", "vision")[0]

    return load


def test_a_recipe_may_lie_outside_the_repository(mine, tmp_path):
    tiny = "from pretrain.recipes.tiny import RECIPE"
    assert mine(tiny, "RECIPE = replace(RECIPE, name='mine')").name == "mine"
    assert load_recipe(str(tmp_path / "mine.py"), "vision")[0].name == "mine"
    own = ("from dataclasses import dataclass", "@dataclass(frozen=True)", "class Mine:", "    weight: 'float' = 1.0")
    assert mine(*own, tiny).name == "tiny"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["x = 1"], "defines no RECIPE"),
        (["int('x')"], r"--recipe \./mine\.py, line 2: invalid literal"),
        (["from pretrain.recipes.tiny import VISION", "replace(VISION, optim=None)"],
         r"line 3: optim=None is wrong; use Optim"),
        (["RECIPE = ("], "line 2: SyntaxError"),
        # What had another name or place.
        (["from pretrain.models.multiway.config import MultiwayConfig", "MultiwayConfig(image_codes=16)"],
         r"line 3: TypeError: .*image_codes'; that is now image_codes of the objective MaskedData"),
        (["from pretrain.models.multiway.sizes import BEIT3_BASE", "replace(BEIT3_BASE, drop_path=0.1)"],
         r"line 3: .*drop_path'; that is now drop_path of the stage"),
        (["from pretrain.recipes.tiny import VISION", "replace(VISION, teacher='pixels')"],
         r"line 3: .*teacher'; that is now task=TrainTokenizer"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_file_is_one_sentence_with_its_line(mine, lines, says):
    with pytest.raises(ValueError, match=says):
        mine(*lines)


IMAGES, TEXTS, DUAL = {"images": ImageShards("a")}, {"texts": TextShards("b")}, {"dual": PairShards("c")}
MASKED, TEXT_ONLY = (MaskedData(),), (MaskedData(image_ratio=0, pair_image_ratio=0),)
CONTRASTIVE = (Contrastive(),)


def stage(mix=IMAGES, objectives=MASKED, *, accumulation: int = 1, **options) -> Stage:
    batch = BatchSize(**dict.fromkeys(mix, 4), accumulation=accumulation)
    return Stage(**{"mix": mix, "batch": batch, "optim": Optim(), "steps": 1, "objectives": objectives} | options)


@pytest.mark.parametrize(
    ("mix", "objectives", "options", "says"),
    [
        (IMAGES, MASKED, {"batch": BatchSize(pairs=4)}, "batch asks for"),
        ({"texts": ImageShards("a")}, MASKED, {}, r"mix\.texts=ImageShards\(...\) is wrong .* fills images"),
        (IMAGES, TEXT_ONLY, {}, "hides nothing of the mix's images"),
        (DUAL, CONTRASTIVE, {"accumulation": 2}, "accumulation=1"),
        (IMAGES, CONTRASTIVE, {}, "contrastive needs dual in the mix"),
        (DUAL, CONTRASTIVE, {"parallel": Parallel(pipe=2)}, r"parallel\.pipe=2 does not go .* contrastive"),
    ],
)
def test_a_stage_checks_itself(mix, objectives, options, says):
    assert stage(IMAGES | TEXTS, TEXT_ONLY) and stage(DUAL, CONTRASTIVE)
    with pytest.raises(ValueError, match=says):
        stage(mix, objectives, **options)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"objectives": ()}, "no objectives; give at least one"),
        ({"objectives": (MaskedData(), MaskedData(0.1))}, "objectives: masked stands there twice"),
        ({"task": TrainTokenizer(), "objectives": ()}, "does not go with a MultiwayConfig"),
        ({"task": TrainTokenizer(), "model": VQ}, "leave out objectives"),
        ({"task": TrainTokenizer(), "model": VQ, "objectives": (), "compile": True}, "set compile=false"),
    ],
)
def test_a_recipe_asks_the_task_of_each_stage(wrong, says):
    right = stage(task=TrainTokenizer(), model=VQ, objectives=())
    assert Recipe("mine", PAPER, {"right": right, "masked": stage()}).model_of(right) is VQ
    with pytest.raises(ValueError, match=f"stage wrong: .*{says}"):
        Recipe("mine", PAPER, {"right": right, "wrong": stage(**wrong)})


def test_the_hash_sees_what_changes_numbers_and_nothing_else():
    recipe, stage = load_recipe("tiny", "vision")
    same = load_recipe("tiny", "vision", ["loading.workers=7", "log_every=3"])
    assert stage_hash(recipe, stage) == stage_hash(*same)
    for setting in ("optim.lr=1e-5", "seed=3", "model.dim=64", "steps=7", "loading.streams=3"):
        assert stage_hash(recipe, stage) != stage_hash(*load_recipe("tiny", "vision", [setting])), setting


def test_json_says_which_class_each_part_was():
    text = to_json(find_recipe("tiny"))
    assert text["stages"]["retrieval"]["objectives"][0]["class"] == "Contrastive"


def test_changes_leave_the_original_alone():
    old = Optim()
    assert set_values(old, {"lr": "1e-4"}).lr == 1e-4 and old.lr == 1e-3


def test_changes_that_are_valid_only_together_are_made_together():
    recipe, _ = load_recipe("tiny", "vision", ["model.dim=24", "model.heads=3", "model.dim=36"])
    assert (recipe.model.dim, recipe.model.heads) == (36, 3)
    with pytest.raises(ValueError, match="parts of it are set too"):
        load_recipe("tiny", "vision", ["optim.lr=1", "optim=2"])
