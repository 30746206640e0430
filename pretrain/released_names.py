"""Our names of tensors, and those in the released BEiT-3 files: torchscale's for the encoder, unilm's for heads."""

from __future__ import annotations

import re

TEXT_PART = re.compile(r"text_embed|\.B\.")  # in the released names of tensors that only texts use
MODALITIES = {"A": "vision", "B": "language"}
# Inside a block, our names -> torchscale's, for layers that exist once per modality; {m}, {M} are the modality.
BLOCK = {
    "norm.{m}": "self_attn_layer_norm.{M}",
    "attention.q.{m}": "self_attn.q_proj.{M}",
    "attention.k.{m}": "self_attn.k_proj.{M}",
    "attention.v.{m}": "self_attn.v_proj.{M}",
    "attention.inner_norm.{m}": "self_attn.inner_attn_ln.{M}",
    "attention.out.{m}": "self_attn.out_proj.{M}",
    "experts.{m}.norm": "final_layer_norm.{M}",
    "experts.{m}.up": "ffn.{M}.fc1",
    "experts.{m}.inner_norm": "ffn.{M}.ffn_layernorm",
    "experts.{m}.down": "ffn.{M}.fc2",
}
HEADS = {
    "objectives.masked.text.weight": "mlm_head.weight",
    "objectives.masked.text.bias": "mlm_head.bias",
    "objectives.masked.image.weight": "mim_head.weight",
    "objectives.masked.image.bias": "mim_head.bias",
    "objectives.contrastive.language.weight": "language_head.weight",
    "objectives.contrastive.vision.weight": "vision_head.weight",
    "objectives.contrastive.logit_scale": "logit_scale",
}
# Fine-tuning heads: modules of ours -> unilm's (beit3/modeling_finetune.py), by our objective.
FINE_TUNING_HEADS = {
    "classification": {"norm": "fc_norm", "classes": "head"},
    "answering": {
        "norm": "pooler.norm",
        "pool": "pooler.dense",
        "answer.0": "head.0",
        "answer.1": "head.1",
        "answer.3": "head.3",
    },
    "reasoning": {"norm": "head.norm1", "judge.0": "head.dense1", "judge.1": "head.norm2", "judge.3": "head.dense2"},
}

# Objectives whose head has the same layers as another objective's. Its tensors are written under the other's released
# names, and read back as the other's.
SAME_LAYERS = {"entailment": "answering"}


def head_names() -> dict[str, dict[str, str]]:
    """For each fine-tuning objective the tensors of its head: our name -> the released name."""
    return {
        name: {
            f"objectives.{name}.{ours}.{part}": f"{theirs}.{part}"
            for ours, theirs in modules.items()
            for part in ("weight", "bias")
        }
        for name, modules in (FINE_TUNING_HEADS | _same_layers()).items()
    }


def _same_layers() -> dict[str, dict[str, str]]:
    return {name: FINE_TUNING_HEADS[other] for name, other in SAME_LAYERS.items()}


def names(depth: int, *, final_norm: bool = True, language: bool = True) -> dict[str, str]:
    """Our name -> the released name of every tensor of a released model with `depth` blocks, except its heads'.
    `language`: whether the tensors that only texts use are among them."""
    table = {
        "vision_embed.proj.weight": "vision_embed.proj.weight",
        "vision_embed.proj.bias": "vision_embed.proj.bias",
        "vision_embed.cls_token": "vision_embed.cls_token",
        "vision_embed.mask_token": "vision_embed.mask_token",
        "vision_embed.positions": "encoder.embed_positions.A.weight",
        "text_embed.tokens.weight": "text_embed.weight",
        "text_embed.positions": "encoder.embed_positions.B.weight",
    }
    for big, small in MODALITIES.items():
        layers = {f"norm.{small}": f"encoder.layer_norm.{big}"} if final_norm else {}
        for i in range(depth):
            for ours, theirs in BLOCK.items():
                layers[f"blocks.{i}.{ours.format(m=small)}"] = f"encoder.layers.{i}.{theirs.format(M=big)}"
        table |= {f"{a}.{part}": f"{b}.{part}" for a, b in layers.items() for part in ("weight", "bias")}
    if not language:
        table = {ours: theirs for ours, theirs in table.items() if not TEXT_PART.search(theirs)}
    return {f"encoder.{ours}": f"beit3.{theirs}" for ours, theirs in table.items()}
