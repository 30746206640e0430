"""Checkpoints that are written while training goes on.

A save has three parts. The *snapshot* copies into host memory what each rank writes; for this alone training waits. The
*write* of each rank's files, and on rank 0 the *publishing* (MANIFEST.json, the rename, the removal of old
checkpoints), run on a thread of their own.

No collective ever runs on that thread. gloo and NCCL match the calls of the ranks by their order alone: one of a second
thread would come between two calls of a step on one rank, and between two others on the next. So the ranks meet where
they meet anyway, in the all-reduce at the end of each step: `state` goes in, and `advance` is given the highest one.

- Some rank still writes, or rank 0 publishes: the step ends, and nothing else happens.
- No rank writes any more: rank 0 begins to publish.
- A write failed on some rank: every rank waits for its own and raises SaveError, at this same step.

The names, sizes and hashes of a rank's files come to rank 0 in one more small file, SHARE, which is synced last. So a
checkpoint can also be completed where the ranks may not call each other any more: when an exception ends one of them,
each waits for its own write, and rank 0 for the others' files, for GRACE_S at the most. A kill at any moment leaves a
directory without a manifest, which does not exist for `newest`, as a kill in a plain save does.

One snapshot is in memory at a time: a save that comes while the one before is still being written waits for it. A
second one would not help a disk that takes longer for a checkpoint than training does to the next.

A copy on the nodes (copies.py) goes the same way, but that its entries are gathered where the ranks meet, and that it
is never waited for by training: where something is still being written it is left out, and where it fails a line says
so and the run goes on.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.copies import Copies
from pretrain.checkpoint.directory import Retention, place_of, prune, publish
from pretrain.checkpoint.neighbours import Entries
from pretrain.checkpoint.save import begin, save, together
from pretrain.checkpoint.snapshot import HostCopies, Snapshot, take_snapshot, write_snapshot
from pretrain.checkpoint.weights import SaveError
from pretrain.distributed import fail_together, gather_objects, rank, world_size
from pretrain.files import beside, write_json
from pretrain.json_files import read_object
from pretrain.parallel.faults import GRACE_S, WAY_OUT, Watch
from pretrain.parallel.state import full_state

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh

log = logging.getLogger("pretrain")

IDLE, BUSY, FAILED = range(3)  # what this rank's thread does
SHARE = ".share_rank{:05d}.json"
LONG_S = 1.0  # a longer wait for the save before is named in the log


class Saver:
    """Saves a run's checkpoints into `directory`; `identity` is recipe_hash and data_digest. `background`: False writes
    each one before training goes on. Every rank makes one, and calls the same methods at the same steps.

    As a context it ends with the last write: without an exception as `finish`, with one without a collective.
    """

    def __init__(
        self,
        engine,
        directory: Path,
        watch: Watch,
        *,
        mesh: Mesh | None = None,
        identity: dict[str, str] | None = None,
        background: bool = True,
        copies: Copies | None = None,
    ):
        self.engine, self.directory, self.watch, self.mesh = engine, directory, watch, mesh
        self.identity, self.background, self.copies = identity or {}, background, copies
        self.step = 0  # of the newest checkpoint or copy that was asked for
        self._copies = HostCopies()
        self._about: dict[str, Any] = {}
        self._retention = Retention()
        self._pending = self._publishing = False  # on every rank alike: a write, or the publishing, is under way
        self._copying = False  # and of a copy
        self._job: _Job | None = None
        self._entries: Entries = {}  # of the copy, this rank's

    @property
    def gib(self) -> float:
        """Of host memory that this rank's snapshots take."""
        return self._copies.gib

    @property
    def state(self) -> int:
        return IDLE if self._job is None else self._job.state

    def advance(self, highest: int) -> None:
        """At the end of a step, with the highest `state` of all ranks. Raises SaveError on all of them."""
        if not self._pending or highest == BUSY:
            return
        if self._copying:
            self._advance_copy(highest)
        elif highest == FAILED:
            self.finish()
        elif self._publishing:
            self._pending = False
        else:
            self._publish()

    def save(
        self,
        step: int,
        config: dict[str, Any],
        retention: Retention,
        before: Iterable[Callable[[], None]] = (),
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Takes the snapshot after `step`. A collective. `config`: of the weights; `before`: what is to be on disk
        before this checkpoint is, such as the lines of metrics up to it; `extra`: JSON that `newest` gives back. Raises
        SaveError on every rank: for this one, or for the one before."""
        start = time.monotonic()
        if self.finish() and (waited := time.monotonic() - start) > LONG_S:
            log.info("step %d: waited %.1f s for the checkpoint before, which was still being written", step, waited)
        self.watch.enter(f"the save of step {step}", patient=True)
        self.step = step
        if not self.background:
            with together(self.directory, step):
                fail_together(lambda: _call(before))
            whole: dict[str, Any] = {"weights": (full_state(self.engine, self.mesh), config), **self.identity}
            whole["extra"] = extra
            save(self.engine, self.directory, step, mesh=self.mesh, retention=retention, **whole)
            return
        place = begin(self.directory, step)
        snapshot = self._snapshot(step, config, extra)
        self._retention = retention
        self._job = _Job(lambda: _write(snapshot, place, tuple(before)))

    def copy(
        self,
        step: int,
        config: dict[str, Any],
        before: Iterable[Callable[[], None]] = (),
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Begins a copy on the nodes after `step`, as `save`; left out where the one before is still being written. A
        collective."""
        if self.copies is None or self._pending:
            return
        copies = self.copies
        self.watch.enter(f"the copy of step {step}")
        self.step = step
        snapshot = self._snapshot(step, config, extra)
        self._copying = True
        self._job = _Job(lambda: self._entries.update(copies.write(snapshot, tuple(before))))

    def _snapshot(self, step: int, config: dict[str, Any], extra: dict[str, Any] | None) -> Snapshot:
        about = {"step": step, "recipe_hash": "", "data_digest": "", "extra": extra or {}, **self.identity}
        state = full_state(self.engine, self.mesh, lambda name, value: self._copies.copy(f"weights/{name}", value))
        snapshot = take_snapshot(self.engine, self.mesh, about, (state, config), self._copies)
        if not self._about:
            log.info(
                "checkpoints are copied to %.2f GiB of host memory, and written behind the steps", self._copies.gib
            )
        self._about, self._entries = snapshot.about, {}
        self._pending, self._publishing, self._copying = True, False, False
        return snapshot

    def _advance_copy(self, highest: int) -> None:
        """A collective."""
        assert self.copies is not None
        copies, about = self.copies, self._about
        if highest == FAILED:
            problems = gather_objects("" if self._job is None or self._job.error is None else str(self._job.error))
            number, problem = next((number, said) for number, said in enumerate(problems) if said)
            log.warning("no copy of step %d on the nodes: rank %d: %s", self.step, number, problem)
            copies.drop(self.step)
            self._job, self._pending = None, False
        elif self._publishing:
            self._pending = False
        else:
            self._publishing = True
            shares = gather_objects(self._entries)
            if copies.first:
                self._job = _Job(lambda: copies.publish(about, shares))

    def _finish_copy(self) -> None:
        while self._pending:
            if self._job is not None:
                self._job.join()
            self._advance_copy(max(gather_objects(self.state)))

    def finish(self) -> bool:
        """Waits until the newest checkpoint is complete. A collective; whether there was one to wait for. Raises
        SaveError on every rank."""
        if not self._pending:
            return False
        self.watch.enter(f"the end of the {'copy' if self._copying else 'save'} of step {self.step}", patient=True)
        if self._copying:
            self._finish_copy()
            return True
        try:
            with together(self.directory, self.step):
                fail_together(self._wait)
                if not self._publishing:
                    self._publish()
                    fail_together(self._wait)
        except SaveError:
            self._pending = False
            raise
        self._pending = False
        return True

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        elif self._pending and not self._copying:
            self._finish_alone()

    def _finish_alone(self) -> None:
        self.watch.extend()  # what ended the run names the part that it was in
        try:
            self._wait()
            if not self._publishing and rank() == 0:
                self._await_shares()
                self._publish()
                self._wait()
        except OSError as error:
            log.warning("the checkpoint of step %d is not complete: %s; %s", self.step, error, WAY_OUT)

    def _await_shares(self) -> None:
        place, end = beside(place_of(self.directory, self.step)), time.monotonic() + GRACE_S
        while missing := [number for number in range(world_size()) if not (place / SHARE.format(number)).is_file()]:
            if time.monotonic() > end:
                raise OSError(errno.ETIMEDOUT, f"rank {missing[0]} did not write its part within {GRACE_S:.0f} s")
            time.sleep(0.05)

    def _publish(self) -> None:
        self._publishing = True
        if rank() == 0:
            self._job = _Job(lambda: _publish(self.directory, self._about, self._retention))

    def _wait(self) -> None:
        if self._job is not None:
            self._job.wait()


class _Job:
    """An action on a thread of its own. Only OSErrors are expected; any other error is logged with its traceback, and
    becomes one, so that all ranks hear of it in the same way."""

    def __init__(self, action: Callable[[], None]):
        self.action = action
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="save", daemon=True)
        self._thread.start()

    @property
    def state(self) -> int:
        if self._thread.is_alive():
            return BUSY
        return IDLE if self.error is None else FAILED

    def join(self) -> None:
        self._thread.join()

    def wait(self) -> None:
        """Raises its OSError."""
        self.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self.action()
        except OSError as error:
            self.error = error
        except BaseException as error:
            log.exception("bug in the save on rank %d", rank())
            self.error = OSError(errno.EIO, f"{type(error).__name__}: {error}")


def _call(actions: Iterable[Callable[[], None]]) -> None:
    for action in actions:
        action()


def _write(snapshot: Snapshot, place: Path, before: Iterable[Callable[[], None]]) -> None:
    """This rank's part, and last its entries for the manifest."""
    _call(before)
    share = place / SHARE.format(rank())
    write_json(share, write_snapshot(snapshot, place))


def _publish(directory: Path, about: dict[str, Any], retention: Retention) -> None:
    final = place_of(directory, about["step"])
    place = beside(final)
    names = [place / SHARE.format(number) for number in range(about["world"])]
    try:
        shares = [read_object(name) for name in names]
    except ValueError as error:
        raise OSError(errno.EIO, str(error)) from error
    for name in names:
        name.unlink()
    publish(about, shares, place, final)
    prune(directory, about["step"], retention)
