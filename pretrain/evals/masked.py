"""Masked accuracy on data that was not trained on, beside the baseline of always saying the most frequent answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import BOS, EOS, PAD, Batch
from pretrain.evals.trained import Trained, uint8_pictures

SHOWN = 8
SPECIALS = (BOS, PAD, EOS)


@dataclass(frozen=True)
class MaskedAccuracy:
    """Percent of hidden patches' codes and hidden words guessed right, by kind of sequence. The baseline is the best
    that a constant answer could reach on these very targets."""

    mix: dict[str, Any]
    samples: int = 512
    batch: int = 128

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        """-> percentages for eval.json, and what the report shows."""
        heads = trained.task.objectives["masked"]
        guesses: dict[str, list[Tensor]] = {}
        shown: list[dict] = []
        samples = min(self.samples, *(trained.samples_of(source) for source in self.mix.values()))
        for batch in trained.batches(self.mix, min(self.batch, samples), samples, masking=trained.masking):
            rows_TD = trained.task.encoder(batch)
            for part, pairs in heads.guesses(rows_TD, batch).items():
                guesses.setdefault(part, []).append(torch.stack(pairs).cpu())
            if not shown:
                shown = self._show(trained, batch, heads.guesses(rows_TD, batch))
        metrics: dict[str, float] = {}
        for part, found in guesses.items():
            guess, target = torch.cat(found, dim=1)
            if len(target):
                metrics[f"masked/{part}/accuracy"] = 100 * (guess == target).double().mean().item()
                metrics[f"masked/{part}/baseline"] = 100 * target.bincount().max().item() / len(target)
        return metrics, {"masked": shown}

    def _show(self, trained: Trained, batch: Batch, guesses: dict[str, tuple[Tensor, Tensor]]) -> list[dict]:
        """Pictures and captions as they are, as the encoder reads them, and as it guesses them."""
        layout = batch.layout
        shown = []
        pictures = uint8_pictures(batch.images)
        drawn = self._draw_guesses(trained, batch, guesses)
        # Pairs tell the most: their picture and their caption belong together.
        first = layout.images if layout.pairs else 0
        for i in range(first, min(first + SHOWN, len(pictures))):
            hidden = _hide(pictures[i], batch.image_masks[i], layout.patches)
            shown.append({
                "input": trained.save_picture(pictures[i], f"input{i}"),
                "masked": trained.save_picture(hidden, f"masked{i}"),
                "predicted": trained.save_picture(drawn[i], f"predicted{i}") if drawn is not None else None,
            })  # fmt: skip
        kind = "pair" if layout.pairs else "text"
        tokens, masked = getattr(batch, f"{kind}_tokens"), getattr(batch, f"{kind}_masked")
        if trained.text is None or (f"{kind}_text" not in guesses and kind not in guesses):
            return shown
        filled = tokens.clone()
        filled[masked] = guesses["pair_text" if kind == "pair" else "text"][0]
        for i in range(min(SHOWN, len(tokens))):
            words = {
                "caption": trained.text.decode(tokens[i].tolist()),
                "masked_caption": with_gaps(trained.text, tokens[i].tolist(), masked[i].tolist()),
                "predicted_caption": trained.text.decode(filled[i].tolist()),
            }
            if kind == "pair" and i < len(shown):
                shown[i] |= words
            else:
                shown.append(words)
        return shown

    def _draw_guesses(self, trained: Trained, batch: Batch, guesses: dict) -> Tensor | None:
        if trained.draw_codes is None or batch.image_codes is None or not batch.image_masks.any():
            return None
        codes = batch.image_codes.clone()
        split = [batch.layout.images, batch.layout.pairs]
        for part, code, mask in zip(
            ("image", "pair_image"), codes.split(split), batch.image_masks.split(split), strict=True
        ):
            if part in guesses:
                code[mask] = guesses[part][0]  # a view: fills `codes`
        return trained.draw_codes(codes)


def with_gaps(text: Any, ids: list[int], masked: list[bool]) -> str:
    """A caption with a gap for each hidden piece."""
    pieces = [" ___" if hidden else text.token(i) for i, hidden in zip(ids, masked, strict=True) if i not in SPECIALS]
    return "".join(pieces).replace("\u2581", " ").strip()


def _hide(picture: Tensor, mask: Tensor, patches: int) -> Tensor:
    """uint8 [3, H, W] with its hidden patches greyed out."""
    grid = int((patches - 1) ** 0.5)
    size = picture.shape[-1] // grid
    pixels = mask.view(grid, grid).repeat_interleave(size, 0).repeat_interleave(size, 1)
    return picture.masked_fill(pixels, 128)
