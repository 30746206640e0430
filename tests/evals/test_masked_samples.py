from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pretrain.batch import Layout, make_batch
from pretrain.evals.masked_samples import masked_samples, with_gaps
from pretrain.evals.trained import Trained


class Words:
    """A text tokenizer of three words."""

    def token(self, i: int) -> str:
        return {4: "\u2581red", 5: "\u2581dog", 6: "s"}[i]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.token(i) for i in ids if i > 3).replace("\u2581", " ").strip()


def draw_codes(codes: torch.Tensor) -> torch.Tensor:
    """A patch of 4 x 4 pixels of the colour 50 * code for each code of 2 x 2."""
    return (codes.view(-1, 1, 2, 2).repeat(1, 3, 1, 1) * 50).byte().repeat_interleave(4, 2).repeat_interleave(4, 3)


def trained(directory) -> Trained:
    return Trained(
        task=torch.nn.Identity(),
        device=torch.device("cpu"),
        directory=directory,
        loader=lambda *a: None,
        with_codes=lambda batch: batch,
        draw_codes=draw_codes,
        samples_of=lambda source: 1,
        masking=None,
        text=Words(),
    )


def test_gaps_stand_where_pieces_were_hidden():
    assert with_gaps(Words(), [0, 4, 5, 6, 2, 1], [False, True, False, False, False, False]) == "___ dogs"


def test_only_hidden_patches_are_drawn_as_predicted(tmp_path):
    second = torch.tensor([[False, True, False, False]])
    batch = make_batch(
        Layout(pairs=1, patches=4, pair_len=4),
        images=torch.full((1, 3, 8, 8), 200, dtype=torch.uint8),
        image_masks=second,
        image_codes=torch.tensor([[1, 1, 1, 1]]),
        pair_tokens=torch.tensor([[0, 4, 5, 2]]),
        pair_masked=second,
    )
    predictions = {
        "pair_image": (torch.tensor([2]), torch.tensor([1])),
        "pair_text": (torch.tensor([5]), torch.tensor([4])),
    }
    (entry,) = masked_samples(trained(tmp_path), batch, predictions)
    assert entry["caption"] == "red dog" and entry["masked_caption"] == "___ dog"
    assert entry["predicted_caption"] == "dog dog"
    predicted = np.asarray(Image.open(tmp_path / entry["predicted"]))
    assert (predicted[:4, :4] == 200).all() and (predicted[:4, 4:] == 100).all()  # code 2 is drawn as 100
    assert (np.asarray(Image.open(tmp_path / entry["masked"]))[:4, 4:] == 128).all()


def test_a_whole_picture_is_shown_once_and_only_as_it_is(tmp_path):
    batch = make_batch(
        Layout(images=1, patches=4),
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        image_codes=torch.zeros(1, 4, dtype=torch.long),
    )
    (entry,) = masked_samples(trained(tmp_path), batch, {})
    assert set(entry) == {"input"}
