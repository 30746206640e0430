from __future__ import annotations

import pytest

from pretrain.config import BatchSize, Stage
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.reconstruction import Reconstruction
from pretrain.evals.retrieval import Retrieval
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
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
