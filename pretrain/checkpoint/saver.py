"""Checkpoints that are written while training goes on.

A save has three parts. The *snapshot* copies what each rank will write into host memory; training waits only for this.
The *write* of each rank's files, and on rank 0 the *publishing* (MANIFEST.json, the rename, the removal of old
checkpoints), run on a thread of their own.

No collective ever runs on that thread: gloo and NCCL match the ranks' collectives by their order alone, and those of a
second thread would come between different collectives of a step on each rank. So the ranks agree where they meet
anyway, in the all-reduce at the end of each step: each contributes its `state`, and `advance` gets the highest one.

- If some rank still writes, or rank 0 publishes, nothing happens at this step.
- If no rank writes any more, rank 0 begins to publish.
- If a write failed on some rank, every rank waits for its own and raises SaveError, all at the same step.

Rank 0 learns the names, sizes and hashes of a rank's files from one more small file, SHARE, which is synced last. So a
checkpoint can be completed even if collectives are no longer possible: when an exception ends a rank, each waits for
its own write, and rank 0 for the others' files, for at most GRACE_S. A kill at any moment leaves a directory without a
manifest, which does not exist for `newest`, as a kill in a plain save does.

There is one snapshot in memory at a time: a save waits until the one before is written. A second snapshot would not
help if the disk takes longer for a checkpoint than training takes to the next one.

A copy on the nodes (copies.py) works the same way, with two differences. Its entries are gathered where the ranks meet;
and training never waits for it: if something is still being written the copy is left out, and if it fails a warning
says so and the run goes on.
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

IDLE, BUSY, FAILED = range(3)  # the states of this rank's thread
SHARE = ".share_rank{:05d}.json"
LONG_S = 1.0  # the log names a longer wait for the save before


class Saver:
    """Saves a run's checkpoints into `directory`; `identity` is recipe_hash and data_digest. `background` False: each
    one is written before training goes on. Every rank makes one, and calls the same methods at the same steps.

    As a context it ends with the last write: by `finish`, or, after an exception, without a collective.
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
        self.step = 0  # of the newest checkpoint or copy that was begun
        self._copies = HostCopies()
        self._about: dict[str, Any] = {}
        self._retention = Retention()
        # Equal on every rank: whether a save or copy is incomplete, whether it is being published, and whether it is a
        # copy.
        self._pending = self._publishing = self._copying = False
        self._job: _Job | None = None
        self._entries: Entries = {}  # this rank's entries of the copy

    @property
    def gib(self) -> float:
        """The GiB of host memory that this rank's snapshots take."""
        return self._copies.gib

    @property
    def state(self) -> int:
        """IDLE, BUSY or FAILED: of this rank's thread."""
        return IDLE if self._job is None else self._job.state

    def advance(self, highest: int) -> None:
        """Called at the end of each step, with the highest `state` of all ranks. Raises SaveError on all of them."""
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
        """Takes the snapshot after `step`, and begins to write it. A collective. `config`: the weights'; `before`:
        called before this checkpoint is written, such as to sync the metrics up to it; `extra`: JSON that `newest`
        returns. Raises SaveError on every rank, for this save or for the one before."""
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
        """Begins a copy on the nodes after `step`, with arguments as `save`; does nothing while something is still
        being written. A collective."""
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
        """`advance` for a copy; a collective."""
        assert self.copies is not None
        copies, about = self.copies, self._about
        if highest == FAILED:
            # The threads of two copies must never meet: their messages to the neighbours would be mixed up.
            if BUSY in gather_objects(self.state):
                return
            problems = gather_objects("" if self._job is None or self._job.error is None else str(self._job.error))
            number, problem = next((number, text) for number, text in enumerate(problems) if text)
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
        """Waits until the newest checkpoint or copy is complete -> whether there was one to wait for. A collective.
        Raises SaveError on every rank."""
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
        self.watch.extend()  # and not `enter`: the error's message names the part of the run in which it came
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
    """An action on a thread of its own. Only OSErrors are expected; any other error is logged with its traceback and
    becomes an OSError, so that all ranks treat it alike."""

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
        """Waits for the action, and raises its OSError."""
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
    """Writes this rank's files, and last its entries for the manifest."""
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
