from __future__ import annotations

import pytest

from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.reconstruction import Reconstruction
from pretrain.evals.retrieval import Retrieval
from tests.evals.test_masked_samples import trained


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        (MaskedAccuracy({"texts": TextShards("x")}), "needs the objective masked, and this stage has none"),
        (Retrieval(PairShards("x")), "needs the objective contrastive"),
        (Reconstruction(ImageShards("x")), "trains a visual tokenizer"),
    ],
)
def test_an_evaluation_of_another_stages_kind_is_refused(tmp_path, evaluation, says):
    with pytest.raises(ValueError, match=says):
        evaluation.run(trained(tmp_path))


def test_no_sample_is_no_evaluation():
    for wrong in ({"samples": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="=0 is below 1"):
            Retrieval(PairShards("x"), **wrong)
        with pytest.raises(ValueError, match="=0 is below 1"):
            MaskedAccuracy({"texts": TextShards("x")}, **wrong)
