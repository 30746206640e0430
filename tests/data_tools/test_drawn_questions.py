"""Questions and sentences about drawn scenes are answered by the scenes."""

from __future__ import annotations

import random
from collections import Counter

from data_tools.drawn.questions import FACTS, UNSEEN, hypothesis, question, sentence, side_sentence
from data_tools.drawn.scenes import COLOURS, Scene, random_scene


def test_answers_are_those_of_the_scene():
    rng, seen = random.Random(0), Counter[str]()
    for _ in range(2000):
        scene = random_scene(rng, held_out=False)
        asked, answer = question(scene, rng)
        things = {f"{thing.colour} {thing.shape}": thing for thing in scene.things}
        if asked.startswith("how many"):
            assert answer == str(len(scene.things))
        elif asked.startswith("what colour is the "):
            shape = asked.removeprefix("what colour is the ").removesuffix("?")
            assert [thing.colour for thing in scene.things if thing.shape == shape] == [answer]
        else:
            words = asked.removeprefix("is the ").removesuffix("?").replace(" of ", " ").split()
            a, b = things[" ".join(words[:2])], things[" ".join(words[4:])]
            where = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[words[2]]
            assert answer == ("yes" if where else "no")
        seen[answer] += 1
    assert set(seen) == {*COLOURS, "1", "2", "3", "yes", "no"}
    assert abs(seen["yes"] - seen["no"]) < 0.2 * seen["yes"]


def test_sentences_are_true_of_about_half_of_the_pairs():
    rng, true = random.Random(0), 0
    for _ in range(2000):
        scenes = random_scene(rng, held_out=False), random_scene(rng, held_out=True)
        text, right = sentence(scenes, rng)
        has = [any(thing.shape == text.split()[-1] for thing in scene.things) for scene in scenes]
        assert right == (has[0] != has[1] if text.startswith("exactly one") else has[0])
        true += right
    assert abs(true - 1000) < 120


def is_shown(fact: str, scene: Scene) -> bool:
    first, last = fact.split()[0], fact.split()[-1]
    if last in ("thing", "things"):
        return ["one", "two", "three"].index(first) + 1 == len(scene.things)
    if last == "background":
        return fact.split()[1] == scene.background
    key = "colour" if first == "something" else "shape"
    return any(getattr(thing, key) == last for thing in scene.things)


def test_easier_sentences_are_about_one_of_two_pictures():
    rng, true, facts = random.Random(0), 0, set()
    for _ in range(2000):
        scenes = random_scene(rng, held_out=False), random_scene(rng, held_out=True)
        text, right = side_sentence(scenes, rng)
        side, fact = text.removeprefix("the ").split(" picture has ")
        assert right == is_shown(fact, scenes[side == "right"])
        facts.add(fact)
        true += right
    assert abs(true - 1000) < 120 and facts == {fact for facts in FACTS.values() for fact in facts}


def test_hypotheses_are_entailed_contradicted_or_left_open():
    rng, seen, blind = random.Random(0), Counter[str](), Counter[tuple[str, bool]]()
    for _ in range(3000):
        scene = random_scene(rng, held_out=True)
        text, label = hypothesis(scene, rng)
        fact, _, more = text.removeprefix("the picture has ").partition(" and ")
        assert not more or more in UNSEEN
        true = is_shown(fact, scene)
        assert label == ("contradiction" if not true else "neutral" if more else "entailment")
        seen[label] += 1
        blind[label, bool(more)] += 1
    assert all(abs(count - 1000) < 120 for count in seen.values())
    best = max(blind[label, False] for label in seen) + max(blind[label, True] for label in seen)
    assert abs(best - 2000) < 120, "what can be guessed without the picture"
