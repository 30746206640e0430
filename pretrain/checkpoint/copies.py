"""Copies of checkpoints on the nodes' own disks or in their memory, between two saves to the shared directory.

Each rank writes its files into a directory of its node, and sends them to the next node (neighbours.py), so that every
file survives the loss of one node. When all ranks have done both, the first rank of each node writes the manifest of
the whole copy; as in the shared directory, a copy without a valid manifest does not exist. A node holds the files of
two nodes: of one copy while the next one is being written, of the two newest otherwise. They survive a killed process,
but not a loss of power: files from a neighbour are not synced.

If the newest copy that is complete and undamaged, over all nodes together, is newer than the newest checkpoint, a start
first writes it into the shared directory (`bring_back`), from where it is read like every other checkpoint.

A copy belongs to a run and to the number of its rollbacks, by a random name in the stage's directory. So nothing comes
back of a run that was removed, or of steps that a rollback undid.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.directory import Retention, complete, damage, place_of, prune, publish, sweep
from pretrain.checkpoint.neighbours import Entries, Exchange, Nodes
from pretrain.checkpoint.save import begin, together
from pretrain.checkpoint.snapshot import Snapshot, write_snapshot
from pretrain.checkpoint.weights import SaveError
from pretrain.distributed import fail_together, gather_objects, rank, refuse_together
from pretrain.files import beside, sync, write_json
from pretrain.json_files import read_object, typed
from pretrain.parallel.board import node_name

log = logging.getLogger("pretrain")

LOCAL = "IMGLISH_LOCAL"
NAME = "copies.json"  # in the stage's directory it holds the run's random name, in the node's the stage's directory


def local_root() -> Path:
    """The directory of a node's copies. Raises ValueError if the environment names none."""
    if not (local := os.environ.get(LOCAL)):
        raise ValueError(
            f"copy_every needs a directory on each node's own disk or memory, and {LOCAL} names none; export it (in "
            "launch/cluster.env), such as /dev/shm/imglish, or set copy_every=0"
        )
    return Path(local) / f"imglish-{os.getuid()}"


def open_copies(directory: Path, rollbacks: int) -> Copies:
    """The copies of the run in the stage's `directory`, after so many `rollbacks`. A collective; rank 0 holds the
    directory's lock. Raises ValueError on every rank if one of them cannot use its place, OSError if rank 0 cannot
    write to `directory`."""
    name = gather_objects(fail_together(lambda: _name_of_run(directory) if rank() == 0 else ""))[0]
    place, problem = Path(), None
    try:
        place = local_root() / "copies" / node_name()
        _make_own(place)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = (
            f"{LOCAL}={os.environ[LOCAL]}: {place} on {node_name()} cannot be used for copies "
            f"({error.strerror or error}); take another place, or set copy_every=0"
        )
    refuse_together(problem)
    return Copies(place / f"{name}-{rollbacks}", Nodes.gather(), directory)


