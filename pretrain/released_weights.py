"""Converts between the released BEiT-3's names and shapes and ours, and reads and writes files of tensors; reading one
executes nothing in it.

The released naming is torchscale's (A: vision, B: language) under `beit3.`; the heads have the names of unilm's beit3
code: `mlm_head`, `mim_head` (pretraining), `language_head`, `vision_head`, `logit_scale` (retrieval), and for
fine-tuning the names in released_names.FINE_TUNING_HEADS.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.checkpoint.save import read_trained
from pretrain.files import written_in_one_step
from pretrain.json_files import read_object
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.released_names import HEADS, SAME_LAYERS, TEXT_PART, head_names, names
from pretrain.run.stored_weights import model_in
from pretrain.tensors import check_finite, check_type

log = logging.getLogger(__name__)
State = dict[str, Tensor]

CONFIG = "config.json"
# Every released size has heads of this width (unilm beit3/modeling_utils.py: 768 / 12, 1024 / 16).
RELEASED_HEAD_DIM = 64
# torchscale's position tables begin with two unused rows (fairseq's padding offset).
UNUSED_POSITIONS = 2
# Sizes of the released models' text parts, for a file that has none.
RELEASED_WORDS, RELEASED_POSITIONS = 64010, 1024
# The tensors whose shape depends on the number of patches.
POSITIONS = ("encoder.vision_embed.positions", "encoder.relative_position.table")


def to_released(state: State, cfg: MultiwayConfig) -> State:
    """Our tensors (names of `PretrainTask`) under the released names. Shared attention is written once per modality,
    which computes the same. Raises ValueError for a model that the released architecture cannot express."""
    _check_expressible(state, cfg)
    state, released = with_projections(state, cfg.dim), {}
    for ours, theirs in names(cfg.depth, final_norm=cfg.final_norm).items():
        shared = re.sub(r"\.(norm|q|k|v|inner_norm|out)\.(vision|language)\.", r".\1.shared.", ours)
        source = ours if ours in state else shared
        if source not in state:
            raise ValueError(f"the weights have no {ours}; the released format needs a model with vision and language")
        released[theirs] = state[source].clone()
    _patch_weights(released, "beit3.vision_embed.proj.weight", (cfg.dim, 3, cfg.patch_size, cfg.patch_size))
    for key in ("A", "B"):
        table = released[f"beit3.encoder.embed_positions.{key}.weight"]
        released[f"beit3.encoder.embed_positions.{key}.weight"] = F.pad(table, (0, 0, UNUSED_POSITIONS, 0))
    heads = [HEADS, *head_names().values()]
    released |= {theirs: state[ours].clone() for head in heads for ours, theirs in head.items() if ours in state}
    if "logit_scale" in released:
        released["logit_scale"] = released["logit_scale"].reshape(())
    return released


def from_released(
    state: State, heads: int | None = None, where: object = "these weights"
) -> tuple[State, MultiwayConfig]:
    """Released tensors -> (ours, the configuration inferred from their shapes). The shapes do not tell `heads`: None
    means the released models' 64 per head. Heads come along, those of fine-tuning too if they are whole; what has no
    counterpart is dropped with a log line. ValueError, naming `where`, for other tensors."""
    # A classifier's checkpoint may hold the parts of pictures alone.
    language = any(TEXT_PART.search(key) for key in state) or "fc_norm.weight" not in state
    needed = ("beit3.text_embed.weight", "beit3.vision_embed.proj.weight")[0 if language else 1 :]
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"{where}: there is no {missing[0]}; give a BEiT-3 checkpoint from unilm")
    cfg = _guess_config(state, heads, where)
    ours = {}
    table = names(cfg.depth, final_norm=cfg.final_norm, language=language)
    for mine, theirs in table.items():
        if theirs not in state:
            raise ValueError(f"{where}: there is no {theirs}; the file is incomplete, so get it again")
        ours[mine] = state[theirs].clone()
    _patch_weights(ours, "encoder.vision_embed.proj.weight", (cfg.dim, 3 * cfg.patch_size**2))
    for mine in ("encoder.vision_embed.positions", "encoder.text_embed.positions"):
        if mine in ours:
            ours[mine] = ours[mine][UNUSED_POSITIONS:].clone()
    known = HEADS.copy()
    for name, head in head_names().items():
        known |= head if name not in SAME_LAYERS and all(theirs in state for theirs in head.values()) else {}
    ours |= {mine: state[theirs].clone() for mine, theirs in known.items() if theirs in state}
    if "objectives.contrastive.logit_scale" in ours:
        ours["objectives.contrastive.logit_scale"] = ours["objectives.contrastive.logit_scale"].reshape(1)
    for mine, value in ours.items():
        check_type(where, mine, value.dtype)
    convertible = {*table.values(), *known.values()}
    if dropped := sorted(set(state) - convertible):
        log.info("dropped %d tensors that have no counterpart here: %s ...", len(dropped), ", ".join(dropped[:5]))
    return ours, cfg


def resize_positions(state: State, cfg: MultiwayConfig, image_size: int) -> tuple[State, MultiwayConfig]:
    """The same model for another picture size, with interpolated positions: see MultiwayConfig.adapt."""
    new = dataclasses.replace(cfg, image_size=image_size)
    positions = {name: value for name, value in state.items() if name.startswith(POSITIONS)}
    return state | (new.adapt(positions, cfg, {}) if new.grid != cfg.grid else {}), new


def with_projections(state: State, dim: int) -> State:
    """Our tensors, and for a dual encoder whose contrast compares rows as they are (contrastive.project=False) the
    projections that change nothing, for a format that has some."""
    names = [f"objectives.contrastive.{name}.weight" for name in ("vision", "language")]
    if "objectives.contrastive.logit_scale" not in state or names[0] in state:
        return state
    return state | {name: torch.eye(dim) for name in names}


def _check_expressible(state: State, cfg: MultiwayConfig) -> None:
    """ValueError for a model that the released architecture has no layers for."""
    if any(".experts.fusion." in key for key in state):
        raise ValueError(
            "the released BEiT-3 has no fusion experts (model.fusion_layers), so these weights cannot be converted"
        )
    if "objectives.masked.transform.0.weight" in state:
        raise ValueError("the released word head has no transform before it, so these weights cannot be converted")
    if "objectives.contrastive.vision.bias" in state:
        raise ValueError(
            "the released projections of the contrast have no bias (contrastive.projection_bias), so these weights "
            "cannot be converted; to-hf and to-onnx can"
        )
    required: dict[str, Any] = {
        "ffn": "per_modality",
        "sub_norm": True,
        "relative_position": False,
        "layer_scale": None,
        "text_norm": False,
    }
    for name, value in required.items():
        if getattr(cfg, name) != value:
            raise ValueError(f"model.{name}={getattr(cfg, name)} cannot be written as BEiT-3; it needs {value}")
    if cfg.attention_dim != cfg.dim:
        raise ValueError(
            f"model.heads={cfg.heads} of width {cfg.head_width} cannot be written as BEiT-3, whose heads fill "
            f"{cfg.dim} (zeros in the place of pruned ones would change the norm behind them); to-hf and to-onnx can"
        )
    if not cfg.key_bias:
        raise ValueError("model.key_bias=False cannot be written as BEiT-3; it needs True")


def _patch_weights(state: State, key: str, shape: tuple[int, ...]) -> None:
    state[key] = state[key].reshape(shape)


def _guess_config(state: State, heads: int | None, where: object) -> MultiwayConfig:
    dim, _, patch, _ = state["beit3.vision_embed.proj.weight"].shape
    layers = [int(m[1]) for key in state if (m := re.match(r"beit3\.encoder\.layers\.(\d+)\.", key))]
    up = state.get("beit3.encoder.layers.0.ffn.A.fc1.weight")
    tables = [state.get(f"beit3.encoder.embed_positions.{key}.weight") for key in ("A", "B")]
    words = state.get("beit3.text_embed.weight")
    if up is None or tables[0] is None or (words is not None and tables[1] is None):
        raise ValueError(f"{where}: there are no layers or no position tables; give a whole BEiT-3 checkpoint")
    grid = round((len(tables[0]) - UNUSED_POSITIONS - 1) ** 0.5)
    return MultiwayConfig(
        dim=dim,
        depth=max(layers) + 1,
        heads=heads or max(dim // RELEASED_HEAD_DIM, 1),
        ffn_dim=len(up),
        image_size=grid * patch,
        patch_size=patch,
        vocab_size=RELEASED_WORDS if words is None else len(words),
        max_text_len=(RELEASED_POSITIONS if tables[1] is None else len(tables[1])) - UNUSED_POSITIONS,
        attention="per_modality",
        sub_norm="beit3.encoder.layers.0.ffn.A.ffn_layernorm.weight" in state,
        init="sub_norm",
        # unilm's models fine-tuned for classes or answers have none.
        final_norm=any(key.startswith("beit3.encoder.layer_norm.") for key in state)
        or not any(key in state for key in ("fc_norm.weight", "pooler.norm.weight")),
    )


def read_tensors(path: Path) -> State:
    """The tensors of a .safetensors or torch file. Nothing in a torch file is executed: only tensors and plain values
    are loaded, anything else raises ValueError."""
    if path.suffix == ".safetensors":
        try:
            return _checked(load_file(path), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}); fetch or write it again") from None
    try:
        # unilm's fine-tuning checkpoints contain their command line, a Namespace, which has only plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a pickle's protocol
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged pickle can fail in any way, and torch's words advise to load it all the same
        raise ValueError(
            f"{path} is damaged or contains more than tensors, and is not loaded, since that could run its code; get "
            "the published file again, or a .safetensors"
        ) from None
    for key in ("model", "module"):  # where unilm's own checkpoints and DeepSpeed's have the tensors
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path} has no dictionary of tensors, neither at the top nor under 'model' or 'module'; give a checkpoint "
            "from unilm"
        )
    return _checked(content, path)


def _checked(state: State, path: Path) -> State:
    """The state itself. ValueError for numbers that are not finite. Types are checked where tensors become weights."""
    for name, value in state.items():
        check_finite(path, name, value)
    return state


def read_model(directory: Path) -> tuple[State, MultiwayConfig, dict]:
    """(a stage's weights, its model's configuration, the whole config stored with the weights). ValueError for a
    directory without them, and for the weights of another model than a Multiway encoder."""
    state, config = read_trained(directory)
    if not config:  # weights of other origin: their config.json lies beside them
        if not (directory / CONFIG).is_file():
            raise ValueError(f"{directory} has no {CONFIG}; give the directory of a finished stage")
        config = read_object(directory / CONFIG)
    model = model_in(config, directory)
    if not isinstance(model, MultiwayConfig):
        name = type(model).__name__
        raise ValueError(f"{directory} has a {name}, not a Multiway encoder; give the directory of one")
    for name, value in state.items():
        check_type(directory, name, value.dtype)
    return state, model, config


def write_tensors(path: Path, state: State) -> None:
    """Writes a .safetensors, or a torch file that unilm's code can read, in one step. ValueError for a path that cannot
    be a file's, OSError where writing fails."""
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: it is a directory, or its directory does not exist; give a file's path")
    state = {key: value.contiguous() for key, value in state.items()}
    try:
        with written_in_one_step(path) as growing:
            if path.suffix == ".safetensors":
                save_file(state, growing)
            else:
                torch.save({"model": state}, growing)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeError for a full disk
        reason = str(error).partition("\n")[0]
        raise OSError(f"cannot write {path} ({reason}); free some space, or give another path") from None
