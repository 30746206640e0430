"""Writes trained weights as a Hugging Face directory: AutoModel and AutoProcessor read it by the small code in it, and
do not need this package."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.files import write_file, write_json, written_in_one_step
from pretrain.json_files import parse_json, read_object
from pretrain.models.multiway.config import MultiwayConfig

CODE = Path(__file__).with_name("files")
MODULES = ("configuration_multiway", "modeling_multiway", "processing_multiway")
WEIGHTS, TEXT_MODEL, MODEL_TYPE = "model.safetensors", "text.model", "imglish_multiway"
# Our names of tensors -> those in the directory; the encoder's tensors have the same names in both.
HEADS = {
    "objectives.contrastive.vision.weight": "vision_head.weight",
    "objectives.contrastive.language.weight": "language_head.weight",
    "objectives.contrastive.vision.bias": "vision_head.bias",
    "objectives.contrastive.language.bias": "language_head.bias",
    "objectives.contrastive.logit_scale": "logit_scale",
    "objectives.contrastive.logit_bias": "logit_bias",
    "objectives.masked.text.weight": "word_head.weight",
    "objectives.masked.text.bias": "word_head.bias",
}
TRANSFORM = "objectives.masked.transform.0.weight"
UNUSED = ("init", "init_std")  # fields that only training asks for
SHOWN = 8  # lines of the curve in the card


def write_directory(
    state: dict[str, Tensor],
    model: MultiwayConfig,
    out: Path,
    *,
    source: Path,
    config: dict[str, Any],
    text: Path | None,
) -> None:
    """`state`: tensors by our names; `config`: the config that is stored with them; `source`: the directory of the
    stage, whose evaluations the model card shows; `text`: its SentencePiece model. ValueError where `out` is not empty,
    and for a word head that the directory's code cannot compute."""
    from safetensors.torch import save_file

    if TRANSFORM in state:
        raise ValueError(f"{source} has a word head with a transform, which cannot be written for Hugging Face")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new directory")
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in state.items() if name.startswith("encoder.")}
    tensors |= {theirs: state[ours] for ours, theirs in HEADS.items() if ours in state}
    words = {"word_head.weight", "word_head.bias"} <= tensors.keys()
    tensors = {name: value.clone().contiguous() for name, value in tensors.items() if words or "word_head" not in name}
    with written_in_one_step(out / WEIGHTS) as growing:
        save_file(tensors, growing, metadata={"format": "pt"})
    for name in MODULES:
        write_file(out / f"{name}.py", (CODE / f"{name}.py").read_bytes())
    if text is not None:
        shutil.copyfile(text, out / TEXT_MODEL)
    evaluation = evaluation_look(config)
    fields = {name: value for name, value in asdict(model).items() if name not in UNUSED}
    head = tensors.get("vision_head.weight")
    experts = {"vision": "vision_embed.", "language": "text_embed.", "fusion": ".experts.fusion."}
    fields |= {
        "experts": [name for name, part in experts.items() if any(part in key for key in tensors)],
        "embed_dim": None if head is None else len(head),
        "words": words,
        "head_bias": "vision_head.bias" in tensors,
        "sigmoid": "logit_bias" in tensors,
        "evaluation": evaluation,
    }
    model_map = {"AutoConfig": f"{MODULES[0]}.MultiwayConfig", "AutoModel": f"{MODULES[1]}.MultiwayModel"}
    processor = {"AutoProcessor": f"{MODULES[2]}.MultiwayProcessor"}
    about = {"model_type": MODEL_TYPE, "architectures": ["MultiwayModel"], "dtype": "float32"}
    write_json(out / "config.json", about | {"auto_map": model_map | processor} | fields)
    seen = {"image_size": model.image_size, "max_text_len": model.max_text_len, "evaluation": evaluation}
    named = {"processor_class": "MultiwayProcessor", "auto_map": processor, "has_text": text is not None}
    write_json(out / "processor_config.json", named | seen)
    write_file(out / "README.md", card(source, config, fields).encode())


def evaluation_look(config: dict[str, Any]) -> str:
    """How the stage's own evaluation makes a picture square, squash or crop, from the config stored with its
    weights."""
    look = config.get("look")
    return str(look.get("evaluation", "squash")) if isinstance(look, dict) else "squash"


def card(source: Path, config: dict[str, Any], fields: dict[str, Any]) -> str:
    """The model card: what the model is, how to use it, what trained it, and how it was evaluated."""
    recipe = _read(source / "recipe.json")
    stage_name = str(config.get("stage", "of released weights"))
    stages = recipe.get("stages")
    stage = stages.get(stage_name, {}) if isinstance(stages, dict) else {}
    lines = [
        "---", "library_name: transformers", "tags: [vision-language, multiway, beit3]", "---", "",
        f"# {config.get('recipe', 'BEiT-3')}: {stage_name}", "",
        f"A Multiway encoder of {fields['depth']} layers of width {fields['dim']}, pictures of {fields['image_size']} "
        f"pixels, with the experts {', '.join(fields['experts'])}.", "", "```python",
        "from PIL import Image", "from transformers import AutoModel, AutoProcessor", "",
        'model = AutoModel.from_pretrained("THIS", trust_remote_code=True).eval()',
        'processor = AutoProcessor.from_pretrained("THIS", trust_remote_code=True)',
        'both = model(**processor(images=[Image.open("a.jpg")], text=["a bus"]))  # fused: image_rows, text_rows',
    ]  # fmt: skip
    if fields["embed_dim"] is not None:
        lines.append('vectors = model.get_image_features(**processor(images=[Image.open("a.jpg")]))')
    lines += ["```", ""]
    if fields["evaluation"] == "crop":
        lines += ["Its processor resizes by Pillow's bicubic filter, where its own evaluation averages pixels.", ""]
    if isinstance(stage, dict) and stage:
        mix = stage.get("mix")
        mix = mix if isinstance(mix, dict) else {}
        lines += ["## Training", "", f"- {stage.get('steps')} steps, batch {_plain(stage.get('batch'))}"]
        shards = {kind: part.get("shards") if isinstance(part, dict) else part for kind, part in mix.items()}
        lines += [f"- {kind}: `{_plain(place)}`" for kind, place in shards.items()]
        lines += [f"- begins at `{stage.get('init_from') or 'fresh weights'}`", *_curve(source), ""]
    numbers = {k: v for k, v in _read(source / "eval.json").items() if isinstance(v, int | float) and "/" in k}
    if numbers:
        lines += ["## Evaluation", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in numbers.items()]
    return "\n".join(lines) + "\n"


def _curve(source: Path) -> list[str]:
    """A line of the card with the loss at SHOWN steps, from the stage's metrics; [] where there are none."""
    try:
        text = (source / "metrics.jsonl").read_text()
    except (OSError, UnicodeDecodeError):
        return []
    losses = []
    for line in text.splitlines():
        with suppress(ValueError, TypeError, KeyError):
            values = parse_json(line)
            losses.append((int(values["step"]), float(values["loss"])))
    some = [losses[round(n * (len(losses) - 1) / (SHOWN - 1))] for n in range(SHOWN)] if len(losses) > SHOWN else losses
    return [f"- loss at step {', '.join(f'{step}: {loss:.4g}' for step, loss in some)}"] if some else []


def _plain(value: Any) -> str:
    """A value of recipe.json on one line, without backticks."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items() if number and name != "class")
    return re.sub(r"[`\n]", " ", value if isinstance(value, str) else json.dumps(value))


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in the file; {} where it cannot be read."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}