class Copies:
    """`root`: this run's directory on this node; `stage`: the stage's shared directory. Constructing it is a
    collective."""

    def __init__(self, root: Path, nodes: Nodes, stage: Path):
        self.root, self.nodes = root, nodes
        self.first = nodes.is_first(rank())
        self._exchange = Exchange(nodes)
        if self.first:
            with suppress(OSError):  # the first copy will report what is wrong
                root.mkdir(exist_ok=True)
                write_json(root / NAME, {"stage": str(stage.resolve())})
                sweep(root)
                _remove_others(root)
        gather_objects(None)  # no rank may write before this is done

    def write(self, snapshot: Snapshot, before: Iterable[Callable[[], None]]) -> Entries:
        """Writes this rank's files and its neighbour's -> the manifest entries of its own. Not a collective. Raises
        OSError if a disk or a connection fails, but only after everything was sent and received. `before` as in
        Saver.save."""
        step, own, problem = snapshot.about["step"], Entries(), ""
        place = beside(place_of(self.root, step))
        try:
            for action in before:
                action()
            if self.first:
                prune(self.root, step, Retention(1))
            place.mkdir(parents=True, exist_ok=True)
            own = write_snapshot(snapshot, place)
        except OSError as error:
            problem = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        self._exchange.run(place, own, problem)
        if problem:
            raise OSError(errno.EIO, problem)
        return own

    def publish(self, about: dict[str, Any], shares: list[Entries]) -> None:
        """Writes the manifest: called on the first rank of each node, when all ranks have written. Raises OSError."""
        final = place_of(self.root, about["step"])
        publish(about | {"nodes": list(self.nodes.of_ranks)}, shares, beside(final), final)

    def drop(self, step: int) -> None:
        """Removes an incomplete copy of `step`."""
        if self.first:
            shutil.rmtree(beside(place_of(self.root, step)), ignore_errors=True)

    def remove(self) -> None:
        """Removes all copies; called when the stage is finished."""
        if self.first:
            shutil.rmtree(self.root, ignore_errors=True)

    def bring_back(self, shared: Path, newer_than: int) -> bool:
        """Writes the newest complete copy of a step behind `newer_than` into the directory `shared` -> whether there
        was one. A collective."""
        own = [manifest for _, manifest in complete(self.root) if manifest["step"] > newer_than] if self.first else []
        known = {json.dumps(each, sort_keys=True): each for lists in gather_objects(own) for each in lists}
        for text in sorted(known, key=lambda text: (-known[text]["step"], text)):
            manifest = known[text]
            holders = _holders(manifest, gather_objects(self._good_files(manifest)), self.nodes)
            if missing := sorted(manifest["files"].keys() - holders.keys()):
                log.warning(
                    "the copy of step %d is incomplete: no node has %s undamaged", manifest["step"], ", ".join(missing)
                )
            elif self._write_shared(shared, manifest, holders, newer_than):
                return True
        return False

    def _good_files(self, manifest: dict[str, Any]) -> list[str]:
        """The undamaged files among this rank's share of its node's files."""
        place, (own, of) = place_of(self.root, manifest["step"]), self.nodes.place_on_node(rank())
        here = [name for name in sorted(manifest["files"]) if (place / name).is_file()]
        return [name for name in here[own::of] if not damage(place, {name: manifest["files"][name]})]

    def _write_shared(
        self, shared: Path, manifest: dict[str, Any], holders: dict[str, _Holder], newer_than: int
    ) -> bool:
        step, own = manifest["step"], place_of(self.root, manifest["step"])
        mine = [name for name, holder in holders.items() if holder.rank == rank()]
        about = {key: value for key, value in manifest.items() if key not in ("files", "nodes")}
        try:
            growing = begin(shared, step)
            with together(shared, step):
                fail_together(lambda: _copy_files(mine, own, growing))
                files = [manifest["files"]]
                fail_together(lambda: publish(about, files, growing, place_of(shared, step)) if rank() == 0 else None)
        except SaveError as error:
            log.warning("the nodes' own copy of step %d could not be brought back: %s", step, error)
            return False
        lost = sorted({f"{holder.wrote} (from {holder.node})" for holder in holders.values() if not holder.own})
        log.info(
            "step %d was brought back from the nodes' own copies%s, as %s",
            *(step, f", the files of {', '.join(lost)}" if lost else ""),
            f"{shared} ends at step {newer_than}" if newer_than >= 0 else f"{shared} holds no checkpoint",
        )
        return True


class _Holder(NamedTuple):
    """Where a file of a copy is: a rank that can read it, that rank's node, and the node that wrote the file."""

    rank: int
    node: str
    wrote: str

    @property
    def own(self) -> bool:
        return self.node == self.wrote


def _holders(manifest: dict[str, Any], good: list[list[str]], nodes: Nodes) -> dict[str, _Holder]:
    """A holder for each file that some rank has undamaged, on the node that wrote it rather than on its neighbour."""
    wrote = typed(manifest, "nodes", list)
    holders: dict[str, _Holder] = {}
    for number, names in enumerate(good):
        for name in names:
            match = re.search(r"_rank(\d{5,})\.", name)  # the weights are rank 0's
            holder = _Holder(number, nodes.of_ranks[number], str(wrote[int(match[1]) if match else 0]))
            if name not in holders or (holder.own and not holders[name].own):
                holders[name] = holder
    return holders


def _copy_files(names: list[str], source: Path, place: Path) -> None:
    for name in names:
        shutil.copyfile(source / name, place / name)
        sync(place / name)


def _name_of_run(directory: Path) -> str:
    """The run's random name, made at its first start."""
    path = directory / NAME
    with suppress(OSError, ValueError):
        if re.fullmatch(r"[0-9a-f]{32}", name := typed(read_object(path), "run", str)):
            return name
    name = secrets.token_hex(16)
    write_json(path, {"run": name})
    return name


def _make_own(place: Path) -> None:
    """Makes a directory below local_root(). OSError if that belongs to another user, who could put files there."""
    top = local_root()
    top.parent.mkdir(parents=True, exist_ok=True)
    top.mkdir(mode=0o700, exist_ok=True)
    if top.is_symlink() or top.stat().st_uid != os.getuid():
        raise OSError(errno.EPERM, f"{top} is not ours")
    place.mkdir(parents=True, exist_ok=True)


def _remove_others(root: Path) -> None:
    """Removes copies of this run from before a rollback, and of runs that are finished or gone."""
    for other in root.parent.iterdir():
        try:
            stage = Path(typed(read_object(other / NAME), "stage", str))
            name = typed(read_object(stage / NAME), "run", str)
            stays = other.name.startswith(f"{name}-") and other.name.partition("-")[0] != root.name.partition("-")[0]
        except (OSError, ValueError):
            stays = False
        if other != root and not stays:
            shutil.rmtree(other, ignore_errors=True)
