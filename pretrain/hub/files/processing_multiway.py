"""Pictures and texts as a Multiway encoder reads them, for transformers. Needs Pillow, sentencepiece and torch."""

import json
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

BOS, PAD, EOS, UNK = 0, 1, 2, 3  # as transformers.XLMRobertaTokenizer has them: piece i is i + 1, <mask> the last
FILES = {"text_model": "text.model", "config": "processor_config.json"}


class MultiwayProcessor:
    """`processor(images=..., text=...)` -> the tensors that MultiwayModel takes."""

    def __init__(self, image_size, max_text_len, evaluation="squash", text_model=None):
        self.image_size, self.max_text_len, self.evaluation = image_size, max_text_len, evaluation
        self.pieces: Any = None
        if text_model is not None:
            from sentencepiece import SentencePieceProcessor

            self.pieces = SentencePieceProcessor(model_file=text_model)

    @classmethod
    def from_pretrained(cls, place, **options):
        from transformers.utils import cached_file

        known = ("cache_dir", "revision", "token", "local_files_only")
        options = {name: options[name] for name in known if name in options}
        with open(cached_file(place, FILES["config"], **options)) as file:
            config = json.load(file)
        text = cached_file(place, FILES["text_model"], **options) if config["has_text"] else None
        return cls(config["image_size"], config["max_text_len"], config["evaluation"], text)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """What AutoProcessor calls; there is nothing to do."""

    def __call__(self, images=None, text=None):
        """PIL pictures (or one), texts (or one) -> {"pixel_values", "input_ids", "attention_mask"}."""
        out = {}
        if images is not None:
            pictures = images if isinstance(images, list | tuple) else [images]
            out["pixel_values"] = torch.stack([self.picture(picture) for picture in pictures])
        if text is not None:
            out |= self.texts([text] if isinstance(text, str) else text)
        return out

    def picture(self, picture):
        """-> float32 [3, S, S] in [-1, 1]."""
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture, size = picture.convert("RGB"), self.image_size
        if self.evaluation == "crop":
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(127.5).sub(1)

    def texts(self, texts):
        """Cut at max_text_len ids."""
        if self.pieces is None:
            raise ValueError(
                f"these weights came without a text tokenizer; put theirs beside them as {FILES['text_model']}"
            )
        ids = [[i + 1 if i else UNK for i in self.pieces.encode(text)][: self.max_text_len - 2] for text in texts]
        ids = [[BOS, *own, EOS] for own in ids]
        padded = torch.full((len(ids), max(map(len, ids))), PAD)
        for row, own in zip(padded, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        return {"input_ids": padded, "attention_mask": (padded != PAD).long()}

    @property
    def mask_id(self):
        return len(self.pieces) + 1

    def decode(self, ids):
        """The text of some ids, without specials."""
        return self.pieces.decode([int(i) - 1 for i in ids if UNK < i < self.mask_id])

    def save_pretrained(self, place, **_):
        raise NotImplementedError(f"copy {', '.join(FILES.values())} and the .py files to {os.fspath(place)}")
