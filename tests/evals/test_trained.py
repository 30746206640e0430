from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import BatchSize, Stage
from pretrain.contracts import Evaluation
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.reconstruction import Reconstruction
from pretrain.evals.retrieval import Retrieval
from pretrain.evals.trained import Trained
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
from pretrain.run.trained import evaluate
from tests.toy_models import VQ

IMAGES, PAIRS, TEXTS = ImageShards("x"), PairShards("x"), {"texts": TextShards("x")}


def stage(*evaluations, **options) -> Stage:
    return Stage({"images": IMAGES}, BatchSize(images=4), Optim(), steps=1, evals=evaluations, **options)


@pytest.mark.parametrize(
    ("evaluation", "objectives", "says"),
    [
        (MaskedAccuracy(TEXTS), (), "needs the objective masked, and this stage has none"),
        (Retrieval(PAIRS), (MaskedData(),), "needs the objective contrastive, and this stage has masked"),
        (Reconstruction(IMAGES), (MaskedData(),), "trains a visual tokenizer"),
    ],
)
def test_an_evaluation_of_another_stages_kind_is_refused(evaluation, objectives, says):
    with pytest.raises(ValueError, match=says):
        stage(evaluation, objectives=objectives)
    assert stage(MaskedAccuracy(TEXTS), objectives=(MaskedData(),)) and stage(Reconstruction(IMAGES), model=VQ)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"batch": 0}])
@pytest.mark.parametrize(("kind", "data"), [(Retrieval, PAIRS), (MaskedAccuracy, TEXTS), (Reconstruction, IMAGES)])
def test_no_sample_is_no_evaluation(kind, data, wrong):
    with pytest.raises(ValueError, match="=0 is below 1"):
        kind(data, **wrong)


class Fixed(Evaluation):
    """Says what it is told, and draws a picture."""

    def __init__(self, **values: float):
        self.values = values

    def run(self, trained):
        shown = trained.save_picture(torch.full((3, 2, 2), int(self.values["right"]), dtype=torch.uint8), "x")
        return {f"set/{name}": value for name, value in self.values.items()}, {"set": [shown]}


class Other(Fixed):
    pass


def test_two_evaluations_of_one_kind_both_have_their_figures(tmp_path):
    trained = Trained(torch.nn.Module(), torch.device("cpu"), tmp_path, *[None] * 6)  # type: ignore[arg-type]
    several = (Fixed(right=1.0), Fixed(right=2.0, more=5.0), Other(right=3.0))
    metrics, samples = evaluate(SimpleNamespace(evals=several), trained)  # type: ignore[arg-type]
    assert metrics == {"set/right": 1.0, "set#2/right": 2.0, "set#2/more": 5.0, "set#3/right": 3.0}
    assert samples == {"set": ["samples/x.png"]} and np.asarray(Image.open(tmp_path / "samples" / "x.png")).max() == 3
    alone, _ = evaluate(SimpleNamespace(evals=(Fixed(right=1.0), Fixed(right=2.0))), trained)  # type: ignore[arg-type]
    assert alone == {"set/right": 1.0, "set#2/right": 2.0}
    assert np.asarray(Image.open(tmp_path / "samples" / "x.png")).max() == 1, "its pictures are the first one's"
