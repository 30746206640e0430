"""What stands before the blocks of a model whose words ask a picture: the pictures' rows, and the embedded words."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import Batch, Layout, make_batch
from pretrain.models.multiway.embeddings import TextEmbedding
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.rows import sent


def encode_pictures(image: MultiwayEncoder, batch: Batch) -> Tensor:
    """All pictures of a batch, alone and of pairs, by a vision encoder: [images + pairs, image_len, dim]."""
    layout, shape = batch.layout, image.cfg
    only = Layout(images=layout.images + layout.pairs, patches=shape.patches)
    if not only.images:  # an evaluation of texts
        return image.blocks[0].norm["shared"].weight.new_zeros(0, only.image_len, shape.dim)
    own, host = make_batch(only, images=batch.images, image_masks=batch.image_masks), batch.on_host
    # On the host, where nothing waits for the device.
    index = make_batch(only, images=host.images, image_masks=host.image_masks).indexed().index
    assert index is not None
    return image(own.with_index(index.map(partial(sent, device=batch.images.device)), None)).images


def embed_words(text_embed: TextEmbedding, batch: Batch) -> tuple[Tensor, Tensor]:
    """The words of pairs and of texts alone, padded to one length L: [pairs + texts, L, dim], and which of them are no
    padding: bool [pairs + texts, 1, 1, L]."""
    length = max(batch.layout.pair_len, batch.layout.text_len, 1)
    words, masks = text_embed(batch), batch.keys_seen
    padded = torch.cat([F.pad(part, (0, 0, 0, length - part.shape[1])) for part in words])
    seen = torch.cat([F.pad(part, (0, length - part.shape[1])) for part in masks])
    return padded, seen[:, None, None]
