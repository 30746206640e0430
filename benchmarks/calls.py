"""What a training step asks of a device, counted, so that no GPU is needed: calls of torch's kernels, and those among
them for whose answer the host would wait. Beside it what leaving out the padding is worth in time here, and what one
product for queries, keys and values would be.

    python -m benchmarks.calls --size quickstart --images 8 --pairs 8 --texts 8

One forward and backward pass of masked data modeling, without the optimizer. A wait is an answer that comes from a
weight or from the batch on its device: a number (`item`, `tolist`), or a shape that depends on values (`nonzero`, an
index of booleans). What is asked of the batch's copy on the host is not a wait. Times are CPU seconds of steps in
turns, on one thread; a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.attention import SIZES, random_batch
from benchmarks.record import machine
from pretrain.batch import PAD, Batch, Layout
from pretrain.command import about, make_parser, run, write
from pretrain.models.multiway import block
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import PretrainTask

# Kernels whose answer is a number for the host, or has a shape that depends on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "repeat_interleave"}
METHODS = ("tolist", "cpu", "numpy")  # these need no kernel on a CPU


class Calls(TorchDispatchMode):
    """Counts while it is entered: `names` of all kernels, `waits` of those that would wait. On the device are the
    tensors `given` and everything that is computed from them."""

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        # Storages are held, so that no address is used twice.
        self._on_device = {_address(value): value.untyped_storage() for value in given}
        self._plain = {name: getattr(Tensor, name) for name in METHODS}

    def __enter__(self) -> Calls:
        for name, plain in self._plain.items():
            setattr(Tensor, name, self._watched(name, plain))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name, plain in self._plain.items():
            setattr(Tensor, name, plain)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        self.names[name] += 1
        if any(self._is_on_device(value) for value in _tensors((args, kwargs or {}))):
            self._on_device |= {_address(value): value.untyped_storage() for value in _tensors(out)}
            indexes = _tensors(args[1]) if name.startswith(("index", "_index_put", "_unsafe_index")) else ()
            if name in WAITING or any(index.dtype == torch.bool for index in indexes):
                self.waits[name] += 1
        return out

    def _watched(self, name: str, plain: Any) -> Any:
        def method(value: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.waits[name] += self._is_on_device(value)
            return plain(value, *args, **kwargs)

        return method

    def _is_on_device(self, value: Tensor) -> bool:
        return _address(value) in self._on_device


def _address(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def on_device(batch: Batch) -> Batch:
    """The batch as it would be on a GPU, beside its copy on the host."""
    host = batch.indexed()
    assert host.index is not None
    return host.map(Tensor.clone).with_index(host.index.map(Tensor.clone), host)


def masked_batch(batch: Batch, mask_id: int) -> Batch:
    """The batch with 15 % of its words hidden, and random codes of its pictures."""
    pairs, texts = ((torch.rand(ids.shape) < 0.15) & (ids != PAD) for ids in (batch.pair_tokens, batch.text_tokens))
    inputs = [batch.pair_tokens.masked_fill(pairs, mask_id), batch.text_tokens.masked_fill(texts, mask_id)]
    codes = torch.randint(0, 16, batch.image_masks.shape)
    masked = {"pair_masked": pairs, "text_masked": texts, "pair_inputs": inputs[0], "text_inputs": inputs[1]}
    return replace(batch, image_codes=codes, **masked)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("benchmarks.calls", __doc__, "--images 2 --pairs 2 --texts 2 --rounds 1")
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    for kind in ("images", "pairs", "texts"):
        parser.add_argument(f"--{kind}", type=int, default=8, help="sequences of this kind (default: 8)")
    parser.add_argument("--pair-len", type=int, default=32)
    parser.add_argument("--text-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="of timed steps, one of each form (default: 15)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    cfg = SIZES[args.size]
    layout = Layout(args.images, args.pairs, args.texts, cfg.patches, args.pair_len, args.text_len)
    task = PretrainTask(cfg, ("vision", "language", "fusion"), (MaskedData(image_codes=16),))
    batch = on_device(masked_batch(random_batch(cfg, layout, "cpu", padded=True), cfg.vocab_size - 1))
    with Calls([*task.parameters(), *(value for _, value in batch.tensors())]) as calls:
        task(batch)["loss"].backward()
    assert batch.index is not None
    real = layout.rows if batch.index.real is None else len(batch.index.real.places)
    return {
        "size": args.size,
        "layout": vars(layout),
        "calls": calls.names.total(),
        "waits": calls.waits.total(),
        "waiting_calls": dict(calls.waits),
        "dearest": dict(calls.names.most_common(12)),
        "rows": {"of the layout": layout.rows, "no padding": batch.real_rows(), "in the blocks": real},
        "times_as_long": slower(task, batch, args.rounds),
    }


def slower(task: PretrainTask, batch: Batch, rounds: int) -> dict[str, float]:
    """How many times as long a step takes with its padding, and how many with one product for queries, keys, values."""
    assert batch.index is not None
    whole = batch.index._replace(real=None)
    padded = batch.with_index(whole, batch.on_host.with_index(whole, None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are CPU seconds too
    by_device, seconds = block.gains_by_fusing, dict[str, list[float]]()
    forms = {"now": (batch, by_device), "with padding": (padded, by_device), "one product": (batch, _always)}
    for _ in range(rounds + 1):
        for name, (given, fuses) in forms.items():
            block.gains_by_fusing = fuses  # type: ignore[assignment]
            task.zero_grad()
            begin = time.process_time()
            task(given)["loss"].backward()
            seconds.setdefault(name, []).append(time.process_time() - begin)
    torch.set_num_threads(threads)
    block.gains_by_fusing = by_device
    now = seconds.pop("now")[1:]  # the first round warms up
    ratios = {name: [a / b for a, b in zip(own[1:], now, strict=True)] for name, own in seconds.items()}
    return {name: round(statistics.median(own), 3) for name, own in ratios.items()}


def _always(rows: Tensor) -> bool:
    return True


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    write({**about("benchmarks.calls", argv), **machine("torch"), **measure(args)}, args.out)


if __name__ == "__main__":
    sys.exit(main())
