"""What the READMEs name is there: links and their headings, commands and their options, recipes, counted lines."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from pretrain.recipes import built_in_recipes
from tests.test_architecture import ROOT

PAGES = sorted({*ROOT.glob("README.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("pretrain/*/README.md")})
COMMAND = re.compile(r"(?:-m|--module) ((?:pretrain|data_tools|benchmarks)[\w.]*)(.*)")
TOOLS = ("pretrain.clip_benchmark", "pretrain.mieb")  # whose options are another program's
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def code_of(package: str) -> str:
    return "".join(path.read_text() for path in (ROOT / package).rglob("*.py"))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@names
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not path.startswith("https:"):
            place = page.parent / path if path else page
            assert place.exists(), target
            assert not anchor or anchor in anchors(place), target


@names
def test_commands_and_their_options_are_there(page):
    lines = page.read_text().replace("\\\n", " ").splitlines()
    for module, words in (found.groups() for line in lines if (found := COMMAND.search(line))):
        module = module.rstrip(".")
        if module in TOOLS or module.endswith(".X"):
            continue
        assert importlib.util.find_spec(module) is not None, module
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", re.split(r"[`#|]", words)[0]):
            assert option == "--help" or f'"{option}"' in code_of(module.split(".")[0]), f"{module} {option}"


def test_each_recipe_stands_in_the_table():
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "pretrain/recipes/README.md").read_text(), re.MULTILINE)
    assert sorted(name for row in table for name in re.findall(r"`(\w+)`", row)) == sorted(built_in_recipes())


def test_the_way_of_a_batch_is_as_long_as_it_says():
    paragraph = re.search(r"One batch from a shard.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert paragraph is not None
    said = re.search(r"\((\d+) files, about ([\d,]+) lines\)", paragraph[0])
    assert said is not None
    places = [ROOT / "pretrain" / name for name in ("", "data", "models/multiway")]
    files = {
        next(place / name for place in places if (place / name).is_file())
        for name in re.findall(r"`([\w/]+\.py)`", paragraph[0])
    }
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert len(files) == int(said[1])
    assert lines == pytest.approx(int(said[2].replace(",", "")), rel=0.05)
