"""Converts weights between our directories (weights.safetensors and config.json) and other formats: the released
BEiT-3's, Hugging Face's, open_clip's and ONNX; also prunes, resizes and merges them.

    python -m pretrain.export from-released beit3_base_patch16_224.pth runs/beit3_base
    python -m pretrain.export to-released runs/mine/fusion beit3_mine.pth
    python -m pretrain.export to-hf runs/mine/retrieval hf/mine
    python -m pretrain.export to-open-clip runs/clip/retrieval open_clip/mine
    python -m pretrain.export to-onnx runs/mine/retrieval onnx/mine --int8
    python -m pretrain.export prune runs/mine/retrieval runs/mine/pruned --heads 8
    python -m pretrain.export resize runs/beit3_base runs/beit3_base_384 --image-size 384
    python -m pretrain.export merge runs/base/fusion runs/mine/retrieval/adapters.safetensors runs/merged
    python -m pretrain.export from-hf clip-vit-base-patch16 runs/clip
    python -m pretrain.export from-hf resnet-50 runs/start --text bert-base-uncased

pretrain/released_names.py lists the released names. to-hf writes a Hugging Face directory, which
AutoModel.from_pretrained(DIR, trust_remote_code=True) reads without this package, by three small files of code in it.
to-open-clip writes towers of CLIP's architecture as open_clip.create_model_and_transforms("local-dir:DIR") loads them.
to-onnx (it needs the extra onnx) writes a graph for pictures, one for texts and one for both fused, as far as the
weights have their parts. The graphs take any number of pictures and texts, texts of any length, and, from Multiway
encoders, pictures of any size that the patches divide; model.json beside them describes inputs, outputs, preprocessing
and tokenizer.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from pretrain import command
from pretrain.checkpoint.weights import WEIGHTS, with_adapters, write_weights
from pretrain.config import to_json
from pretrain.data.text_tokenizer import BESIDE_WEIGHTS, TOKENIZER, TextTokenizer, open_tokenizer
from pretrain.files import write_file
from pretrain.hub import open_clip
from pretrain.hub.read import is_ours, read_directory
from pretrain.hub.write import evaluation_look, write_directory
from pretrain.models.multiway.prune import keep_heads, zero_smallest
from pretrain.models.towers.dual import DualTowers
from pretrain.onnx import write as onnx
from pretrain.released_weights import (
    from_released,
    read_model,
    read_tensors,
    resize_positions,
    to_released,
    with_projections,
    write_tensors,
)
from pretrain.run.huggingface import from_huggingface
from pretrain.stored_model import read_stored, stored_tokenizer
from pretrain.visible import start_logging

log = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    example = "from-released beit3_base_patch16_224.pth runs/beit3_base"
    parser = command.make_parser("pretrain.export", __doc__, example)
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("from-released", help="a released BEiT-3 file -> a directory of ours")
    reading.add_argument("file", type=Path, help=".pth or .safetensors with the released names")
    reading.add_argument("out", type=Path, help="new directory for weights.safetensors and config.json")
    reading.add_argument("--heads", type=int, help="attention heads; default: width / 64, as in all released sizes")
    writing = commands.add_parser("to-released", help="a directory of ours -> a file with the released names")
    writing.add_argument("directory", type=Path, help="a stage's directory, with weights.safetensors and config.json")
    writing.add_argument("out", type=Path, help=".pth (as unilm's code loads it) or .safetensors")
    handing = commands.add_parser("to-hf", help="a directory of ours -> a Hugging Face directory with its own code")
    handing.add_argument("directory", type=Path, help="a stage's directory, with weights.safetensors and config.json")
    handing.add_argument("out", type=Path, help="a new directory")
    handing.add_argument("--text-tokenizer", type=Path, help="the SentencePiece model, where none lies beside them")
    opening = commands.add_parser("to-open-clip", help="a stage of CLIP's towers -> a directory of open_clip")
    opening.add_argument("weights", type=Path, help="a stage's directory, or a weights.safetensors")
    opening.add_argument("out", type=Path, help="a new directory")
    opening.add_argument("--text-tokenizer", type=Path, help="where none lies beside them")
    graphs = commands.add_parser("to-onnx", help="a stage's weights -> vision.onnx, text.onnx, fusion.onnx")
    graphs.add_argument("weights", type=Path, help="whatever pretrain.load reads, or a stage of dual towers")
    graphs.add_argument("out", type=Path, help="a new directory")
    graphs.add_argument("--text-tokenizer", type=Path, help="where none lies beside them")
    graphs.add_argument("--int8", action="store_true", help="beside each file one whose matrices are int8")
    taking = commands.add_parser(
        "from-hf", help="CLIP, SigLIP, ALIGN, ViLT, BLIP, two encoders, what to-hf wrote -> ours"
    )
    taking.add_argument("directory", type=Path, help="config, safetensors, tokenizer; with --text a vision encoder")
    taking.add_argument("out", type=Path, help="new directory, for a recipe's init_from")
    taking.add_argument("--text", type=Path, help="a text encoder's directory")
    pruning = commands.add_parser("prune", help="the smallest weights at 0, or fewer heads")
    pruning.add_argument("directory", type=Path)
    pruning.add_argument("out", type=Path)
    less = pruning.add_mutually_exclusive_group(required=True)
    less.add_argument("--zeros", type=float, help="the share of each of the blocks' matrices that becomes 0")
    less.add_argument("--heads", type=int, help="how many heads each block keeps (a stage: --set model.head_dim=...)")
    resizing = commands.add_parser("resize", help="interpolate the positions for another picture size")
    resizing.add_argument("directory", type=Path)
    resizing.add_argument("out", type=Path)
    resizing.add_argument("--image-size", type=int, required=True, help="pixels")
    merging = commands.add_parser("merge", help="weights, and the adapters of a stage with lora -> one directory")
    merging.add_argument("base", type=Path, help="what that stage's init_from named")
    merging.add_argument("adapters", type=Path, help="the stage's adapters.safetensors")
    merging.add_argument("out", type=Path, help="new directory")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.command == "from-released":
        state, cfg = from_released(read_tensors(args.file), args.heads, args.file)
        write_weights(state, args.out / WEIGHTS, {"model": to_json(cfg)})
    elif args.command == "merge":
        whole, config = with_adapters(args.base, args.adapters)
        write_weights(whole, args.out / WEIGHTS, config)
        _bring_tokenizer(args.adapters if args.adapters.is_dir() else args.adapters.parent, args.out)
    elif args.command == "to-released":
        state, cfg, _ = read_model(args.directory)
        write_tensors(args.out, to_released(state, cfg))
    elif args.command == "to-hf":
        state, cfg, config = read_model(args.directory)
        beside = args.text_tokenizer or args.directory / TOKENIZER
        if args.text_tokenizer is not None:
            TextTokenizer(beside)  # ValueError for what is none
            stored_tokenizer(args.directory, beside)  # ValueError for another than the weights came with
        text = beside if beside.is_file() else None
        state = with_projections(state, cfg.dim)
        write_directory(state, cfg, args.out, source=args.directory, config=config, text=text)
    elif args.command == "to-open-clip":
        _to_open_clip(args.weights, args.out, args.text_tokenizer)
    elif args.command == "to-onnx":
        onnx.write_directory(args.weights, args.out, text_tokenizer=args.text_tokenizer, int8=args.int8)
    elif args.command == "from-hf" and not (args.text is None and is_ours(args.directory)):
        from_huggingface(args.directory, args.text, args.out)
    elif args.command == "from-hf":
        state, cfg, config = read_directory(args.directory)
        write_weights(state, args.out / WEIGHTS, config | {"model": to_json(cfg)})
        if (text := args.directory / TOKENIZER).is_file():
            write_file(args.out / TOKENIZER, text.read_bytes())
    elif args.command == "prune":
        state, cfg, config = read_model(args.directory)
        if args.heads is None:
            state = zero_smallest(state, args.zeros)
        else:
            state, cfg = keep_heads(state, cfg, args.heads)
        write_weights(state, args.out / WEIGHTS, config | {"model": to_json(cfg)})
        _bring_tokenizer(args.directory, args.out)
    else:
        state, cfg, config = read_model(args.directory)
        state, cfg = resize_positions(state, cfg, args.image_size)
        write_weights(state, args.out / WEIGHTS, config | {"model": to_json(cfg)})
        _bring_tokenizer(args.directory, args.out)
    log.info("wrote %s", args.out)


def _to_open_clip(weights: Path, out: Path, text_tokenizer: Path | None) -> None:
    state, model, config = read_stored(weights, (DualTowers,))
    beside = stored_tokenizer(weights if weights.is_dir() else weights.parent, text_tokenizer)
    text = None if beside is None else open_tokenizer(beside)
    open_clip.write_directory(state, model, out, evaluation=evaluation_look(config), text=text, where=weights)
    if text is None:
        log.warning("%s came without a text tokenizer, so none is written; see --text-tokenizer", weights)


def _bring_tokenizer(directory: Path, out: Path) -> None:
    """Copies the text tokenizer beside the new weights, if the old weights' is known: the new directory has no
    recipe.json that would name it."""
    if (text := stored_tokenizer(directory)) is not None:
        write_file(out / BESIDE_WEIGHTS[text.suffix == ".json"], text.read_bytes())


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_logging("%(message)s")
    logging.getLogger().setLevel(logging.INFO)
    return command.run(lambda: run(args), state="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
