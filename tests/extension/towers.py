"""A dual tower of two Hugging Face encoders, as somebody outside pretrain/ would add it: one file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.batch import PAD, Batch, Kinds, Layout
from pretrain.contracts import Model
from pretrain.flops import encoder_flops
from pretrain.layers import PLAIN


@dataclass(frozen=True)
class DualTower(Model):
    """A ResNet and a BERT with random weights; each tower has a width of its own."""

    image_size: int = 32
    patch_size: int = 8  # the ResNet's stride
    vocab_size: int = 64
    image_width: int = 16
    text_width: int = 24
    max_text_len: int = 16

    def build(self, experts, layers=PLAIN, *, drop_path=0.0, checkpointing=0) -> nn.Module:
        if drop_path or checkpointing:
            raise ValueError("DualTower has neither drop_path nor activation_checkpointing; leave them at 0")
        return Towers(self)

    def width(self, kind: str) -> int:
        return {"images": self.image_width, "texts": self.text_width}[kind]

    def flops(self, layout: Layout) -> int:
        texts = Layout(texts=layout.texts, text_len=layout.text_len)
        return encoder_flops(texts, dim=self.text_width, depth=2, ffn_dim=2 * self.text_width)


class Towers(nn.Module):
    def __init__(self, cfg: DualTower):
        super().__init__()
        from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

        sizes = {"embedding_size": 8, "hidden_sizes": [8, cfg.image_width], "depths": [1, 1]}
        self.cfg, self.images = cfg, ResNetModel(ResNetConfig(layer_type="basic", **sizes))
        words = BertConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.text_width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * cfg.text_width,
            max_position_embeddings=cfg.max_text_len,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD,
        )
        self.texts = BertModel(words, add_pooling_layer=False)

    def forward(self, batch: Batch, needed: Kinds | None = None) -> Kinds:
        layout = batch.layout
        seen = self.images(batch.images[: layout.images].float() / 127.5 - 1)
        pooled = seen.pooler_output.flatten(1).unsqueeze(1)
        images = torch.cat([pooled, seen.last_hidden_state.flatten(2).transpose(1, 2)], 1)
        mask = (batch.text_inputs != PAD).long()
        texts = self.texts(input_ids=batch.text_inputs, attention_mask=mask).last_hidden_state
        return Kinds(images, no_rows(images), no_rows(texts), texts)


def no_rows(like: Tensor) -> Tensor:
    return like.new_zeros(0, like.shape[1], like.shape[2])
