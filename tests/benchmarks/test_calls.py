"""benchmarks.calls counts a step that waits for nothing, and measures the forms that it names."""

from __future__ import annotations

from benchmarks.calls import measure, parse_args


def test_a_step_of_the_benchmark_has_no_waits_and_fewer_rows_than_its_layout():
    result = measure(parse_args(["--images", "2", "--pairs", "2", "--texts", "2", "--rounds", "1"]))
    rows = result["rows"]
    assert result["waits"] == 0 and result["calls"] > 500
    assert rows["no padding"] <= rows["in the blocks"] < rows["of the layout"]
    assert set(result["times_as_long"]) == {"with padding", "one product"}
