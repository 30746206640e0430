"""Released models of transformers, as initial weights for our stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.checkpoint.weights import WEIGHTS, write_weights
from pretrain.config import to_json
from pretrain.data.json_tokenizer import JsonTokenizer
from pretrain.files import write_file
from pretrain.json_files import read_object
from pretrain.models.decoder.released import CLASSES, blip_config, from_blip
from pretrain.models.multiway.vilt import from_vilt, vilt_config
from pretrain.models.towers.released import WHOLE, check_words, read_pair, read_whole
from pretrain.models.towers.tower import kind_of, read_directory


def from_huggingface(directory: Path, text: Path | None, out: Path) -> None:
    """Writes towers, a ViLT or a BLIP from a directory of transformers into `out`, with the names and the order of ids
    that our stages read, and its tokenizer. `text`: the directory of a text encoder, if `directory` is only a vision
    encoder's. ValueError for a directory of another kind, or an incomplete one."""
    kind = kind_of(directory)
    if text is None and kind not in (whole := (*WHOLE, "vilt", "blip")):
        raise ValueError(
            f"{directory} holds a {kind}, not {', '.join(whole)} or what export to-hf wrote; of two encoders give the "
            "text's by --text"
        )
    model: Any
    tokenizer = JsonTokenizer((text or directory) / "tokenizer.json")
    if text is None and kind == "vilt":
        own, config = read_directory(directory, "ViltModel")
        check_words(directory, own["embeddings.text_embeddings.word_embeddings.weight"], tokenizer.own_ids)
        state, model = from_vilt(own, config, tokenizer.own_ids), vilt_config(config, tokenizer.vocab_size)
    elif text is None and kind == "blip":
        state, model = _blip(directory, tokenizer)
    elif text is None:
        state, model = read_whole(directory, tokenizer.own_ids)
    else:
        state, model = read_pair(directory, text, tokenizer.own_ids)
    write_weights(state, out / WEIGHTS, {"model": to_json(model)})
    write_file(out / tokenizer.file_name, tokenizer.path.read_bytes())


def _blip(directory: Path, tokenizer: JsonTokenizer) -> tuple[Any, Any]:
    names = read_object(directory / "config.json").get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in CLASSES:
        raise ValueError(f"{directory} holds a {name} of the kind blip; give a {' or a '.join(CLASSES)}")
    own, config = read_directory(directory, name)
    try:
        model = blip_config(config, tokenizer.vocab_size)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return from_blip(own, config, tokenizer.own_ids, directory), model
