"""Dual towers of CLIP's architecture as open_clip loads them: `create_model_and_transforms("local-dir:DIR")`, and from
a Hub repository with the same files "hf-hub:OWNER/NAME". Names, shapes and settings are those of open_clip 3.3.

Models that open_clip cannot express are refused. A Multiway encoder has no towers. For SigLIP's vision tower open_clip
uses timm's, which comes in fixed sizes and with the exact GELU, while transformers' and ours approximate it by tanh, so
vectors would differ. For other towers open_clip has classes that fetch a configuration from the Hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import BOS, EOS, PAD, UNK
from pretrain.contracts import State
from pretrain.data.json_tokenizer import MISSING, JsonTokenizer
from pretrain.data.text_tokenizer import AnyTokenizer
from pretrain.files import write_file, write_json, written_in_one_step
from pretrain.models.towers.dual import DualTowers
from pretrain.models.towers.tower import Tower, settings_of

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
HEAD = "objectives.contrastive."
POOLS = {"class": "tok", "mean": "avg"}  # our pooling -> open_clip's pool_type
QUICK = {"quick_gelu": True, "gelu": False}  # hidden_act -> open_clip's quick_gelu
EPS = 1e-5  # open_clip's default
# Inside a block: our name -> open_clip's.
BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
INSTEAD = "use to-onnx, or pretrain.load"


def write_directory(
    state: State, model: Any, out: Path, *, evaluation: str, text: AnyTokenizer | None, where: object
) -> None:
    """`state`: tensors by our names; `evaluation`: how a picture becomes a square, squash or crop. `text` is written
    beside the weights: a tokenizer.json with its own ids, which open_clip's get_tokenizer reads; or a SentencePiece
    model as it is, with our ids, which open_clip cannot read. ValueError, naming `where`, for a model that open_clip
    cannot express, and where `out` is not empty."""
    from safetensors.torch import save_file

    _check(state, model, where)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new directory")
    out.mkdir(parents=True, exist_ok=True)
    tensors, config = _tensors(state, model), _config(state, model)
    own = text.own_ids if isinstance(text, JsonTokenizer) else None
    if own is not None:
        table = tensors["token_embedding.weight"]
        tensors["token_embedding.weight"] = _in_their_order(table, own)
        config["text_cfg"] |= {"vocab_size": max(own) + 1, "eos_id": own[EOS], "hf_tokenizer_name": "."}
        if own[EOS] == max(own):
            config["text_cfg"]["pool_type"] = "argmax"  # as for CLIP's own tokenizer; older versions know this too
    with written_in_one_step(out / WEIGHTS) as growing:
        save_file({name: value.contiguous() for name, value in tensors.items()}, growing, metadata={"format": "pt"})
    if isinstance(text, JsonTokenizer):
        _write_tokenizer(text, out)
    elif text is not None:
        write_file(out / "text.model", text.path.read_bytes())
    seen = {"size": model.image_size, "mean": list(model.vision.mean), "std": list(model.vision.std)}
    seen |= {"interpolation": "bicubic", "resize_mode": "squash" if evaluation == "squash" else "shortest"}
    write_json(out / CONFIG, {"model_cfg": config, "preprocess_cfg": seen})


def _check(state: State, model: Any, where: object) -> None:
    if not isinstance(model, DualTowers):
        raise ValueError(
            f"{where} has a {type(model).__name__}, and open_clip loads two separate towers only; use to-hf, whose "
            "directory brings the code that it needs"
        )
    vision, text = model.vision, model.text
    if (vision.kind, text.kind) != ("clip_vision_model", "clip_text_model"):
        raise ValueError(
            f"{where} has a {vision.kind} and a {text.kind}; of towers, open_clip computes the same only with CLIP's "
            f"(SigLIP's have another GELU there); {INSTEAD}"
        )
    acts = {settings_of(tower).hidden_act for tower in (vision, text)}
    problems = {
        f"model.vision.pooling={vision.pooling}": vision.pooling not in POOLS,
        f"model.text.pooling={text.pooling}": text.pooling != "eos" or not text.bos,
        f"projections of {vision.projection} and {text.projection} in the towers": vision.projection or text.projection,
        f"hidden_act of {' and '.join(sorted(acts))}": len(acts) > 1 or not acts <= QUICK.keys(),
        "no head of contrast": f"{HEAD}logit_scale" not in state,
        "a bias in the head of contrast": f"{HEAD}vision.bias" in state,
    }
    if wrong := [name for name, holds in problems.items() if holds]:
        raise ValueError(f"{where} has {wrong[0]}, which open_clip's CLIP cannot express; {INSTEAD}")


def _config(state: State, model: DualTowers) -> dict[str, Any]:
    seen, read = settings_of(model.vision), settings_of(model.text)
    config: dict[str, Any] = {
        "embed_dim": _projection(state, "vision", model.vision).shape[1],
        "quick_gelu": QUICK[seen.hidden_act],
        "vision_cfg": {
            "image_size": model.image_size,
            "patch_size": model.patch_size,
            "head_width": seen.hidden_size // seen.num_attention_heads,
            "pool_type": POOLS[model.vision.pooling],
        },
        "text_cfg": {
            "context_length": model.max_text_len,
            "vocab_size": model.vocab_size,
            "heads": read.num_attention_heads,
            "pool_type": "eos",
            "eos_id": EOS,
        },
    }
    for name, own in (("vision_cfg", seen), ("text_cfg", read)):
        width, inner = own.hidden_size, own.intermediate_size
        # open_clip cuts width * mlp_ratio down to a whole number, which rounding must not make one less.
        ratio = inner / width if int(width * (inner / width)) == inner else (inner + 0.25) / width
        config[name] |= {"width": width, "layers": own.num_hidden_layers, "mlp_ratio": ratio}
        if own.layer_norm_eps != EPS:
            config[name]["norm_kwargs"] = {"eps": own.layer_norm_eps}
    if (bias := state.get(f"{HEAD}logit_bias")) is not None:
        config["init_logit_bias"] = float(bias)
    return config


def _projection(state: State, side: str, tower: Tower) -> Tensor:
    """The projection of a tower's vectors, [width, E]; the identity where the head has none."""
    own = state.get(f"{HEAD}{side}.weight")
    return torch.eye(tower.width) if own is None else own.T


