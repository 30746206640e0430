"""The standard benchmarks by their own tool, clip_benchmark (LAION's, and DataComp's 38 sets): --model_type imglish
makes a dual encoder of ours known to its command line, and all other options are the tool's own.

    pip install clip-benchmark
    python -m pretrain.clip_benchmark eval --model_type imglish --model base --pretrained runs/base/retrieval \\
        --task zeroshot_retrieval --recall_k 1 5 10 --dataset wds/mscoco_captions --dataset_root ROOT --output out.json

`--pretrained` is what pretrain.load reads (a stage's directory, a weights.safetensors, a released .pth), and `--model`
a name for the table. With --no_amp it computes in float32, as pretrain.evaluate does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from pretrain.command import run
from pretrain.pretrained import Pretrained, load

TYPE = "imglish"


class DualEncoder(nn.Module):
    """`model` with the methods that clip_benchmark calls, whose inputs `transform` and `tokenizer` make. ValueError for
    weights without a contrastive head, or without a text tokenizer."""

    def __init__(self, model: Pretrained):
        super().__init__()
        self.model = model
        _ = model.head, model.tokenizer()  # each raises where there is none

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> unit vectors [N, E], on the device of the pixels."""
        return self.model.embed_looks(pixels.cpu()).to(pixels.device)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [N, L] -> unit vectors [N, E], on the device of the tokens."""
        return self.model.embed_tokens(tokens.cpu()).to(tokens.device)

    def transform(self, picture: Image.Image) -> Tensor:
        """-> uint8 [3, S, S], made as in the stage's own evaluation."""
        return self.model.look(picture)

    def tokenizer(self, texts: Sequence[str]) -> Tensor:
        """-> ids, int64 [N, L], padded with PAD."""
        return self.model.tokens([texts] if isinstance(texts, str) else list(texts))


def load_for_benchmark(
    model_name: str, pretrained: str, cache_dir: str | None = None, device: Any = "cpu"
) -> tuple[nn.Module, Callable, Callable]:
    """(model, transform, tokenizer), which clip_benchmark asks every type of model for."""
    model = DualEncoder(load(pretrained, device=device))
    return model, model.transform, model.tokenizer


def register() -> None:
    """Adds our type to clip_benchmark's. ValueError where it is not installed."""
    try:
        models: Any = importlib.import_module("clip_benchmark.models")
    except ImportError as error:
        raise ValueError(f"clip_benchmark cannot be imported ({error}); pip install clip-benchmark") from None
    models.TYPE2FUNC[TYPE] = load_for_benchmark
    if TYPE not in models.MODEL_TYPES:  # the list that its parser holds
        models.MODEL_TYPES.append(TYPE)


def main(arguments: list[str] | None = None) -> int:
    return run(lambda: _run(arguments), state="clip_benchmark writes a file for each set when it is done")


def _run(arguments: list[str] | None) -> None:
    if set(sys.argv[1:] if arguments is None else arguments) & {"-h", "--help"}:
        print(__doc__)
    register()
    cli: Any = importlib.import_module("clip_benchmark.cli")
    before = sys.argv
    sys.argv = ["clip_benchmark", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        cli.main()
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())
