"""Small BLIPs of transformers with random weights, in directories as others publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import EOS, PAD, Batch
from pretrain.data.json_tokenizer import JsonTokenizer
from pretrain.models.towers.released import CLIP_LOOK
from tests.models.towers.others import LENGTH, SIZES, WORDS, moved, write_directory

CAPTIONER, RETRIEVER = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"
VOCABULARY = 5 + len(WORDS)  # BERT's special tokens and the words; [DEC] and [ENC] come behind them


def blip(name: str, **vision: Any) -> Any:
    """One whose norms, biases and head are away from where they start; without dropout."""
    import transformers

    torch.manual_seed(0)
    # BERT's ids of padding, separator and [DEC].
    text = SIZES | {"vocab_size": VOCABULARY + 2, "max_position_embeddings": LENGTH, "encoder_hidden_size": 16,
                    "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3, "bos_token_id": VOCABULARY,
                    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
                    "label_smoothing": 0.1}  # fmt: skip
    seen = SIZES | {"image_size": 32, "patch_size": 8} | vision
    config = transformers.BlipConfig(vision_config=seen, text_config=text, image_text_hidden_size=12)
    return moved(getattr(transformers, name)(config))


@torch.no_grad()
def sharpen(model: Any) -> Any:
    """A captioner whose words depend on the picture, and end now and then."""
    model.text_decoder.cls.predictions.transform.LayerNorm.weight.mul_(6)
    model.text_decoder.cls.predictions.bias[3] += 3.0
    for layer in model.text_decoder.bert.encoder.layer:
        layer.crossattention.output.dense.weight.mul_(10)
        layer.crossattention.self.value.weight.mul_(4)
    return model


def write_blip(path: Path, name: str, **vision: Any) -> Any:
    model = blip(name, **vision)
    model = sharpen(model) if name == CAPTIONER else model
    write_directory(path, model, "bert")
    return model


def as_theirs(batch: Batch, tokenizer: JsonTokenizer, first: int | None = None) -> dict[str, Tensor]:
    """The pictures and texts of dual pairs as their model takes them; `first`: the id that stands in BOS's place."""
    ids = torch.tensor(tokenizer.own_ids)[batch.text_tokens]
    if first is not None:
        ids[:, 0] = first
    look = [torch.tensor(CLIP_LOOK[name]).view(3, 1, 1) for name in ("mean", "std")]
    pixels = (batch.images.float() / 255 - look[0]) / look[1]
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": (batch.text_tokens != PAD).long()}


def words(rows: Tensor, tokenizer: JsonTokenizer) -> list[list[int]]:
    """Our ids that were written, in their numbers, to the end of each text."""
    texts = [row[1:].tolist() for row in rows]
    ended = [text[: text.index(EOS)] if EOS in text else [i for i in text if i != PAD] for text in texts]
    return [[tokenizer.own_ids[i] for i in text] for text in ended]
