"""CIDEr optimisation: its gradient against a plain one, its rewards, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_tools.caption_frequencies import main
from pretrain.batch import BOS, EOS, PAD, Batch, Layout, make_batch
from pretrain.config import BatchSize, Stage
from pretrain.data.cider import Frequencies, cider
from pretrain.data.labelled import RewardShards
from pretrain.data.sources import PairShards
from pretrain.objectives.self_critical import SelfCritical
from pretrain.optim import Optim
from pretrain.parallel.sizes import Parallel
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import EXPERTS, PAPER, PATCHES, pictures
from tests.toys import pair_sample, refused, write_source

MODEL = replace(PAPER, init_std=0.3)  # so that its texts differ
WORDS, MASK, LENGTH = 12, 49, 4
REFERENCES = (("w4 w5 w6", "w5 w6"), ("w7 w4", "w7 w8 w9"), ("w10 w11", "w4"), ("w5 w9 w4", "w6 w7"))


class Words:
    """A tokenizer of whose ids 4 to 15 are words; the rest of the vocabulary has none."""

    mask_id = MASK

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids if i > EOS and i < MASK)


def made(how: SelfCritical) -> PretrainTask:
    torch.manual_seed(0)
    task = PretrainTask(MODEL, EXPERTS, [how])
    head = task.objectives["masked"]
    with torch.no_grad():
        head.text.bias[4 + WORDS :] = -30.0
        head.text.bias[EOS] = 0.5
    head.tokenizer, head.known = Words(), Frequencies.of([*REFERENCES, ("w8",)])
    return task


def batch_of(how: SelfCritical, pairs: slice = slice(None)) -> Batch:
    drawn = torch.rand(4, how.draws, generator=torch.Generator().manual_seed(3))[pairs]
    ids = torch.full((4, LENGTH + 1), PAD)
    ids[:, 0], ids[:, 1] = BOS, EOS
    layout = Layout(pairs=len(drawn), patches=PATCHES, pair_len=LENGTH + 1)
    batch = make_batch(layout, images=pictures(4)[pairs], pair_tokens=ids[pairs], draws={"masked": drawn})
    return replace(batch, extra={"references": REFERENCES[pairs]})


def chances(task: PretrainTask, picture: Tensor, words: list[int]) -> Tensor:
    """Of each word that may come next, by a whole pass over one text with a <mask> behind it."""
    ids = torch.tensor([[BOS, *words, MASK]])
    layout = Layout(pairs=1, patches=PATCHES, pair_len=ids.shape[1], causal=True)
    rows = task.encoder(make_batch(layout, images=picture[None], pair_tokens=ids)).pair_texts
    logits = task.objectives["masked"].text.logits(rows[0, -1])
    never = torch.zeros(len(logits)).index_fill(0, torch.tensor([BOS, PAD, 3, MASK]), -torch.inf)
    return (logits + never).softmax(-1)


def plain_loss(task: PretrainTask, how: SelfCritical, batch: Batch) -> Tensor:
    """Text by text and word by word."""
    losses = []
    for number, picture in enumerate(batch.images):
        drawn = batch.draws["masked"][number].view(how.samples, how.max_words)
        texts, logs, ended = [], [], []
        for uniform in [*drawn, None]:
            words, log = [], torch.zeros(())
            while len(words) < min(how.max_words, LENGTH) and words[-1:] != [EOS]:
                shares = chances(task, picture, words)
                if uniform is None:
                    word = int(shares.argmax())
                else:  # the best first, as nucleus sampling has them
                    order = shares.argsort(descending=True, stable=True)
                    place = (shares[order].double().cumsum(0) <= uniform[len(words)].double()).sum()
                    word = int(order[place])
                log = log + shares[word].log()
                words.append(word)
            texts.append(Words().decode(words))
            ended.append(words[-1] == EOS)
            logs.append(log)
        known = task.objectives["masked"].known
        rewards = cider(texts, [batch.extra["references"][number]] * len(texts), known, ended)
        for place in range(how.samples):
            others = [reward for k, reward in enumerate(rewards[:-1]) if k != place]
            baseline = rewards[-1] if how.baseline == "greedy" else sum(others) / len(others)
            losses.append(-(rewards[place] - baseline) * logs[place])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("how", [SelfCritical(max_words=LENGTH), SelfCritical(2, "mean", max_words=3)])
def test_the_gradient_is_that_of_a_plain_reference(how):
    task, batch = made(how), batch_of(how)
    report = task(batch)
    report["loss"].backward()
    own = {name: value.grad for name, value in task.named_parameters() if value.grad is not None}
    task.zero_grad()
    loss = plain_loss(task, how, batch)
    loss.backward()
    torch.testing.assert_close(report["loss"], loss, rtol=1e-4, atol=1e-5)
    assert loss.abs() > 1e-3 and (how.baseline == "mean" or report["CIDEr/drawn"] != report["CIDEr/baseline"])
    for name, value in task.named_parameters():
        if value.grad is not None and name in own:
            torch.testing.assert_close(own[name], value.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert all(value.grad is None or name in own or not value.grad.any() for name, value in task.named_parameters())


def test_two_ranks_average_to_one():
    """Words are drawn by the samples' own numbers, and no text looks at another picture's."""
    how = SelfCritical(2, "mean", max_words=LENGTH)
    task = made(how)
    whole = task(batch_of(how))
    halves = [task(batch_of(how, part)) for part in (slice(0, 2), slice(2, 4))]
    for name in whole:
        torch.testing.assert_close(sum(half[name] for half in halves) / 2, whole[name], rtol=1e-5, atol=1e-5)


def test_it_learns_what_is_rewarded():
    how = SelfCritical(4, "mean", max_words=3)
    task = made(how)
    optimizer, rewards = torch.optim.Adam(task.parameters(), lr=1e-2), []
    for step in range(8):
        batch = batch_of(how)
        batch.draws["masked"] = torch.rand(4, how.draws, generator=torch.Generator().manual_seed(step))
        report = task(batch)
        optimizer.zero_grad()
        report["loss"].backward()
        optimizer.step()
        rewards.append(report["CIDEr/drawn"].item())
    assert sum(rewards[-2:]) > 1.5 * sum(rewards[:2]) > 0


def test_frequencies_are_those_of_the_training_captions(tmp_path, capsys):
    def sample(number: int, *texts: str) -> dict:
        return pair_sample(str(number), number, texts[0]) | {"json": json.dumps({"captions": texts}).encode()}

    samples = [
        sample(0, "a red bus", "a red bus"),
        sample(1, "A red dog."),
        pair_sample("2", 2, "a cat"),
        sample(3, "x"),
    ]
    out = tmp_path / "frequencies.json"
    assert main([str(write_source(tmp_path / "shards", [samples])), "--out", str(out)]) == 0
    assert "4 runs of words in the captions of 4 pictures" in capsys.readouterr().out
    assert json.loads(out.read_text()) == {"pictures": 4, "grams": {"</s>": 4, "a": 3, "a red": 2, "red": 2}}
    given = [["a red bus", "a red bus"], ["A red dog."], ["a cat"], ["x"]]
    texts = ["a red cat", "red dog", "a cat", "x"]
    assert cider(texts, given, Frequencies.read(str(out))) == cider(texts, given)
    shards = write_source(tmp_path / "one", [samples[:1]])
    assert "two are the least" in refused(capsys, main, shards, "--out", tmp_path / "f.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist; write it"),
        ("[]", "frequencies"),
        ('{"pictures": 0, "grams": {}}', "no number of pictures"),
        ('{"pictures": 3, "grams": {"a": -1}}', "counts of grams"),
    ],
)
def test_wrong_frequencies_are_one_sentence(tmp_path, content, words):
    if content is not None:
        (tmp_path / "frequencies.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        Frequencies.read(str(tmp_path / "frequencies.json"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SelfCritical(baseline="beams"), "use greedy or mean"),
        (lambda: SelfCritical(1, "mean"), "samples=1 is below 2"),
        (lambda: SelfCritical(max_words=0), "max_words=0 is below 1"),
        (lambda: stage(PairShards("x")), "give the mix pairs=RewardShards"),
        (lambda: stage(RewardShards("x"), parallel=Parallel(tensor=2)), "parallel.tensor=2"),
    ],
)
def test_wrong_settings_are_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def stage(source: PairShards, **more: object) -> Stage:
    return Stage(
        mix={"pairs": source}, batch=BatchSize(pairs=4), objectives=(SelfCritical(),), optim=Optim(), steps=3, **more
    )
