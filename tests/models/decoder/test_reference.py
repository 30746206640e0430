"""BLIP against transformers' own: outputs, losses, gradients and what it writes, on weights that come in by export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pretrain
from pretrain.batch import PAD, Layout, make_batch
from pretrain.data.json_tokenizer import JsonTokenizer
from pretrain.layers import PLAIN
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.decoder.released import blip_config, from_blip
from pretrain.models.generation import NextWord, WholePass, Writing, _draw, never_written, text_reader, write
from pretrain.objectives.captioning import Captioning
from pretrain.parallel.state import dense_shape, named_state
from pretrain.recipes.blip_base import RECIPE
from pretrain.run.huggingface import from_huggingface
from tests.models.decoder.blips import CAPTIONER, RETRIEVER, VOCABULARY, as_theirs, words, write_blip
from tests.models.towers.others import COUNT, LENGTH, dual_batch

NEAR = {"atol": 1e-5, "rtol": 1e-5}
PATCHES = 16


def both(name: str, place) -> tuple:
    """(their model, our task with its weights, the tokenizer)."""
    theirs = write_blip(place / "theirs", name)
    from_huggingface(place / "theirs", None, place / "ours")
    loaded = pretrain.load(place / "ours")
    return theirs, loaded.task, JsonTokenizer(place / "ours/text.json")


def check_grads(task, theirs, tokenizer) -> None:
    """Theirs in our names and order. Of what only one role has, and of pictures' weights for another normalisation,
    the import does not give the gradients."""
    state = {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    state |= {name: torch.zeros_like(value) for name, value in theirs.named_parameters() if value.grad is None}
    wanted = from_blip(state, theirs.config, tokenizer.own_ids, "theirs")
    checked = 0
    for name, value in task.named_parameters():
        if value.grad is None or not value.grad.any() or "vision_embed.proj" in name or "logit_scale" in name:
            continue
        torch.testing.assert_close(value.grad, wanted[name], **NEAR, msg=lambda text, name=name: f"{name}: {text}")
        checked += 1
    assert checked > 40


def paired(batch) -> Layout:
    return Layout(pairs=COUNT, patches=PATCHES, pair_len=batch.layout.text_len)


def test_the_retriever_equals_its_reference(tmp_path):
    theirs, task, tokenizer = both(RETRIEVER, tmp_path)
    batch = dual_batch(VOCABULARY - 1)
    wanted = theirs(**as_theirs(batch, tokenizer), use_itm_head=False).itm_score
    images, texts = task.objectives["contrastive"].embed(task.encoder(batch), batch.layout)
    torch.testing.assert_close(images @ texts.T, wanted, **NEAR)

    matched = theirs(**as_theirs(batch, tokenizer, first=VOCABULARY + 1)).itm_score  # [ENC]
    pairs = make_batch(paired(batch), images=batch.images, pair_tokens=batch.text_tokens)
    got = task.objectives["matching"].match(task.encoder(pairs).first.pair_images)
    torch.testing.assert_close(got, matched, **NEAR)

    for scores, logits in ((images @ texts.T, got), (wanted, matched)):
        (scores.square().sum() + logits.square().sum()).backward()
    check_grads(task, theirs, tokenizer)
    assert not task.encoder.text[0].causal.q.weight.grad.any()


def test_the_captioner_equals_its_reference(tmp_path):
    theirs, task, tokenizer = both(CAPTIONER, tmp_path)
    batch = dual_batch(VOCABULARY - 1)
    given = as_theirs(batch, tokenizer, first=VOCABULARY)  # [DEC]
    labels = given["input_ids"].masked_fill(batch.text_tokens == PAD, -100)
    wanted = theirs(**given, labels=labels)
    head = task.objectives["captioning"]
    own = Captioning(smoothing=0.1, mean_over="targets")
    head.smoothing, head.mean_over = own.smoothing, own.mean_over
    causal = replace(paired(batch), causal=True)
    pairs = make_batch(causal, images=batch.images, pair_tokens=batch.text_tokens)
    logits = head.logits(task.encoder(pairs).pair_texts)
    order = [*tokenizer.own_ids, VOCABULARY, VOCABULARY + 1]
    real = batch.text_tokens != PAD
    torch.testing.assert_close(logits[real], wanted.logits[real][:, order], **NEAR)
    got = head(None, batch.indexed(), task.encoder)
    torch.testing.assert_close(got["loss"], wanted.loss, **NEAR)

    got["loss"].backward()
    wanted.loss.backward()
    check_grads(task, theirs, tokenizer)
    assert not task.encoder.text[0].own.q.weight.grad.any()


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.6)])
@torch.no_grad()
def test_what_it_writes_is_what_transformers_generates(beams, penalty, tmp_path):
    theirs, task, tokenizer = both(CAPTIONER, tmp_path)
    batch = dual_batch(VOCABULARY - 1, count=6)
    never = [tokenizer.own_ids[i] for i in (0, 1, 3, tokenizer.mask_id)] + [VOCABULARY, VOCABULARY + 1]
    wanted = theirs.generate(
        as_theirs(batch, tokenizer)["pixel_values"], max_length=LENGTH, num_beams=beams, length_penalty=penalty,
        early_stopping=False, do_sample=False, suppress_tokens=never,
    )  # fmt: skip
    how = Writing(beams, penalty, max_words=LENGTH - 1)
    reader = text_reader(task.encoder, batch.images, PATCHES, LENGTH)
    next_word = NextWord(reader, task.objectives["captioning"].logits, tokenizer.mask_id)
    ours = words(write(next_word, 6, how, None, torch.device("cpu")), tokenizer)
    texts = [row[1:].tolist() for row in wanted]
    expected = [text[: text.index(3)] if 3 in text else [i for i in text if i] for text in texts]
    assert ours == expected and len({len(text) for text in ours}) > 1 and len({tuple(text) for text in ours}) > 2


@torch.no_grad()
def test_kept_rows_are_those_of_whole_passes():
    model = EncoderDecoder(
        dim=16, heads=2, ffn_dim=32, image_depth=1, text_depth=2, image_size=32, patch_size=8, vocab_size=30,
        max_text_len=LENGTH, init_std=0.2,
    )  # fmt: skip
    encoder, pictures = model.build(()).eval(), dual_batch(20, count=2).images
    fast, plain = text_reader(encoder, pictures, PATCHES, LENGTH), WholePass(encoder, pictures, PATCHES)
    drawn = torch.Generator().manual_seed(0)

    def same(length: int, width: int, keep: int | None = None) -> None:
        ids = torch.randint(4, 28, (2 * width, length), generator=drawn)
        torch.testing.assert_close(fast.read(ids, keep), plain.read(ids, keep), rtol=0, atol=1e-5)

    same(2, 1)
    same(2, 1, keep=1)
    for places in ([0, 0, 0, 1, 1, 1], [2, 0, 2, 4, 4, 3]):
        for reader in (fast, plain):
            reader.choose(torch.tensor(places), 3)
        same(2, 3, keep=1)


def test_the_nucleus_is_that_of_transformers():
    """The words that may be drawn and their shares: its warper's, over as many uniform numbers as show them."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    never = never_written(30, 28, torch.device("cpu"))
    scores = (torch.randn(5, 30) * 2 + never).log_softmax(-1)
    for top_p, temperature in ((0.9, 1.0), (0.5, 0.7), (1.0, 1.0)):
        warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores))
        wanted = warped.softmax(-1)
        uniform = (torch.arange(20_000).double() + 0.5) / 20_000
        for row, share in zip(scores, wanted, strict=True):
            drawn = _draw((row / temperature).expand(20_000, -1), top_p, uniform)
            counts = torch.bincount(drawn, minlength=30) / 20_000
            torch.testing.assert_close(counts, share, rtol=0, atol=1.1e-4)


def test_released_weights_have_the_names_and_shapes_of_the_recipe():
    """transformers' defaults are BLIP base's, but for the heads of its texts and the size of fine-tuned pictures."""
    import transformers

    config = transformers.BlipConfig(text_config={"num_attention_heads": 12}, vision_config={"image_size": 224})
    stage = RECIPE.stages["fusion"]
    with torch.device("meta"):
        task = stage.task.build(blip_config(config, 30_522), stage, PLAIN, None)
        recipes = stage.task.build(RECIPE.model, stage, PLAIN, None)
        wanted = {name: dense_shape(value) for name, value in named_state(task).items()}
        assert wanted == {name: dense_shape(value) for name, value in named_state(recipes).items()}
        for name, heads in ((CAPTIONER, 5), (RETRIEVER, 7)):
            theirs = getattr(transformers, name)(config).state_dict()
            state = from_blip(theirs, config, range(30_522), name)
            assert {key: wanted[key] for key in state} == {key: tuple(value.shape) for key, value in state.items()}
            encoder = {key for key in state if key.startswith("encoder.")}
            assert encoder == {key for key in wanted if key.startswith("encoder.")}
            assert len(state) - len(encoder) == heads
