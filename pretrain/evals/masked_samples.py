"""The report's samples of masked data modeling: pictures and captions, whole, hidden, and as predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.batch import BOS, EOS, PAD, Batch
from pretrain.evals.trained import Trained, uint8_pictures

SHOWN = 8
SPECIALS = (BOS, PAD, EOS)
Predictions = dict[str, tuple[Tensor, Tensor]]


def masked_samples(trained: Trained, batch: Batch, predictions: Predictions) -> list[dict]:
    """A few entries for samples.json: pairs, each with its picture and its text; else pictures and texts alone."""
    layout = batch.layout
    pairs = [*range(layout.images, layout.images + layout.pairs)][:SHOWN]
    images = [*range(layout.images)][:SHOWN]
    if layout.pairs:
        # If no patch of pairs is hidden, a few pictures alone show the predictions of hidden patches.
        hidden = batch.image_masks[layout.images :].any()
        shown = _words(trained, batch, predictions, "pair")
        for entry, picture in zip(shown, _pictures(trained, batch, predictions, pairs), strict=False):
            entry |= picture
        return shown + ([] if hidden else _pictures(trained, batch, predictions, images[: SHOWN // 2]))
    return _pictures(trained, batch, predictions, images) + _words(trained, batch, predictions, "text")


def _pictures(trained: Trained, batch: Batch, predictions: Predictions, chosen: list[int]) -> list[dict]:
    """Each chosen picture; and, if patches of it were hidden, the picture with them greyed out, and with the
    predictions drawn in."""
    pictures, drawn = uint8_pictures(batch.images), _drawn(trained, batch, predictions)
    entries = []
    for i in chosen:
        entry = {"input": trained.save_picture(pictures[i], f"input{i}")}
        if batch.image_masks[i].any():
            mask = _pixels(batch.image_masks[i], pictures.shape[-1])
            entry["masked"] = trained.save_picture(pictures[i].masked_fill(mask, 128), f"masked{i}")
            if drawn is not None:
                prediction = torch.where(mask, drawn[i], pictures[i])
                entry["predicted"] = trained.save_picture(prediction, f"predicted{i}")
        entries.append(entry)
    return entries


def _drawn(trained: Trained, batch: Batch, predictions: Predictions) -> Tensor | None:
    """Every picture drawn from its codes, with hidden codes as predicted: uint8 [N, 3, H, W]. None if codes cannot be
    drawn."""
    if trained.draw_codes is None or batch.image_codes is None:
        return None
    codes = batch.image_codes.clone()
    split = [batch.layout.images, batch.layout.pairs]
    kinds = zip(("image", "pair_image"), codes.split(split), batch.image_masks.split(split), strict=True)
    for part, code, mask in kinds:
        if part in predictions:
            code[mask] = predictions[part][0]  # a view: fills `codes`
    return trained.draw_codes(codes)


def _words(trained: Trained, batch: Batch, predictions: Predictions, kind: str) -> list[dict]:
    """For the first pairs or texts: the words, the words with gaps, and the gaps filled in."""
    tokens, masked = getattr(batch, f"{kind}_tokens"), getattr(batch, f"{kind}_masked")
    part = "pair_text" if kind == "pair" else "text"
    if trained.text is None or part not in predictions:
        return []
    filled = tokens.clone()
    filled[masked] = predictions[part][0]
    return [
        {
            "caption": trained.text.decode(tokens[i].tolist()),
            "masked_caption": with_gaps(trained.text, tokens[i].tolist(), masked[i].tolist()),
            "predicted_caption": trained.text.decode(filled[i].tolist()),
        }
        for i in range(min(SHOWN, len(tokens)))
    ]


def with_gaps(text: Any, ids: list[int], masked: list[bool]) -> str:
    """A caption with a gap for each hidden piece."""
    shown = [(i, hidden) for i, hidden in zip(ids, masked, strict=True) if hidden or i not in SPECIALS]
    pieces = [" ___" if hidden else text.token(i) for i, hidden in shown]
    return "".join(pieces).replace("\u2581", " ").strip()


def _pixels(mask: Tensor, side: int) -> Tensor:
    """bool [P] of patches -> bool [H, W] of pixels."""
    grid = round(len(mask) ** 0.5)
    return mask.view(grid, grid).repeat_interleave(side // grid, 0).repeat_interleave(side // grid, 1)
