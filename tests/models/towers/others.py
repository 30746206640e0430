"""Small models of transformers with random weights, in directories as others publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from pretrain.batch import BOS, EOS, PAD, Batch, Layout, make_batch

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = [f"word{number}" for number in range(20)]
SPECIALS = {
    "clip": ["<|startoftext|>", "<|endoftext|>"],
    "siglip": ["<pad>", "</s>", "<unk>"],
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
LENGTH, COUNT = 8, 4


def write_tokenizer(path: Path, kind: str) -> Path:
    """A tokenizer.json of WORDS whose control tokens stand where the published one has them."""
    first, last = SPECIALS[kind], []
    if kind == "clip":
        first, last = [], SPECIALS[kind]
    if kind == "roberta":
        first, last = SPECIALS[kind][:4], SPECIALS[kind][4:]
    names = [*first, *WORDS, *last]
    unknown = next((name for name in names if "unk" in name.lower()), names[-1])
    tokenizer = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIALS[kind])
    tokenizer.save(str(path))
    return path


def whole_model(kind: str) -> Any:
    """A CLIPModel, SiglipModel or AlignModel whose norms, biases and head are away from where they start."""
    import transformers

    torch.manual_seed(0)
    picture = SIZES | {"image_size": 32, "patch_size": 8}
    if kind == "clip":
        words = SIZES | {"hidden_size": 24, "vocab_size": 22, "max_position_embeddings": LENGTH, "eos_token_id": 21,
                         "bos_token_id": 20, "pad_token_id": 21}  # fmt: skip
        config: Any = transformers.CLIPConfig(vision_config=picture, text_config=words, projection_dim=12)
    elif kind == "align":
        words = SIZES | {"vocab_size": 25, "max_position_embeddings": LENGTH, "pad_token_id": 0,
                         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
        picture = {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}
        config = transformers.AlignConfig(vision_config=picture, text_config=words, projection_dim=80)
    else:
        words = SIZES | {"vocab_size": 23, "max_position_embeddings": LENGTH - 1, "projection_size": 16,
                         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
        config = transformers.SiglipConfig(vision_config=picture, text_config=words)
    return moved(
        getattr(transformers, {"clip": "CLIPModel", "siglip": "SiglipModel", "align": "AlignModel"}[kind])(config)
    )


def moved(model: Any) -> Any:
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(std=0.1)
    return model.eval()


def write_directory(path: Path, model: nn.Module, kind: str | None) -> Path:
    model.save_pretrained(path)  # type: ignore[operator]
    if kind is not None:
        write_tokenizer(path / "tokenizer.json", "bert" if kind == "align" else kind)
    return path


def dual_batch(vocab: int, seed: int = 0, count: int = COUNT, size: int = 32, patch: int = 8) -> Batch:
    """Dual pairs with texts of several lengths."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (count, LENGTH), generator=made)
    ids[:, 0] = BOS
    for row in range(count):
        end = 2 + row % (LENGTH - 2)
        ids[row, end], ids[row, end + 1 :] = EOS, PAD
    layout = Layout(count, 0, count, (size // patch) ** 2, 0, LENGTH, dual=count)
    pictures = torch.randint(256, (count, 3, size, size), generator=made, dtype=torch.uint8)
    return make_batch(layout, images=pictures, text_tokens=ids)


def as_theirs(ids: Tensor, own_ids: list[int]) -> Tensor:
    """Our ids in their numbers; for one that they lack the last word's."""
    table = torch.tensor(own_ids)
    return torch.where(table < 0, table.max(), table)[ids]
