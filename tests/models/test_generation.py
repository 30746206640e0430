"""Texts that are written behind pictures: the kept rows against whole passes, and beams against transformers'."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.batch import BOS, EOS, PAD, UNK
from pretrain.data.transforms import sample_rng
from pretrain.models.generation import NextWord, WholePass, Writing, never_written, write
from tests.toy_models import CONFIGS, PAPER, encoder, pictures
from tests.toys import needs

WORDS, MASK, LONGEST = PAPER.vocab_size, PAPER.vocab_size - 1, PAPER.max_text_len - 1


def readers(name: str, count: int) -> tuple:
    """(the kept way, the plain way) of one encoder over some pictures."""
    model = encoder(CONFIGS[name]).eval()
    return model.causal_text(pictures(count), LONGEST + 1), WholePass(model, pictures(count), PAPER.patches)


def head(seed: int, sharp: float = 1.0) -> torch.nn.Linear:
    """Over the vocabulary; `sharp` makes its distributions narrow."""
    torch.manual_seed(seed)
    made = torch.nn.Linear(PAPER.dim, WORDS)
    torch.nn.init.normal_(made.weight, std=sharp)
    made.bias.data[EOS] = 4.0  # or few texts would end
    return made


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_kept_rows_are_those_of_whole_passes(name):
    fast, plain = readers(name, 2)
    drawn = torch.Generator().manual_seed(0)

    def same(length: int, width: int, keep: int | None = None) -> None:
        ids = torch.randint(4, WORDS, (2 * width, length), generator=drawn)
        torch.testing.assert_close(fast.read(ids, keep), plain.read(ids, keep), rtol=0, atol=1e-5)

    same(2, 1)
    same(2, 1, keep=1)  # a <mask> that is forgotten
    for reader in (fast, plain):
        reader.choose(torch.tensor([0, 0, 0, 1, 1, 1]), 3)
    same(1, 3)
    for reader in (fast, plain):
        reader.choose(torch.tensor([2, 0, 2, 4, 4, 3]), 3)
    same(3, 3, keep=2)
    same(1, 3)


@torch.no_grad()
def transformers_beams(logits, count: int, how: Writing) -> Tensor:
    """Its own search, over `logits` (ids [n, L] and the pictures' places [n] -> [n, V])."""
    needs("transformers")
    from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Model(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig(vocab_size=WORDS, is_encoder_decoder=False))
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.post_init()

        def forward(self, input_ids, places, **_):
            return CausalLMOutput(logits=logits(input_ids, places).unsqueeze(1))

        def prepare_inputs_for_generation(self, input_ids, places=None, **_):
            return {"input_ids": input_ids, "places": places}

    settings = GenerationConfig(
        num_beams=how.beams, length_penalty=how.length_penalty, early_stopping=False, max_length=how.max_words + 1,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, suppress_tokens=[BOS, PAD, UNK, MASK], use_cache=False,
        do_sample=False,
    )  # fmt: skip
    return Model().generate(torch.full((count, 1), BOS), generation_config=settings, places=torch.arange(count))


@pytest.mark.parametrize(("beams", "penalty", "masked"), [(2, 0.6, False), (4, 1.0, True), (3, 0.0, False)])
@torch.no_grad()
def test_beams_are_those_of_transformers_generate(beams, penalty, masked):
    """Which reads everything anew for each word, the pictures too."""
    how, count = Writing(beams, penalty, max_words=LONGEST - 1), 4
    model, words = encoder(PAPER).eval(), head(beams, sharp=0.5)

    def logits(ids: Tensor, places: Tensor) -> Tensor:
        if masked:
            ids = torch.cat([ids, torch.full((len(ids), 1), MASK)], 1)
        rows = WholePass(model, pictures(count)[places], PAPER.patches).read(ids)
        return words(rows[:, -1])

    theirs = transformers_beams(logits, count, how)
    next_word = NextWord(model.causal_text(pictures(count), LONGEST), words, MASK, MASK if masked else None)
    ours = write(next_word, count, how, None, torch.device("cpu"))
    assert (ours == EOS).any() and len({tuple(row) for row in ours.tolist()}) > 1  # it is no trivial search
    length = min(ours.shape[1], theirs.shape[1])
    assert ours[:, :length].equal(theirs[:, :length])
    assert (ours[:, length:] == PAD).all() and (theirs[:, length:] == PAD).all()


def table_model(seed: int, sharp: float) -> SimpleNamespace:
    """A language model that knows only the last word and the picture's number: a plain reader of 2-wide rows."""
    torch.manual_seed(seed)
    return SimpleNamespace(table=torch.randn(9, WORDS, WORDS) * sharp)


@pytest.mark.parametrize("seed", range(4))
def test_beams_over_a_table_are_those_of_transformers_generate(seed):
    made, how, count = table_model(seed, 1.0 + seed % 3), Writing(2 + seed % 3, seed / 4, max_words=7), 5
    never = never_written(WORDS, MASK, torch.device("cpu"))
    places = torch.arange(count)

    class Next:
        def __init__(self):
            self.pictures = places

        def __call__(self, ids: Tensor) -> Tensor:
            return made.table[self.pictures, ids[:, -1]].log_softmax(-1) + never

        def choose(self, chosen: Tensor, width: int) -> None:
            self.pictures = self.pictures[chosen]

    ours = write(Next(), count, how, None, torch.device("cpu"))
    theirs = transformers_beams(lambda ids, own: made.table[own, ids[:, -1]], count, how)
    length = theirs.shape[1]
    assert ours[:, :length].equal(theirs) and (ours[:, length:] == PAD).all()


@torch.no_grad()
def test_a_text_does_not_depend_on_the_others_in_its_batch():
    model, words = encoder(PAPER).eval(), head(1, sharp=0.5)
    draws = torch.from_numpy(np.stack([sample_rng(0, 0, number).random(8) for number in range(5)]))
    for how in (Writing(3, max_words=8), Writing(1, max_words=8), Writing(1, top_p=0.8, max_words=8)):

        def texts(some: slice, how: Writing = how) -> list[list[int]]:
            shown = pictures(5)[some]
            next_word = NextWord(model.causal_text(shown, LONGEST), words, MASK)
            rows = write(next_word, len(shown), how, draws[some], torch.device("cpu")).tolist()
            return [[i for i in row if i != PAD] for row in rows]

        together = texts(slice(5))
        assert [text for n in range(5) for text in texts(slice(n, n + 1))] == together
        assert all(text[0] == BOS and not {PAD, UNK, MASK} & set(text) and BOS not in text[1:] for text in together)


def test_words_are_drawn_from_the_nucleus_in_proportion():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    ids = torch.tensor([[7, 8, 9, 10]])
    scores = torch.full((1, WORDS), -torch.inf).scatter(1, ids, shares.log().unsqueeze(0))
    draws = torch.linspace(0, 1, 1001)[:-1].double()
    drawn = write(
        lambda ids: scores.expand(len(ids), -1), 1000, Writing(1, top_p=0.9, max_words=1), draws[:, None], "cpu"
    )
    counts = torch.bincount(drawn[:, 1], minlength=WORDS)[7:11]
    # 0.5 and 0.3 are less than 0.9 together, so 0.15 is the last one in.
    assert (counts - torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95 * 1000).abs().max() <= 1 and counts[3] == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"beams": 0}, "beams=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": 0.9}, "use beams=1"),
        ({"temperature": 0}, "=0"),
    ],
)
def test_wrong_settings_are_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words):
        Writing(**wrong)
