"""A run that began before contracts.py goes on and is evaluated: run_of_2026_11_21.tar.gz holds its pictures, its
visual tokenizer, and the stage `vision` as a kill after the checkpoint of step 2 left it. Its last steps were

    step 3: loss 2.757319688796997, gradient norm 1.3194570541381836      step 4: 2.728726863861084, 1.146615743637085
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from pretrain import evaluate
from pretrain.checkpoint.weights import weights_header
from tests.small_run import Ranks, command

ARCHIVE = Path(__file__).with_name("run_of_2026_11_21.tar.gz")
# The recipe of that run, in today's terms.
RECIPE = """
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.mixture import Loading
from pretrain.data.sources import ImageShards
from pretrain.data.transforms import ImageTransform
from pretrain.evals.masked import MaskedAccuracy
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
from pretrain.tasks.tokenizer import TrainTokenizer

IMAGES = ImageShards("$DATA/images")
COMMON = {"mix": {"images": IMAGES}, "batch": BatchSize(images=8), "optim": Optim(lr=1e-3, warmup_steps=2), "steps": 4,
          "transform": ImageTransform(size=16, scale=(0.8, 1.0), jitter=0.1)}
VQ = VQKDConfig(dim=16, depth=1, heads=2, decoder_depth=1, image_size=16, patch_size=4, codes=16, code_dim=4,
                target_dim=48, distill="mse")
RECIPE = Recipe(
    name="small",
    model=MultiwayConfig(dim=32, depth=2, heads=2, ffn_dim=64, image_size=16, patch_size=4, vocab_size=64,
                         max_text_len=16, fusion_layers=1, init_std=0.1),
    text_tokenizer="$DATA/text.model", log_every=1, save_every=2,
    loading=Loading(workers=0, streams=4, block_shards=2),
    stages={
        "tokenizer": Stage(model=VQ, task=TrainTokenizer(), **COMMON),
        "vision": Stage(experts=("vision",), objectives=(MaskedData(image_codes=16),), visual_tokenizer="tokenizer",
                        evals=(MaskedAccuracy({"images": IMAGES}, batch=8),), **COMMON),
    },
)
"""


@pytest.fixture
def old_run(tmp_path, monkeypatch) -> Path:
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "data" / "recipe.py").write_text(RECIPE)
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    return tmp_path / "run"


def start(run: Path, stage: str, *settings: str) -> tuple[int | None, str]:
    """-> its exit code and what it said. In a process of its own: training leaves a process group behind."""
    data, log = run.parent / "data", run.parent / "log"
    log.unlink(missing_ok=True)
    (code,) = Ranks(command(data, run, stage, *settings), data, 1, log).wait(60)
    return code, log.read_text()


def test_it_goes_on_from_its_checkpoint_and_is_evaluated(old_run):
    noted = json.loads((old_run / "vision/recipe.json").read_text())["identity"]
    code, said = start(old_run, "vision")
    assert code == 0 and "resumed from" in said
    lines = [json.loads(line) for line in (old_run / "vision/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines[2:]] == pytest.approx([2.757319688796997, 2.728726863861084], rel=1e-5)
    assert [line["grad_norm"] for line in lines[2:]] == pytest.approx([1.3194570541381836, 1.146615743637085], rel=1e-4)
    # It is still the run that it was: the same identity, and the hash that the old program gave it.
    assert json.loads((old_run / "vision/recipe.json").read_text())["identity"] == noted
    assert weights_header(old_run / "vision/weights.safetensors")["config"]["recipe_hash"] == "a8bb423a8e66e2dd"
    code, said = start(old_run, "vision")
    assert code == 0 and "finished before" in said
    line = ["--run-dir", str(old_run), "--stage", "vision", "--recipe", str(old_run.parent / "data" / "recipe.py")]
    assert evaluate.main(line) == 0
    scores = json.loads((old_run / "vision/eval.json").read_text())
    # The old program said 31 / 192: it counted the picture twice that fills up the last batch.
    assert scores["masked/image/baseline"] == pytest.approx(100 * 28 / 180)


@pytest.mark.parametrize(
    ("stage", "settings", "code", "says"),
    [
        ("vision", ["optim.lr=2e-3"], 2, "optim.lr=0.001 (now 0.002)"),
        ("tokenizer", [], 0, "tokenizer: finished before"),
        ("tokenizer", ["model.beta=0.5"], 2, "model.beta=1.0 (now 0.5)"),
    ],
)
def test_a_changed_setting_is_named_and_its_finished_tokenizer_is_known(old_run, stage, settings, code, says):
    result, said = start(old_run, stage, *settings)
    assert result == code and says in said
