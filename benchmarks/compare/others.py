"""The same training step as others' code does it: a pass for each kind of sequences, and heads over what comes out."""

from __future__ import annotations

import sys
import types
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import PAD, Batch
from pretrain.models.multiway.shape import MultiwayShape


def torchscale_model(cfg: MultiwayShape, released: dict[str, Tensor] | None = None) -> nn.Module:
    """torchscale 0.3.0's BEiT3, with the tensors of released names if they are given. It imports timm (drop path) and
    fairscale (checkpointing), which are not used here."""
    stubs: dict[str, dict[str, Any]] = {
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": lambda x, *_: x},
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": None, "wrap": None},
    }
    for name, content in stubs.items():
        module = sys.modules.setdefault(name, types.ModuleType(name))
        for attribute, value in content.items():
            setattr(module, attribute, getattr(module, attribute, value))
    config = import_module("torchscale.architecture.config").EncoderConfig(
        img_size=cfg.image_size,
        patch_size=cfg.patch_size,
        vocab_size=cfg.vocab_size,
        multiway=True,
        no_output_layer=True,
        encoder_embed_dim=cfg.dim,
        encoder_attention_heads=cfg.heads,
        encoder_ffn_embed_dim=cfg.ffn_dim,
        encoder_layers=cfg.depth,
        max_source_positions=cfg.max_text_len + 2,
        layernorm_eps=cfg.norm_eps,
        normalize_output=cfg.final_norm,
    )
    model = import_module("torchscale.model.BEiT3").BEiT3(config)
    if released is not None:
        model.load_state_dict({k.removeprefix("beit3."): v for k, v in released.items() if k.startswith("beit3.")})
    return model


class Passes(nn.Module):
    """Masked data modeling over an encoder's three passes. `full`: the heads make the logits of every row, as VLMo's
    code does, and the loss leaves out those without a target; else, as BEiT-2's, of the rows with one."""

    def __init__(self, cfg: MultiwayShape, codes: int):
        super().__init__()
        self.image_head, self.text_head = nn.Linear(cfg.dim, codes), nn.Linear(cfg.dim, cfg.vocab_size)
        self.full = False

    def encode(self, batch: Batch, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> rows of the images' patches, the pairs' patches, the pairs' words and the texts' words."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """The mean over sequences of the mean over a sequence's targets."""
        pixels = batch.images.float().div_(127.5).sub_(1)
        images, pair_images, pair_texts, texts = self.encode(batch, pixels)
        assert batch.image_codes is not None
        masks, codes = batch.image_masks.split([len(images), len(pair_images)]), batch.image_codes
        targets = codes.split([len(images), len(pair_images)])
        losses = [self.loss(self.image_head, *part) for part in zip((images, pair_images), masks, targets, strict=True)]
        losses.append(self.loss(self.text_head, pair_texts, batch.pair_masked, batch.pair_tokens))
        losses.append(self.loss(self.text_head, texts, batch.text_masked, batch.text_tokens))
        return torch.cat(losses).mean()

    def loss(self, head: nn.Module, rows: Tensor, masked: Tensor, targets: Tensor) -> Tensor:
        """[n, L, D], bool [n, L], int64 [n, L] -> [n]"""
        counts = masked.sum(1)
        if self.full:
            wanted = targets.masked_fill(~masked, -100)
            lost = F.cross_entropy(head(rows).float().flatten(0, 1), wanted.flatten(), reduction="none")
            return lost.view(masked.shape).sum(1) / counts
        lost = F.cross_entropy(head(rows[masked]).float(), targets[masked], reduction="none")
        return torch.stack([part.mean() for part in lost.split(counts.tolist())])


class Torchscale(Passes):
    """The released BEiT-3's own code."""

    def __init__(self, cfg: MultiwayShape, codes: int):
        super().__init__(cfg, codes)
        self.beit3 = torchscale_model(cfg)

    def encode(self, batch: Batch, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, first = batch.layout.images, batch.layout.image_len
        masks, pairs, texts = batch.image_masks, batch.pair_inputs, batch.text_inputs
        images = self.beit3(visual_tokens=pixels[:n], vision_masked_position=masks[:n])["encoder_out"]
        both = self.beit3(
            textual_tokens=pairs,
            visual_tokens=pixels[n:],
            text_padding_position=pairs == PAD,
            vision_masked_position=masks[n:],
        )["encoder_out"]
        words = self.beit3(textual_tokens=texts, text_padding_position=texts == PAD)["encoder_out"]
        return images[:, 1:], both[:, 1:first], both[:, first:], words


class HuggingFace(Passes):
    """transformers' encoders of the same size, one for each kind: ViT for images, BERT for texts, ViLT for pairs. They
    share no weights, so there are more of them, and have no norm inside their branches."""

    def __init__(self, cfg: MultiwayShape, codes: int):
        super().__init__(cfg, codes)
        hf: Any = import_module("transformers")
        same = {
            "hidden_size": cfg.dim,
            "num_hidden_layers": cfg.depth,
            "num_attention_heads": cfg.heads,
            "intermediate_size": cfg.ffn_dim,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        pictures = {"image_size": cfg.image_size, "patch_size": cfg.patch_size}
        words = {"vocab_size": cfg.vocab_size, "max_position_embeddings": max(cfg.max_text_len, 8)}
        options = {"add_pooling_layer": False}
        self.vit = hf.ViTModel(hf.ViTConfig(**same, **pictures), use_mask_token=True, **options)
        self.bert = hf.BertModel(hf.BertConfig(**same, **words), **options)
        self.vilt = hf.ViltModel(hf.ViltConfig(**same, **pictures, **words, max_image_length=-1), **options)

    def encode(self, batch: Batch, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, length = batch.layout.images, batch.layout.pair_len
        pairs, texts = batch.pair_inputs, batch.text_inputs
        images = self.vit(pixel_values=pixels[:n], bool_masked_pos=batch.image_masks[:n]).last_hidden_state
        both = self.vilt(
            input_ids=pairs, attention_mask=(pairs != PAD).long(), pixel_values=pixels[n:]
        ).last_hidden_state
        words = self.bert(input_ids=texts, attention_mask=(texts != PAD).long()).last_hidden_state
        # ViLT puts the words first, and its patches in any order.
        return images[:, 1:], both[:, length + 1 :], both[:, :length], words
