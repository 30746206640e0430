"""Made-up global batches for models of 16-pixel pictures with 4-pixel patches, in as many equal parts as one likes."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.batch import PAD, Batch, Layout, make_batch

FIRST_WORD, CODES = 4, 20  # ids below are special; codes of pictures
Mix = tuple[int, int, int]  # images, pairs and texts of a global batch


def step_layout(mix: Mix, parts: int) -> Layout:
    images, pairs, texts = (count // parts for count in mix)
    return Layout(images, pairs, texts, patches=17, pair_len=8, text_len=10)


def step_batch(mix: Mix, step: int, part: int, parts: int, *, depth: int, vocab: int) -> Batch:
    """Part `part` of `parts` equal ones of the step's global batch, with dice for drop path in `depth` blocks. In place
    of a hidden word stands the last of `vocab` ids or another word."""
    made = torch.Generator().manual_seed(step)
    images, pairs, texts = mix

    def text(count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.randint(FIRST_WORD, vocab, (count, length), generator=made)
        masked = torch.rand(count, length, generator=made) < 0.4
        for row in range(count):  # padding of different lengths
            ids[row, length - row % 3 :] = PAD
            masked[row, length - row % 3 :] = False
        others = torch.randint(FIRST_WORD, vocab, (count, length), generator=made)
        others[torch.rand(count, length, generator=made) < 0.5] = vocab - 1
        return ids, torch.where(masked, others, ids), masked

    def share(whole: Tensor, *counts: int) -> Tensor:
        return torch.cat([kind.chunk(parts)[part] if len(kind) else kind for kind in whole.split(list(counts))])

    count = images + pairs
    pixels = torch.randint(256, (count, 3, 16, 16), generator=made, dtype=torch.uint8)
    image_masks = torch.rand(count, 16, generator=made) < 0.4
    codes = torch.randint(CODES, (count, 16), generator=made)
    (pair_ids, pair_inputs, pair_masked), (text_ids, text_inputs, text_masked) = text(pairs, 8), text(texts, 10)
    noise = torch.rand(sum(mix), 2 * depth, generator=made)
    return make_batch(
        step_layout(mix, parts),
        images=share(pixels, images, pairs),
        image_masks=share(image_masks, images, pairs),
        image_codes=share(codes, images, pairs),
        pair_tokens=share(pair_ids, pairs),
        pair_inputs=share(pair_inputs, pairs),
        pair_masked=share(pair_masked, pairs),
        text_tokens=share(text_ids, texts),
        text_inputs=share(text_inputs, texts),
        text_masked=share(text_masked, texts),
        noise=share(noise, *mix),
    )
