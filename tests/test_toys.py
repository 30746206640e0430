"""What a missing package does to the tests that need it."""

from __future__ import annotations

import pytest

from tests.toys import needs


@pytest.mark.parametrize("package", ["img2dataset", "no_such_package"])
@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_a_missing_package_skips_by_name_and_fails_in_ci(monkeypatch, package, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("IMGLISH_DOWNLOAD_PYTHON", "/no/such/python")
    with pytest.raises(outcome, match=f"{package} is not installed|IMGLISH_DOWNLOAD_PYTHON=/no/such/python"):
        needs(package)
    needs("pytest")
