"""MIEB, mteb's tasks of pictures and texts, by its own tool: a dual encoder of ours is a model for `mteb.evaluate`.

    pip install 'mteb[image]'
    python -m pretrain.mieb runs/base/retrieval --tasks CIFAR10ZeroShot Flickr30kT2IRetrieval --out results/mieb
    python -m pretrain.mieb runs/base/retrieval --benchmark "MIEB(lite)" --out results/mieb

The weights are what pretrain.load reads (a stage's directory, a weights.safetensors, a released .pth). Data comes as
mteb fetches it, from the Hub or its local copy; results are mteb's own files in --out, and tasks that are there are not
run again. From Python: `mteb.evaluate(pretrain.mieb.Encoder(pretrain.load(PATH)), tasks)`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.checkpoint.weights import hash_tensor
from pretrain.command import make_parser, run
from pretrain.parallel.state import named_state
from pretrain.pretrained import Pretrained, load
from pretrain.visible import say

MODALITIES = ("image", "text")
LANGUAGES = ["eng-Latn"]  # mteb asks every model for its languages; nothing here depends on them


class Encoder:
    """`model` as an encoder of mteb (its EncoderProtocol, version 2.26). `name`: OWNER/NAME, for the table of results.
    ValueError for weights without a contrastive head, or without a text tokenizer."""

    def __init__(self, model: Pretrained, name: str = "imglish/model"):
        self.model, self.name = model, name
        self.width = model.head.width
        model.tokenizer()  # raises where there is none

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **options: Any,
    ) -> Tensor:
        """Batches with `image` (PIL pictures), `text`, or both -> float32 [N, E]: unit vectors, or for both the sum of
        the two, as in mteb's own CLIP models."""
        parts = [self._vectors(batch) for batch in inputs]
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def _vectors(self, batch: dict[str, Any]) -> Tensor:
        there = [name for name in MODALITIES if name in batch]
        if not there:
            raise ValueError(f"a batch holds {', '.join(sorted(batch))} and neither image nor text; choose other tasks")
        embed = {"image": self.model.embed_images, "text": self.model.embed_texts}
        return torch.stack([embed[name](list(batch[name])) for name in there]).sum(0)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines [N, M] of vectors [N, E] and [M, E]."""
        return _units(embeddings1) @ _units(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines [N] of the vectors [N, E] and [N, E], row by row."""
        return (_units(embeddings1) * _units(embeddings2)).sum(-1)

    @cached_property
    def mteb_model_meta(self) -> Any:
        """What mteb writes beside the results. Its revision names the weights, so that others are evaluated anew."""
        digest = hashlib.sha256()
        state = named_state(self.model.task)
        for key in sorted(state):
            hash_tensor(digest, key, state[key].detach().cpu())
        unknown = dict.fromkeys(("release_date", "memory_usage_mb", "license", "public_training_data"))
        return _imported("mteb.models").ModelMeta(
            loader=None,
            name=self.name,
            revision=digest.hexdigest()[:16],
            languages=LANGUAGES,
            n_parameters=sum(value.numel() for value in self.model.task.parameters()),
            max_tokens=self.model.model.max_text_len,
            embed_dim=self.width,
            open_weights=False,
            public_training_code=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=False,
            training_datasets=None,
            modalities=list(MODALITIES),
            **unknown,
        )


def _units(vectors: Any) -> Tensor:
    """float32 [N, E] of length 1; one vector [E] becomes [1, E]."""
    return F.normalize(torch.atleast_2d(torch.as_tensor(vectors)).float(), dim=-1)


def _imported(name: str) -> Any:
    """A module of mteb. ValueError where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch raises it
        first = str(error).splitlines()[0]
        raise ValueError(f"mteb cannot be imported ({first}); pip install 'mteb[image]'") from None


def main(arguments: list[str] | None = None) -> int:
    example = "runs/base/retrieval --tasks CIFAR10ZeroShot --out results/mieb"
    parser = make_parser("pretrain.mieb", __doc__, example)
    parser.add_argument("weights", type=Path, help="whatever pretrain.load reads, such as a stage's directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="NAME", help="of mteb")
    what.add_argument("--benchmark", metavar="NAME", help="a set of tasks, such as MIEB(lite)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for mteb's results")
    parser.add_argument("--text-tokenizer", type=Path, help="for weights that came without theirs")
    parser.add_argument("--name", default="imglish/model", metavar="OWNER/NAME", help="in the results (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="pictures or texts of one pass (%(default)s)")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="tasks that are done stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch} is below 1; use 64")
    mteb = _imported("mteb")
    try:
        tasks = mteb.get_benchmark(args.benchmark).tasks if args.benchmark else mteb.get_tasks(tasks=args.tasks)
    except (KeyError, ValueError) as error:
        raise ValueError(f"mteb does not know it: {str(error).strip(chr(34))}") from None
    encoder = Encoder(load(args.weights, text_tokenizer=args.text_tokenizer), args.name)
    cache = mteb.ResultCache(args.out)
    result = mteb.evaluate(encoder, tasks, cache=cache, encode_kwargs={"batch_size": args.batch}, co2_tracker=False)
    for each in result.task_results:
        say(f"{each.task_name}: {each.get_score():.4f}")


if __name__ == "__main__":
    sys.exit(main())
