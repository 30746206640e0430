"""benchmarks.claims: its world, its rule and its way through the runs; figures take an hour and are not made here."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks.claims import __main__ as command
from benchmarks.claims import comparisons, foils, world
from benchmarks.claims.comparisons import (
    COMPARISONS,
    CONTRADICTED,
    NOT_SHOWN,
    OPEN,
    SHOWN,
    Comparison,
    row,
    table,
    verdict,
)
from benchmarks.claims.picture import picture
from benchmarks.claims.runs import DONE, Runs, order, run_all
from benchmarks.zoo import flops
from pretrain.batch import BOS, EOS, Layout, make_batch
from tests.evals.test_matching import Oracle
from tests.toys import read_all, refused

EVALS = {
    comparisons.WORDS_IN_PAIRS: "MaskedAccuracy", comparisons.WORDS: "MaskedAccuracy",
    comparisons.PATCHES: "MaskedAccuracy", comparisons.QUESTIONS: "QuestionAccuracy",
    comparisons.FOILS: "FoilChoice", comparisons.RANDOM_PARTNERS: "MatchingAccuracy",
    comparisons.CIDER: "CaptionScore", comparisons.RETRIEVAL: "Retrieval",
}  # fmt: skip


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([3.0, 2.0, 4.0], SHOWN),
        ([-3.0, -2.0, -4.0], CONTRADICTED),
        ([3.0, 2.0, -0.1], NOT_SHOWN),  # one seed says otherwise
        ([30.0, 1.0, 1.0], NOT_SHOWN),  # all seeds say so, but the mean is within twice its error
        ([0.0, 0.0, 0.0], NOT_SHOWN),
        ([5.0], OPEN),
        ([], OPEN),
    ],
)
def test_a_claim_is_shown_where_every_seed_agrees_and_the_mean_exceeds_twice_its_error(differences, said):
    assert verdict(differences) == said


def test_a_row_pairs_the_seeds_and_leaves_out_those_that_lack_an_arm():
    asked = Comparison("e", "most | of it", comparisons.CIDER, {"new": 1, "low": -0.5, "high": -0.5})
    every = {
        seed: {arm: {"captions/CIDEr": value} for arm, value in (("new", 80.0 + seed), ("low", 50.0), ("high", 90.0))}
        for seed in range(3)
    }
    del every[1]["high"]
    made = row(asked, every)
    assert made["differences"] == {"0": 10.0, "2": 12.0} and made["mean"] == 11 and made["standard_error"] == 1
    assert made["verdict"] == SHOWN and made["arms"]["new"] == {"0": 80.0, "2": 82.0}
    nothing = row(asked, {0: {}})
    assert nothing["mean"] is None and nothing["verdict"] == OPEN
    said = table([made, nothing]).splitlines()
    assert len(said) == 3 and "new 80.0 82.0, mean 81.0 ± 1.4; low 50.0 50.0" in said[2]
    assert said[2].endswith("| +10.0 +12.0, mean +11.0 ± 1.4 | shown |")
    drawn = ElementTree.fromstring(picture([made, nothing]))
    points = [float(each.get("cx")) for each in drawn.iter() if each.tag.endswith("circle")]
    middle = next(float(each.get("x1")) for each in drawn.iter() if each.tag.endswith("line"))
    assert len(points) == 2 and middle < points[0] < points[1]


def test_retrieval_is_the_mean_of_both_ways():
    both = {"retrieval/image_to_text/R@5": 40.0, "retrieval/text_to_image/R@5": 50.0}
    assert comparisons.score(comparisons.RETRIEVAL, both) == 45


@pytest.fixture
def somewhere(tmp_path, monkeypatch) -> Runs:
    made = Runs(tmp_path)
    for name, value in made.variables(0).items():
        monkeypatch.setenv(name, value)
    return made


def test_every_arm_is_a_stage_that_is_asked_for_its_score(somewhere):
    stages = somewhere.recipe.stages
    for comparison in COMPARISONS:
        for arm in comparison.terms:
            assert EVALS[comparison.score] in {type(each).__name__ for each in stages[arm].evals}, (comparison, arm)
        assert sum(comparison.terms.values()) == 0, "the arms' common level falls out"
    compared = {arm for comparison in COMPARISONS for arm in comparison.terms}
    assert set(somewhere.chain(compared)) == set(stages), "no stage is trained for nothing"


def test_arms_see_as_many_samples_or_take_as_many_flops(somewhere):
    recipe = somewhere.recipe

    def seen(*stages: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for stage in (recipe.stages[name] for name in stages):
            for kind, count in stage.batch.counts().items():
                counts[kind] = counts.get(kind, 0) + count * stage.steps
        return counts

    assert seen("vision", "language_on_vision", "stagewise") == seen("joint") == seen("joint_small_steps")
    assert seen("vision", "language") == seen("both")
    assert seen("random_first", "hard") == seen("random_first", "random") == seen("hard_from_the_start")
    assert seen("noisy") == seen("clean") == seen("filtered")
    joint, three = (flops(recipe, recipe.stages[name]) for name in ("joint", "three"))
    assert abs(joint / three - 1) < 0.01


def test_frozen_arms_leave_attention_as_it_is(somewhere):
    for name, expert in (("language_on_vision", "language"), ("vision_on_random", "vision")):
        stage = somewhere.recipe.stages[name]
        assert stage.trains(f"encoder.blocks.0.experts.{expert}.norm.weight")
        assert not any(stage.trains(f"encoder.blocks.0.{part}.weight") for part in ("attention.q", "norm"))


class Noted(Runs):
    """Runs that only leave behind what a finished one does, in the order in which they began."""

    def run(self, seed: int, stage: str) -> None:
        assert all(self.done(seed, need) for need in self.needs(stage)), stage
        if stage == "hard" and not (self.directory / "mended").exists():
            raise ValueError(f"{stage} broke")
        time.sleep(0.005)  # so that another job could begin too early
        place = self.place(seed) / stage
        place.mkdir(parents=True)
        scores = dict.fromkeys(EVALS, 50.0) | {
            f"retrieval/{way}/R@5": 50.0 for way in ("image_to_text", "text_to_image")
        }
        (place / "eval.json").write_text(json.dumps(scores))
        (place / DONE).write_text(json.dumps({"settings": self.settings_hash(stage), "cpu_s": 1.0, "steps": 4}))


def test_it_goes_on_where_it_broke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "Runs", Noted)
    monkeypatch.setattr(command, "make_corpus", lambda out, sizes: None)
    monkeypatch.setattr(command.os, "environ", dict(command.os.environ))
    out = tmp_path / "claims.json"
    line = ["--run-dir", tmp_path / "runs", "--seeds", 2, "--jobs", 1, "--claims", "f", "a", "--out", out]
    assert "hard broke" in refused(capsys, command.main, *line)
    first = {each["claim"]: each["mean"] for each in json.loads(out.read_text())["rows"]}
    assert first == {"a": None, "f": 0.0}, "the claim that came first is a result already"
    (tmp_path / "runs/mended").touch()
    assert command.main([*map(str, line)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert all(each["differences"] == {"0": 0.0, "1": 0.0} and each["verdict"] == NOT_SHOWN for each in rows)
    assert json.loads(out.read_text())["stages"]["hard"]["cpu_s"] == [1.0, 1.0]
    assert "captions with a fact changed" in capsys.readouterr().out
    ElementTree.parse(out.with_suffix(".svg"))
    assert "trained with other settings or another --scale" in refused(capsys, command.main, *line, "--scale", 0.5)


def test_several_jobs_never_begin_before_what_they_need(somewhere):
    noted = Noted(somewhere.directory)
    (somewhere.directory / "mended").touch()
    wanted = order(noted, {"e": ["filtered_tuned"], "a": ["hard", "random"]}, range(2))
    finished: list[tuple[int, str]] = []
    run_all(noted, wanted, 4, lambda *run: finished.append(run))
    assert sorted(finished) == sorted(wanted) and len(set(wanted)) == len(wanted)
    assert {stage for _, stage in wanted} >= {"filtered", "noisy_tuned", "noisy", "random_first", "pairs"}


def test_a_command_that_fails_is_told_by_its_last_line(somewhere):
    with pytest.raises(
        ValueError, match=r"json.tool of vision, seed 0, ended with exit code [12]: .*nothing.*; see .*log"
    ):
        somewhere._start(0, "vision", "json.tool", "nothing.json")
    assert somewhere._start(0, "vision", "json.tool", "--help") > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--seeds", "0"), "must be 1 or more"), (("--scale", "0"), "--scale 0.0 is no share of the steps")],
)
def test_what_makes_no_run_is_refused_before_anything_is_written(words, said, tmp_path, capsys):
    assert said in refused(capsys, command.main, "--run-dir", tmp_path / "runs", *words)
    assert not (tmp_path / "runs").exists()


def test_a_wrong_caption_is_false_of_its_board_and_held_out_boards_are_not_trained_on():
    train, held = world.boards()
    assert len(held) == world.HELD_OUT and not set(train) & set(held)
    rng = random.Random(0)
    for board in train[:300]:
        said = world.describe(board, rng)
        assert said.board == board and world.foil(said, rng).board != board
        assert len(world.caption(said, rng).split()) <= 14
        assert world.question(board, rng)[1] in world.ANSWERS


def test_the_corpus_is_written_once_and_has_its_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "HELD_OUT", 3)
    sizes = world.Sizes(pairs=60, images=2, texts=60, questions=60, clean=2)
    monkeypatch.setattr(world, "WORDS", 60)
    world.make_corpus(tmp_path, sizes)
    pairs, noisy = (read_all(tmp_path / "pairs" / name) for name in ("train", "noisy"))
    assert [each["jpg"] for each in pairs] == [each["jpg"] for each in noisy]
    wrong = [json.loads(each["json"]).get("wrong", False) for each in noisy]
    assert sum(wrong) == 18
    same = [one["txt"] == other["txt"] for one, other in zip(pairs, noisy, strict=True)]
    assert all(same[place] for place in range(60) if not wrong[place]) and sum(same) < 45
    assert len({each["txt"] for each in read_all(tmp_path / "pairs/heldout")}) > 3
    monkeypatch.setattr(world, "draw", None)  # nothing is drawn a second time
    world.make_corpus(tmp_path, sizes)


def test_a_perfect_judge_chooses_the_caption_and_one_that_does_not_look_has_half():
    pictures = torch.tensor([5, 6, 7, 8], dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    def ids(words: list[int]) -> torch.Tensor:
        return torch.tensor([[BOS, word, EOS] for word in words])

    batch = make_batch(Layout(pairs=4, patches=1, pair_len=3), images=pictures, pair_tokens=ids([5, 6, 7, 8]))
    batch = replace(batch, extra={foils.FOIL: ids([6, 7, 8, 9])})

    def judged(match: nn.Module) -> dict[str, float]:
        trained = SimpleNamespace(
            task=SimpleNamespace(encoder=Oracle()),
            head=lambda name: SimpleNamespace(match=match),
            batches=lambda mix, size, samples: iter([batch]),
        )
        return foils.FoilChoice(foils.FoilShards("nowhere"), samples=3).run(trained)[0]

    assert judged(nn.Identity()) == {"foils/choice": 100, "foils/accuracy": 100}
    blind = nn.Linear(2, 2)
    nn.init.zeros_(blind.weight)
    assert judged(blind) == {"foils/choice": 50, "foils/accuracy": 50}
