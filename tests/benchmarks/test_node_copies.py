"""What copies on the nodes cost, from CPU seconds with and without them."""

from __future__ import annotations

from benchmarks.node_copies import Spent, summary


def test_a_copy_costs_what_steps_with_it_spend_more():
    rounds = [
        {"without": Spent(10.0, 12.0, 0, 3.0), "with": Spent(11.0, 16.0, 4, 2.5)},
        {"without": Spent(10.0, 12.0, 0, 3.0), "with": Spent(10.5, 13.0, 2, 9.0)},
        {"without": Spent(11.0, 12.0, 0, 3.0), "with": Spent(10.5, 14.0, 5, 3.5)},
    ]
    told = summary(rounds, steps=10, gib=0.5)
    assert told["cpu_s_of_a_step"] == 1.2
    assert told["cpu_s_of_a_copy"] == {"median": 0.5, "least": 0.4, "most": 1.0} and told["cpu_s_per_gib"] == 1.0
    assert told["cpu_s_of_a_copy_that_a_step_waits_for"] == {"median": 0.25, "least": -0.1, "most": 0.25}
    assert told["of_a_step"]["median"] == 0.2083
    assert told["wall_s_of_a_step"]["with"] == {"median": 3.5, "least": 2.5, "most": 9.0}
