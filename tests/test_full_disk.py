"""A disk that is full for what a run writes beside its checkpoints: a sentence on every rank, and nothing is lost."""

from __future__ import annotations

import errno
from functools import partial

import pytest

from pretrain.checkpoint.directory import complete
from pretrain.metrics import read_metrics
from tests.small_run import Ranks, command
from tests.test_rollback import keys_of, trace


def fill(name: str, before: int, rank: int) -> None:
    """The file `name` takes only so many lines."""
    from pretrain.files import Lines

    write, left = Lines.write, [before]

    def failing(self, line: bytes) -> None:
        if self.path.name == name:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "could not be written: No space left on device", str(self.path))
        write(self, line)

    Lines.write = failing


@pytest.mark.slow
def test_a_run_ends_in_a_sentence_and_goes_on_when_there_is_room(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(data))
    log = tmp_path / "log"

    def live(name: str, before: int) -> tuple[list, list[str]]:
        log.unlink(missing_ok=True)
        line = command(data, tmp_path, "language", "init_from=null", "steps=5", ds="zero1.json")
        ranks = Ranks(line, data, 2, log, partial(fill, name, before))
        codes = ranks.wait(90)
        ranks.kill()
        return codes, log.read_text().splitlines()

    codes, said = live("samples.rank00001.jsonl", 2)  # the disk of one rank's node
    assert codes == [69, 2], said
    assert sum("error on rank 1: [Errno 28]" in line and "samples.rank00001.jsonl" in line for line in said) == 1
    assert sum("rank 0 of 2: another rank died" in line for line in said) == 1
    codes, said = live("metrics.jsonl", 1)  # of step 4 it has no line, and so no checkpoint
    assert codes == [2, 2] and sum("[Errno 28]" in line and "metrics.jsonl" in line for line in said) == 2, said
    assert not [line for line in said if "Traceback" in line]
    assert next(complete(tmp_path / "language/checkpoints"))[0] == "step_00000003"
    codes, said = live("", 0)
    assert codes == [0, 0], said
    assert [line["step"] for line in read_metrics(tmp_path / "language/metrics.jsonl")] == [1, 2, 3, 4, 5]
    seen = [sorted(keys) for keys in trace(tmp_path / "language").values()]
    assert seen == [sorted(keys) for keys in keys_of(data, [1, 2, 3, 4, 5])]
