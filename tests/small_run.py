"""A recipe and data small enough that a stage runs in seconds, and how tests start one as a user does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.data.shard_files import image_sample, pair_sample, text_sample, write_source

ROOT = Path(__file__).parents[1]
RECIPE = """
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.loader import Loading
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.data.transforms import ImageTransform
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
from pretrain.tasks.tokenizer import TrainTokenizer

IMAGES, PAIRS = ImageShards("$DATA/images"), PairShards("$DATA/pairs", text_len=8)
TEXTS = TextShards("$DATA/texts", text_len=10)
LOOK = ImageTransform(size=16, scale=(0.8, 1.0), jitter=0.1)
OPTIM = Optim(lr=1e-3, warmup_steps=2)
MODEL = MultiwayConfig(dim=32, depth=2, heads=2, ffn_dim=64, image_size=16, patch_size=4, vocab_size=64,
                       max_text_len=16, fusion_layers=1, init_std=0.1)
VQ = VQKDConfig(dim=16, depth=1, heads=2, decoder_depth=1, image_size=16, patch_size=4, codes=16, code_dim=4,
                target_dim=48, distill="mse")
MASKED = MaskedData(image_codes=16)
FUSION = Stage(mix={"images": IMAGES, "pairs": PAIRS, "texts": TEXTS}, batch=BatchSize(images=4, pairs=4, texts=4),
               objectives=(MASKED,), visual_tokenizer="tokenizer", transform=LOOK, optim=OPTIM, steps=12,
               drop_path=0.2, evals=(MaskedAccuracy({"images": IMAGES, "pairs": PAIRS, "texts": TEXTS}, batch=8),))
RECIPE = Recipe(name="small", model=MODEL, text_tokenizer="$DATA/text.model", log_every=1, save_every=1, keep=2,
                loading=Loading(workers=0, streams=4, block_shards=2), trace_samples=True, stages={
    "tokenizer": Stage(mix={"images": IMAGES}, batch=BatchSize(images=8), model=VQ, task=TrainTokenizer(),
                       transform=LOOK, optim=OPTIM, steps=3),
    "vision": Stage(mix={"images": IMAGES}, batch=BatchSize(images=8), experts=("vision",), objectives=(MASKED,),
                    visual_tokenizer="tokenizer", transform=LOOK, optim=OPTIM, steps=3,
                    evals=(MaskedAccuracy({"images": IMAGES}, batch=8),)),
    "language": Stage(mix={"texts": TEXTS}, batch=BatchSize(texts=8), experts=("language",), init_from="vision",
                      trainable=("encoder.text_embed.*", "encoder.blocks.*.experts.language.*", "encoder.norm.*",
                                 "objectives.*"),
                      objectives=(MASKED,), optim=OPTIM, steps=3),
    "fusion": FUSION,
    "retrieval": Stage(mix={"dual": PAIRS}, batch=BatchSize(dual=8), experts=("vision", "language"),
                       init_from="fusion", objectives=(Contrastive(),), transform=LOOK, optim=OPTIM, steps=3,
                       evals=(Retrieval(PAIRS, batch=8),)),
})
"""


def write_data(data: Path) -> None:
    """Three sources of a few shards, a text tokenizer, and recipe.py."""
    from data_tools.train_text_tokenizer import train

    words = [
        "a",
        "red",
        "blue",
        "green",
        "big",
        "small",
        "round",
        "square",
        "dog",
        "cat",
        "runs",
        "sits",
        "on",
        "the",
        "grass",
        "table",
        "near",
        "far",
    ]
    captions = [" ".join(words[(i * k) % len(words)] for k in (1, 2, 3, 5, 7)) for i in range(1, 80)]
    numbers = iter(range(1000))
    write_source(data / "images", [[image_sample(f"i{s}{i}", next(numbers)) for i in range(10)] for s in range(3)])
    write_source(
        data / "pairs",
        [[pair_sample(f"p{s}{i}", next(numbers), captions[s * 10 + i]) for i in range(10)] for s in range(3)],
    )
    write_source(
        data / "texts", [[text_sample(f"t{s}{i}", " ".join(captions[i : i + 4])) for i in range(10)] for s in range(3)]
    )
    train([str(data / "texts"), str(data / "pairs")], data / "text.model", 48, model_type="bpe")
    (data / "recipe.py").write_text(RECIPE)


def environment(data: Path) -> dict[str, str]:
    return os.environ | {"DATA": str(data), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def command(data: Path, run_dir: Path, stage: str, *settings: str, ds: str | Path = "zero0.json") -> list[str]:
    path = ds if Path(ds).is_absolute() else ROOT / "ds_configs" / ds
    line = [sys.executable, "-m", "pretrain.train", "--recipe", str(data / "recipe.py"), "--stage", stage]
    return [*line, "--ds", str(path), "--run-dir", str(run_dir), *(word for s in settings for word in ("--set", s))]


def train_stage(data: Path, run_dir: Path, stage: str, *settings: str, ds: str | Path = "zero0.json", **env: str):
    """One process, as a user starts it -> CompletedProcess with text output."""
    line = command(data, run_dir, stage, *settings, ds=ds)
    return subprocess.run(line, env=environment(data) | env, capture_output=True, text=True, timeout=120)


class Ranks:
    """`n` ranks of one run, as a launcher starts them; `kill` is kill -9 for all."""

    def __init__(self, line: list[str], data: Path, n: int, log: Path):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
        self.log = log.open("ab")
        self.processes = [
            subprocess.Popen(
                line,
                env=environment(data) | place | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=self.log,
                stderr=self.log,
            )
            for r in range(n)
        ]

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes after at most so long; None for a rank that still runs."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                return [p.poll() for p in self.processes]
        return [p.returncode for p in self.processes]

    def kill(self, number: int = signal.SIGKILL) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.wait()
            self.log.close()
