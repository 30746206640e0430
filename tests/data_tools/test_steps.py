"""Step records that a tool carries on from its inputs."""

from __future__ import annotations

from data_tools.download import carry_steps as carry_of_lists
from data_tools.shards.steps import Step, carry_steps, read_steps, write_step


def test_records_of_one_name_from_several_directories_are_all_carried(tmp_path):
    homes = [tmp_path / name for name in "ab"]
    for number, home in enumerate(homes):
        write_step(home, "filter_list", Step("filter_list", 10 + number, 10 + number, time=number))
        write_step(home, "download", Step("elsewhere", 1, 1, time=10))
    assert carry_steps(homes, tmp_path / "shards") == ["filter_list", "download", "filter_list-2", "download-2"]
    for _ in range(2):  # as a further slice does
        carry_of_lists([homes[0] / "kept.parquet", homes[1] / "kept.parquet"], tmp_path / "out")
    steps = read_steps(tmp_path / "out")
    # download is the name of the download's own record
    assert list(steps) == ["filter_list", "filter_list-2", "download-2", "download-3"]
    assert [step.rows for step in steps.values()] == [10, 11, 1, 1]
