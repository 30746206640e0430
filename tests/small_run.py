"""A recipe and data small enough that a stage runs in seconds, and how tests start one as a user does."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.distributed import CONTEXT
from tests.toys import image_sample, pair_sample, text_sample, write_source

ROOT = Path(__file__).parents[1]
RECIPE = """
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.mixture import Loading
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
OPTIM, MASKED = Optim(lr=1e-3, warmup_steps=2), MaskedData(image_codes=16)
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

WORDS = "a red blue green big small round square dog cat runs sits on the grass table near far"


def write_data(data: Path) -> Path:
    """Three sources of a few shards, a text tokenizer, and recipe.py."""
    from data_tools.train_text_tokenizer import train

    words = WORDS.split()
    captions = [" ".join(words[(i * k) % len(words)] for k in (1, 2, 3, 5, 7)) for i in range(1, 80)]
    images = [[image_sample(f"i{s}{i}", s * 10 + i) for i in range(10)] for s in range(3)]
    pairs = [[pair_sample(f"p{s}{i}", 30 + s * 10 + i, captions[s * 10 + i]) for i in range(10)] for s in range(3)]
    texts = [[text_sample(f"t{s}{i}", " ".join(captions[i : i + 4])) for i in range(10)] for s in range(3)]
    for name, shards in (("images", images), ("pairs", pairs), ("texts", texts)):
        write_source(data / name, shards)
    train([str(data / "texts"), str(data / "pairs")], data / "text.model", 48, model_type="bpe")
    (data / "recipe.py").write_text(RECIPE)
    return data


def tokenizer_of(data: Path) -> str:
    """The setting with which a later stage takes the tokenizer of the fixture `data`."""
    return f"visual_tokenizer={data / 'start' / 'tokenizer' / 'weights.safetensors'}"


def environment(data: Path) -> dict[str, str]:
    return os.environ | {"DATA": str(data), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}


def command(data: Path, run_dir: Path, stage: str, *settings: str, ds: str | Path = "zero0.json") -> list[str]:
    path = ds if Path(ds).is_absolute() else ROOT / "ds_configs" / ds
    line = [sys.executable, "-m", "pretrain.train", "--recipe", str(data / "recipe.py"), "--stage", stage]
    return [*line, "--ds", str(path), "--run-dir", str(run_dir), *(word for s in settings for word in ("--set", s))]


def train_stage(
    data: Path,
    run_dir: Path,
    stage: str,
    *settings: str,
    ds: str | Path = "zero0.json",
    launched: bool = False,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """One process, with what it said."""
    line = command(data, run_dir, stage, *settings, ds=ds)
    return run_line(line, environment(data) | env, launched=launched)


def evaluate(
    data: Path, run_dir: Path, stage: str, recipe: Path | None = None, *more: str
) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pretrain.evaluate", "--run-dir", str(run_dir), "--stage", stage]
    line += ["--recipe", str(recipe or data / "recipe.py"), *more]
    return run_line(line, environment(data))


def run_line(
    line: list[str], environment: dict[str, str], *, launched: bool = False, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE WORDS` with this whole environment, in a process that is forked with everything imported, so
    that it starts at once and not after five seconds; with `launched` in a new interpreter, as a user starts it."""
    if launched:
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=seconds)
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = CONTEXT.Process(target=_command, args=(line, environment, out, err))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(line, seconds, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(line, process.exitcode, out.read_text(), err.read_text())


def check_weights(stage: Path, other: Path, most: float = 0.0) -> None:
    """The weights that two runs ended with are apart by `most` at the most; 0: equal to the bit."""
    import torch

    from pretrain.checkpoint.weights import read_weights

    got, want = (read_weights(path / "weights.safetensors")[0] for path in (stage, other))
    torch.testing.assert_close(got, want, rtol=0, atol=most)


class Ranks:
    """`n` ranks of one run with the arguments of a `command`; `prepare(rank)` is called in each before it begins.

    They are forked with everything imported, so that a start takes a second and not five; with `launched` each is a new
    interpreter, as a launcher starts it. What is in this process's environment they may not see: the server that they
    are forked from may be older.
    """

    def __init__(
        self,
        line: list[str],
        data: Path,
        n: int,
        log: Path,
        prepare: Callable[[int], None] | None = None,
        launched: bool = False,
        **more: str,
    ):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        place = environment(data) | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(n)} | more
        self.processes = [
            CONTEXT.Process(
                target=_launched if launched else partial(_forked, prepare),
                args=(line, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log),
            )
            for rank in range(n)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float, *ranks: int) -> list[int | None]:
        """Exit codes of `ranks` (all) after at most so long; None for one that still runs, -9 after a kill."""
        deadline = time.monotonic() + seconds
        chosen = [self.processes[rank] for rank in ranks] or self.processes
        for process in chosen:
            process.join(max(deadline - time.monotonic(), 0.01))
        return [process.exitcode for process in chosen]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait(10)


def _launched(line: list[str], environment: dict[str, str], log: Path) -> None:
    _write_to(log)
    os.execve(line[0], line, environment)


def _forked(prepare: Callable[[int], None] | None, line: list[str], environment: dict[str, str], log: Path) -> None:
    _write_to(log)
    os.environ.update(environment)
    _begin()
    from pretrain import train

    if prepare is not None:
        prepare(int(environment["RANK"]))
    code = train.main(line[line.index("pretrain.train") + 1 :])
    sys.stderr.flush()
    os._exit(code)


def _command(line: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    _write_to(out, err)
    os.environ.clear()
    os.environ.update(environment)
    _begin()
    _, _, module, *words = line
    sys.argv = [module, *words]
    sys.exit(importlib.import_module(module).main(words))


def _begin() -> None:
    """As if this interpreter were new."""
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the data workers; a forked rank inherits "forkserver"


def _write_to(out: Path, err: Path | None = None) -> None:
    for number, path in ((1, out), (2, err or out)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
