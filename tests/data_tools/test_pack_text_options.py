"""data_tools.pack_text: how its options are read."""

from __future__ import annotations

import pytest

from data_tools.pack_text import parse_budget, parse_rules


@pytest.mark.parametrize(
    ("text", "tokens"), [("3B", 3 * 10**9), ("2.5m", 2_500_000), ("1e9", 10**9), ("5_000", 5000), ("0.5K", 500)]
)
def test_budgets_are_read_with_their_units(text, tokens):
    assert parse_budget(text) == tokens


@pytest.mark.parametrize("text", ["", "B", "-3B", "3 billion", "nan", "inf", "0.1", "1e400"])
def test_invalid_budgets_are_refused(text):
    with pytest.raises(ValueError, match="budget"):
        parse_budget(text)


def test_rules_are_changed_by_name():
    rules = parse_rules(["min_words=5", "max_symbols=off"])
    assert (rules.min_words, rules.max_symbols, rules.max_bullets) == (5, None, 0.9)
