"""Rows of each kind of sequence in a batch of all kinds, against those of a batch that has the kind alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.batch import PAD, Batch, Layout, make_batch


def check_alone(encoder: nn.Module, batch: Batch) -> tuple[Any, Batch]:
    """Images, pairs and texts (their first row, which is read) come out of `batch` as they do alone -> the rows of
    `batch`, and its pairs as a batch of their own."""
    rows, layout = encoder(batch), batch.layout
    pairs = make_batch(
        Layout(pairs=layout.pairs, patches=layout.patches, pair_len=layout.pair_len),
        images=batch.images[layout.images :], image_masks=batch.image_masks[layout.images :],
        pair_tokens=batch.pair_tokens, pair_inputs=batch.pair_inputs,
    )  # fmt: skip
    images = make_batch(
        Layout(images=layout.images, patches=layout.patches),
        images=batch.images[: layout.images], image_masks=batch.image_masks[: layout.images],
    )  # fmt: skip
    texts = make_batch(
        Layout(texts=layout.texts, text_len=layout.text_len),
        text_tokens=batch.text_tokens, text_inputs=batch.text_inputs,
    )  # fmt: skip
    real = batch.pair_inputs != PAD
    torch.testing.assert_close(encoder(pairs).pair_texts[real], rows.pair_texts[real])
    torch.testing.assert_close(encoder(pairs).pair_images, rows.pair_images)
    torch.testing.assert_close(encoder(images).images, rows.images)
    torch.testing.assert_close(encoder(texts).texts[:, 0], rows.texts[:, 0])
    return rows, pairs