def _tensors(state: State, model: DualTowers) -> State:
    """The tensors by open_clip's names."""
    embeddings = {
        "vision": {
            "embeddings.class_embedding": "class_embedding",
            "embeddings.patch_embedding.weight": "conv1.weight",
            "embeddings.position_embedding.weight": "positional_embedding",
            **{f"pre_layrnorm.{part}": f"ln_pre.{part}" for part in ("weight", "bias")},
            **{f"post_layernorm.{part}": f"ln_post.{part}" for part in ("weight", "bias")},
        },
        "text": {
            "embeddings.token_embedding.weight": "token_embedding.weight",
            "embeddings.position_embedding.weight": "positional_embedding",
            **{f"final_layer_norm.{part}": f"ln_final.{part}" for part in ("weight", "bias")},
        },
    }
    theirs: State = {}
    for side, prefix in (("vision", "visual."), ("text", "")):
        ours, tower = f"encoder.{side}.model.", getattr(model, side)
        theirs |= {prefix + name: state[ours + own] for own, name in embeddings[side].items()}
        for number in range(settings_of(tower).num_hidden_layers):
            theirs |= _block(state, f"{ours}encoder.layers.{number}.", f"{prefix}transformer.resblocks.{number}.")
    theirs["visual.proj"] = _projection(state, "vision", model.vision)
    theirs["text_projection"] = _projection(state, "language", model.text)
    theirs["logit_scale"] = state[f"{HEAD}logit_scale"].reshape(())
    if f"{HEAD}logit_bias" in state:
        theirs["logit_bias"] = state[f"{HEAD}logit_bias"].reshape(())
    return theirs


def _block(state: State, ours: str, theirs: str) -> State:
    """The tensors of one block; `ours` and `theirs` are the beginnings of its names."""
    block: State = {}
    for part in ("weight", "bias"):
        block |= {f"{theirs}{name}.{part}": state[f"{ours}{own}.{part}"] for own, name in BLOCK.items()}
        joined = torch.cat([state[f"{ours}self_attn.{name}_proj.{part}"] for name in "qkv"])
        block[f"{theirs}attn.in_proj_{part}"] = joined
    return block


def _in_their_order(table: Tensor, own_ids: list[int]) -> Tensor:
    """The rows of the embedding [V, D] in the order of the tokenizer's own ids; 0 where no id of ours stands for
    one."""
    order = torch.tensor(own_ids)
    new = table.new_zeros(max(own_ids) + 1, table.shape[1])
    new[order[order != MISSING]] = table[: len(own_ids)][order != MISSING]
    return new


def _write_tokenizer(text: JsonTokenizer, out: Path) -> None:
    """Writes tokenizer.json, which puts BOS before and EOS behind a text, and tokenizer_config.json for
    transformers."""
    content = json.loads(text.path.read_bytes())
    names = {ours: text.own_name(ours) for ours in (BOS, PAD, EOS, UNK) if text.own_ids[ours] != MISSING}
    ends = [{"SpecialToken": {"id": names[each], "type_id": 0}} for each in (BOS, EOS)]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]],
        "pair": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, ends[1]],
        "special_tokens": {
            names[each]: {"id": names[each], "ids": [text.own_ids[each]], "tokens": [names[each]]}
            for each in (BOS, EOS)
        },
    }
    write_json(out / "tokenizer.json", content | {"truncation": None, "padding": None})
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[BOS], "eos_token": names[EOS]}
    # open_clip does not read what stands behind EOS; CLIP pads with EOS.
    config |= {"pad_token": names.get(PAD, names[EOS])} | ({"unk_token": names[UNK]} if UNK in names else {})
    write_json(out / "tokenizer_config.json", config)
