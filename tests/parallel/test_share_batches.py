"""One rank of each group reads, and all of them see what each would have read for itself."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pretrain.batch import Batch, Layout, make_batch
from pretrain.data.shards.cache import ShardError
from pretrain.parallel.faults import Watch
from pretrain.parallel.mesh import create_mesh
from pretrain.parallel.share_batches import loads, share_batches
from pretrain.parallel.sizes import Parallel
from tests.distributed import run_ranks

STEPS = 3
# Of each: the ranks that read.
SIZES = {
    2: {
        Parallel(): [0, 1],
        Parallel(tensor=2): [0],
        Parallel(sequence=2): [0],
        Parallel(pipe=2): [0, 1],
    },
    4: {
        Parallel(tensor=2): [0, 2],
        Parallel(tensor=4): [0],
        Parallel(tensor=2, sequence=2): [0],
        Parallel(tensor=2, pipe=2): [0, 2],
        Parallel(pipe=4): [0, 3],
    },
}


def micro_batch(step: int, data: int, number: int) -> Batch:
    """All kinds, then texts alone, then images alone, as uint8 and as floats; with and without the rest."""
    made = torch.Generator().manual_seed(100 * step + 10 * data + number)
    images, pairs, texts = ((2, 1, 3), (0, 0, 2), (3, 0, 0))[step - 1]
    layout = Layout(images, pairs, texts, patches=4, pair_len=3, text_len=7)
    drawn = {name: torch.rand(layout.sequences, 4, generator=made) for name in ("drop_path", "mine")}
    rest: dict = {"draws": drawn, "extra": {"labels": torch.arange(pairs), "words": ("é",) * pairs}} if number else {}
    if number and step == 1:  # some pictures have more captions than others
        rest["extra"]["captions"] = tuple(torch.randint(9, (2 + n, 3), generator=made).numpy() for n in range(images))
    pixels = torch.randint(256, (images + pairs, 3, 4, 4), generator=made, dtype=torch.uint8)
    if step == 3:
        rest |= {"image_codes": torch.randint(20, (images, 4), generator=made)}
    return make_batch(
        layout,
        images=pixels.bfloat16() if step == 3 else pixels,
        image_masks=torch.rand(images + pairs, 4, generator=made) < 0.5,
        pair_tokens=torch.randint(9, (pairs, 3), generator=made),
        text_tokens=torch.randint(9, (texts, 7), generator=made),
        text_masked=torch.rand(texts, 7, generator=made) < 0.5,
        keys=tuple(f"images/00001/{step}é{n}" for n in range(layout.sequences)),
        **rest,
    )


def steps(data: int) -> list[list[Batch]]:
    return [[micro_batch(step, data, number) for number in range(2)] for step in range(1, STEPS + 1)]


def shared(sizes: dict[Parallel, list[int]]) -> list[bool]:
    """Of each size: whether this rank read. Asserts that what it sees is what it would have read."""
    read = []
    for parallel in sizes:
        mesh, asked = create_mesh(parallel), []

        def load(data: int = mesh.data.rank, asked: list = asked) -> Iterator[list[Batch]]:
            asked.append(True)
            yield from steps(data)

        batches = share_batches(load, mesh, Watch())
        between = mesh.pipe.rank not in (0, mesh.pipe.size - 1)
        for want in steps(mesh.data.rank):
            got = next(batches)
            assert len(got) == (0 if between else len(want))
            assert all(same(a, b) for a, b in zip(got, want, strict=False))
            if not loads(mesh):  # who loads gets an index from the loader
                known = [(a.index, b.indexed().index) for a, b in zip(got, want, strict=False)]
                assert all((a.hidden_counts, a.lengths) == (b.hidden_counts, b.lengths) for a, b in known if b)
        assert bool(asked) == loads(mesh)
        read.append(bool(asked))
    return read


def same(a: Batch, b: Batch) -> bool:
    one, two = dict(a.tensors()), dict(b.tensors())
    equal = all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in two)
    words = a.extra.get("words") == b.extra.get("words") and a.extra.keys() == b.extra.keys()
    several = zip(a.extra.get("captions", ()), b.extra.get("captions", ()), strict=True)
    words = words and all(one.dtype == two.dtype and np.array_equal(one, two) for one, two in several)
    return equal and words and one.keys() == two.keys() and (a.layout, a.keys) == (b.layout, b.keys)


@pytest.mark.parametrize("world", SIZES)
def test_every_rank_sees_what_it_would_have_read(world):
    read = run_ranks(shared, world, SIZES[world])
    for place, readers in enumerate(SIZES[world].values()):
        assert [rank for rank in range(world) if read[rank][place]] == readers


ERRORS = (
    ShardError("00001.tar ends early; run python -m data_tools.verify"),
    OSError(errno.EIO, "Input/output error", "00002.tar"),
    RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."),
    TimeoutError("cannot fetch 00003.tar"),
)


def failing(parallel: Parallel) -> list[tuple[str, ...]]:
    """What each of the errors became on this rank, at the second step of data rank 0."""
    mesh, errors = create_mesh(parallel), []
    for error in ERRORS:

        def load(error: Exception = error) -> Iterator[list[Batch]]:
            yield steps(0)[0]
            raise error

        batches = share_batches(load, mesh, Watch())
        next(batches)
        with pytest.raises(Exception) as met:
            next(batches)
        kinds = [kind.__name__ for kind in (RuntimeError, TimeoutError) if isinstance(met.value, kind)]
        errors.append((*kinds, str(met.value)))
    return errors


@pytest.mark.parametrize(("world", "parallel"), [(2, Parallel(tensor=2)), (4, Parallel(tensor=2, sequence=2))])
def test_what_the_reader_meets_is_said_on_all_ranks(world, parallel):
    for errors in run_ranks(failing, world, parallel):
        assert errors == [
            ("00001.tar ends early; run python -m data_tools.verify",),
            ("[Errno 5] Input/output error: '00002.tar'",),
            ("RuntimeError", "DataLoader worker (pid 3) is killed by signal: Killed."),
            ("TimeoutError", "cannot fetch 00003.tar"),
        ]
