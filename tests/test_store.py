"""A whole run on two ranks whose store of shards has trouble."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.metrics import read_metrics
from tests.small_run import Ranks, command
from tests.store import Store


def impatient(_: int) -> None:
    from pretrain.data.shards import cache

    cache.ATTEMPTS, cache.PAUSE_S = 2, 0.0


@pytest.mark.slow
def test_it_ends_in_a_sentence_that_is_no_mistake_and_a_later_start_finishes(data, tmp_path):
    with Store(data / "texts", ["503"] * 99, "00002.tar") as store:
        settings = ("init_from=null", "steps=3", f"mix.texts.shards={store.url}", f"loading.cache_dir={tmp_path}/cache")

        def start() -> tuple[list, list[str]]:
            log = Path(tmp_path / "log")
            log.unlink(missing_ok=True)
            ranks = Ranks(command(data, tmp_path, "language", *settings, ds="zero1.json"), data, 2, log, impatient)
            codes = ranks.wait(60)
            ranks.kill()
            return codes, log.read_text().splitlines()

        codes, said = start()
        assert codes == [69, 69], said
        told = [line for line in said if "503 Service Unavailable" in line and "of 2: " in line]
        assert told and all("checkpoints are intact, start the same line again" in line for line in told), said
        assert not [line for line in said if "Traceback" in line or " error: " in line]
        store.healthy = True
        codes, said = start()
    assert codes == [0, 0], said
    assert [line["step"] for line in read_metrics(tmp_path / "language/metrics.jsonl")] == [1, 2, 3]
