"""Copies on the nodes: what two nodes hold of each other, what comes back when one is lost, and what must not."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import neighbours
from pretrain.checkpoint.copies import LOCAL, Copies, open_copies
from pretrain.checkpoint.directory import Retention
from pretrain.checkpoint.neighbours import Nodes
from pretrain.checkpoint.saver import FAILED, Saver
from pretrain.parallel.faults import Watch
from pretrain.run.resuming import find_start
from tests.checkpoint.stand_in import StandIn, install, restored_value
from tests.distributed import run_ranks
from tests.toys import full_beyond, wait_for

DIGESTS = {"recipe_hash": "r", "data_digest": "d"}


@pytest.mark.parametrize(
    ("of_ranks", "to"),
    [
        ("aabb", [2, 3, 0, 1]),
        ("abab", [1, 0, 3, 2]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),
        ("aaab", [3, 3, 3, 0]),  # SLURM may place a job so
        ("aa", [None, None]),
    ],
)
def test_each_rank_sends_to_one_of_the_next_node(of_ranks, to):
    nodes = Nodes(tuple(of_ranks))
    assert [nodes.neighbour(rank) for rank in range(len(to))] == to
    assert sorted(source for rank in range(len(to)) for source in nodes.senders(rank)) == [
        rank for rank, other in enumerate(to) if other is not None
    ]


def be_rank(root: Path, per_node: int = 2) -> tuple[int, str]:
    """This process is a rank of nodes that have directories of their own."""
    from pretrain.distributed import rank

    install(setattr)
    node = f"node{rank() // per_node}"
    os.environ.update({LOCAL: str(root / node), "SLURMD_NODENAME": node})
    logging.getLogger("pretrain").setLevel(logging.INFO)
    return rank(), node


def new_saver(copies: Copies, stage: Path) -> Saver:
    return Saver(StandIn(), stage / "checkpoints", Watch(), identity=DIGESTS, copies=copies)


def meet(saver: Saver) -> None:
    import torch

    from pretrain.distributed import highest

    (state,) = highest([saver.state], torch.device("cpu"))
    saver.advance(state)


def copy(saver: Saver, step: int) -> None:
    """After `step`, and until nothing is written any more."""
    saver.engine.value.fill_(step)
    saver.copy(step, {}, extra={"norms": [step]})
    for _ in range(2000):
        meet(saver)
        if not saver._pending:
            return
        wait_for(lambda: saver.state != 1)
    raise AssertionError("the copy did not end")


def start(stage: Path, rollbacks: int = 0) -> tuple[int, float] | None:
    """What a start of the run goes on with, on this rank."""
    open_copies(stage, rollbacks).bring_back(stage / "checkpoints", _newest(stage))
    return restored_value(stage / "checkpoints", **DIGESTS)


def _newest(stage: Path) -> int:
    from pretrain.checkpoint.save import newest

    found = newest(stage / "checkpoints", precision="fp32", **DIGESTS)
    return -1 if found is None else found.step


def held(root: Path) -> dict[str, list[str]]:
    """{node/step: the ranks whose moments lie there}."""
    return {
        f"{path.parents[1].name}/{path.name}": sorted(file.name[12:17] for file in path.glob("moments_rank*"))
        for path in root.glob("node*/imglish-*/copies/*/*/step_*")
    }


def two_nodes(root: str) -> list[object]:
    from pretrain.distributed import barrier

    place, said = Path(root), []
    number = be_rank(place)[0]
    stage = place / "shared" / "vision"
    stage.mkdir(parents=True, exist_ok=True)
    neighbours.CHUNK = 1000  # several pieces a file
    with new_saver(open_copies(stage, 0), stage) as saver:
        saver.engine.value.fill_(2)
        saver.save(2, {}, Retention(2))
        for step in (3, 4, 5):
            copy(saver, step)
        said.append(held(place))
        barrier()  # the next copy takes the oldest away
        # A node's disk is full: the run goes on, and the copy of before is still there.
        with full_beyond(1000) if number == 3 else nullcontext():
            copy(saver, 6)
        barrier()
        said.append(held(place))
        # While something is written a copy is left out, and a save waits for it.
        saver.engine.value.fill_(7)
        saver.copy(7, {})
        saver.copy(8, {})
        assert saver.step == 7
    barrier()
    if number == 0:
        shutil.rmtree(place / "node1")  # a new node takes its place
    barrier()
    said.append(start(stage))
    return said


def test_a_lost_node_takes_nothing_away(tmp_path):
    for first, second, value in run_ranks(two_nodes, 4, str(tmp_path)):
        everyone = ["00000", "00001", "00002", "00003"]
        assert first == {f"node{n}/step_{step:08d}": everyone for n in (0, 1) for step in (4, 5)}
        assert second == {f"node{n}/step_00000005": everyone for n in (0, 1)}
        assert value == (7, 7.0)
    shared = tmp_path / "shared" / "vision" / "checkpoints"
    assert sorted(path.name for path in shared.iterdir()) == ["step_00000002", "step_00000007"]


def what_comes_back(root: str) -> list[object]:
    from pretrain.distributed import barrier

    place, said = Path(root), []
    number, node = be_rank(place, per_node=1)
    stage = place / "shared" / "vision"
    stage.mkdir(parents=True, exist_ok=True)
    with new_saver(open_copies(stage, 0), stage) as saver:
        saver.engine.value.fill_(2)
        saver.save(2, {}, Retention(2))
        saver.finish()
        for step in (3, 4):
            copy(saver, step)
    barrier()
    (own,) = (place / node).glob("imglish-*/copies/*/*-0")
    # Rank 0's file of step 4 is damaged on its own node: the neighbour's is taken.
    if number == 0:
        (own / "step_00000004" / "moments_rank00000.safetensors").write_bytes(b"x")
    barrier()
    said.append(start(stage))
    barrier()
    # Both are: the copy before.
    if number == 0:
        shutil.rmtree(stage / "checkpoints" / "step_00000004")
    (own / "step_00000004" / "moments_rank00000.safetensors").write_bytes(b"x")
    barrier()
    said.append(start(stage))
    barrier()
    # No manifest, no copy.
    if number == 0:
        shutil.rmtree(stage / "checkpoints" / "step_00000003")
    (own / "step_00000003" / "MANIFEST.json").write_text("{}")
    barrier()
    said.append(start(stage))
    barrier()
    # A rollback takes copies away, and so does the end of a run that was removed.
    with new_saver(open_copies(stage, 0), stage) as saver:
        copy(saver, 5)
    barrier()
    said.append(start(stage, rollbacks=1))
    with new_saver(open_copies(stage, 1), stage) as saver:
        copy(saver, 6)
    barrier()
    if number == 0:
        shutil.rmtree(stage)
        stage.mkdir()
    barrier()
    said.append(start(stage))
    return [*said, sorted(path.name[32:] for path in own.parent.iterdir())]


def test_only_whole_copies_of_this_run_come_back(tmp_path):
    for said in run_ranks(what_comes_back, 2, str(tmp_path)):
        assert said == [(4, 4.0), (3, 3.0), (2, 2.0), (2, 2.0), None, ["-0"]]


def test_a_place_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(LOCAL, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"IMGLISH_LOCAL=.*cannot be used for copies .*set copy_every=0"):
        open_copies(tmp_path, 0)
    monkeypatch.delenv(LOCAL)
    with pytest.raises(ValueError, match="IMGLISH_LOCAL names none; export it"):
        open_copies(tmp_path, 0)


def test_another_users_place_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"imglish-{os.getuid()}").symlink_to(tmp_path / "theirs")
    monkeypatch.setenv(LOCAL, str(tmp_path))
    with pytest.raises(ValueError, match="is not ours"):
        open_copies(tmp_path, 0)


def test_a_run_without_copies_asks_for_no_place(tmp_path, monkeypatch, stand_ins):
    monkeypatch.delenv(LOCAL, raising=False)
    start = find_start(tmp_path, {}, "fp32", copied=False, names_digest="", **DIGESTS)
    assert start.copies is None and start.checkpoint is None


def test_no_copy_begins_while_a_thread_of_one_that_failed_elsewhere_still_sends(tmp_path, stand_ins):
    """The neighbour would take the messages of one for those of the other."""
    begun, go_on, dropped = list[int](), threading.Event(), list[int]()

    class Slow:
        first = True

        def write(self, snapshot: Any, before: Any) -> dict:
            begun.append(snapshot.about["step"])
            assert go_on.wait(30)
            raise OSError(errno.EIO, "the connection to a neighbour was lost")

        def drop(self, step: int) -> None:
            dropped.append(step)

    copies: Any = Slow()
    saver = new_saver(copies, tmp_path)
    saver.copy(1, {})
    wait_for(lambda: begun)
    saver.advance(FAILED)  # on another rank
    saver.copy(2, {})
    assert begun == [1] and dropped == []
    go_on.set()
    wait_for(lambda: saver.state == FAILED, 30)
    saver.advance(FAILED)
    assert dropped == [1]
    saver.copy(3, {})
    wait_for(lambda: begun == [1, 3], 30)
