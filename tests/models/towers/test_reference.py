"""Towers against transformers' own models: outputs, loss and gradients on the same weights, which come in by export."""

from __future__ import annotations

import pytest
import torch

import pretrain
from pretrain.batch import PAD
from pretrain.checkpoint.weights import read_weights
from pretrain.data.json_tokenizer import JsonTokenizer
from pretrain.models.towers import released
from pretrain.models.towers.dual import DualTowers
from pretrain.models.towers.tower import Tower
from pretrain.objectives.contrastive import Contrastive
from pretrain.run.huggingface import from_huggingface
from pretrain.run.stored_weights import model_in
from pretrain.tasks.pretrain import PretrainTask
from pretrain.tensors import load_tensors
from tests.models.towers.others import SIZES, as_theirs, dual_batch, moved, whole_model, write_directory

NEAR = {"atol": 1e-5, "rtol": 1e-5}
OBJECTIVES = {
    "clip": Contrastive(embed_dim=12),
    "siglip": Contrastive(loss="sigmoid", project=False),
    "align": Contrastive(temperature=1.0, project=False, smoothing=0.1),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_whole_model_equals_its_reference(kind, tmp_path):
    theirs = whole_model(kind)
    from_huggingface(write_directory(tmp_path / "theirs", theirs, kind), None, tmp_path / "ours")
    state, config = read_weights(tmp_path / "ours")
    model = model_in(config, tmp_path, {DualTowers})
    task = PretrainTask(model, ("vision", "language"), (OBJECTIVES[kind],)).eval()
    load_tensors(task, state, "export")
    assert state.keys() == task.state_dict().keys()
    tokenizer = JsonTokenizer(tmp_path / "ours/text.json")
    order = tokenizer.own_ids
    assert model.vocab_size == tokenizer.vocab_size == len(order)
    batch = dual_batch(model.vocab_size - 1, size=64 if kind == "align" else 32)
    pixels = batch.images.float() / 255
    look = model.vision.mean, model.vision.std
    pixels = (pixels - torch.tensor(look[0]).view(3, 1, 1)) / torch.tensor(look[1]).view(3, 1, 1)
    end = order[1] if kind == "align" else order[2]  # the other two pad by the end of text
    ids = as_theirs(batch.text_tokens, [order[0], end, *order[2:]])
    mask = (batch.text_tokens != PAD).long()
    words = {"input_ids": ids, "attention_mask": mask} if kind != "siglip" else {"input_ids": ids[:, 1:]}
    wanted = theirs(pixel_values=pixels, **words, return_loss=True)

    head = task.objectives["contrastive"]
    got = head.embed(task.encoder(batch), batch.layout)
    torch.testing.assert_close(got, (wanted.image_embeds, wanted.text_embeds), **NEAR)
    loss = task(batch)["loss"]
    torch.testing.assert_close(loss, wanted.loss, **NEAR)

    loss.backward()
    wanted.loss.backward()
    wanted_grads = {name: value.grad for name, value in theirs.named_parameters()}
    grads = {name: value.grad for name, value in task.named_parameters()}
    assert all(value is not None and value.any() for value in grads.values()), "a tensor takes no part"
    _check_grads(grads, wanted_grads, kind, order)


@torch.no_grad()
def test_a_text_has_the_vector_of_its_reference_whatever_the_others_in_its_batch(tmp_path):
    """SigLIP's text tower reads padding, so that its processor pads every text to the model's length."""
    theirs = whole_model("siglip")
    from_huggingface(write_directory(tmp_path / "theirs", theirs, "siglip"), None, tmp_path / "ours")
    ours = pretrain.load(tmp_path / "ours", device="cpu")
    rows = theirs.text_model(input_ids=torch.tensor([[4, 8, 1, 1, 1, 1, 1], [5, 6, 7, 8, 1, 1, 1]])).pooler_output
    wanted = torch.nn.functional.normalize(rows, dim=-1)
    texts = ["word1 word5", "word2 word3 word4 word5"]
    torch.testing.assert_close(ours.embed_texts(texts), wanted, **NEAR)
    torch.testing.assert_close(ours.embed_texts(texts, batch=1), wanted, **NEAR)


def _check_grads(grads, wanted, kind, order):
    named = released._named(wanted, "vision_model.", "encoder.vision.model.")
    named |= released._named(wanted, "text_model.", "encoder.text.model.")
    if kind == "align":
        named |= released._named(wanted, "text_projection.", "encoder.text.project.")
        named = {name: value for name, value in named.items() if ".pooler." not in name}
    if kind == "siglip":
        named = released._siglip(named)
        order = [order[0], order[2], *order[2:]]
    for name, own in grads.items():
        if name.startswith("objectives."):
            continue
        other = named.pop(name)
        if name.endswith(("token_embedding.weight", "word_embeddings.weight")):
            # Padding and end of text are two rows here and one there.
            table = torch.zeros_like(other).index_add_(0, torch.tensor(order).clamp(min=0), own)
            torch.testing.assert_close(table, other, **NEAR)
            continue
        torch.testing.assert_close(own, other, **NEAR, msg=lambda text, name=name: f"{name}: {text}")
    assert not named, f"without a counterpart: {list(named)}"


PATCHED = SIZES | {"image_size": 32, "patch_size": 8}
SINGLE = {
    "vit": ("ViTModel", PATCHED),
    "resnet": ("ResNetModel", {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "efficientnet": (
        "EfficientNetModel",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    ),
    "bert": ("BertModel", SIZES | {"vocab_size": 25, "max_position_embeddings": 8, "pad_token_id": 0}),
    "roberta": ("RobertaModel", SIZES | {"vocab_size": 25, "max_position_embeddings": 10, "pad_token_id": 1}),
}


@pytest.mark.parametrize("vision", ["vit", "resnet", "efficientnet"])
@pytest.mark.parametrize("text", ["bert", "roberta"])
def test_two_directories_become_towers_with_their_outputs(vision, text, tmp_path):
    import transformers

    theirs = {}
    for kind in (vision, text):
        name, settings = SINGLE[kind]
        config = transformers.AutoConfig.for_model(kind, **settings)
        torch.manual_seed(1)
        theirs[kind] = moved(getattr(transformers, name)(config))
        write_directory(tmp_path / kind, theirs[kind], kind if kind == text else None)
    from_huggingface(tmp_path / vision, tmp_path / text, tmp_path / "ours")
    state, config = read_weights(tmp_path / "ours")
    model = model_in(config, tmp_path, {DualTowers})
    encoder = model.build(()).eval()
    load_tensors(encoder, {name.removeprefix("encoder."): value for name, value in state.items()}, "export")
    size = model.image_size if vision != "resnet" else 64
    batch = dual_batch(model.vocab_size - 1, size=size)
    with torch.no_grad():
        got = encoder(batch)
        look = Tower(vision, pooling="mean", mean=model.vision.mean, std=model.vision.std)
        pixels = batch.images.float() / 255
        pixels = (pixels - torch.tensor(look.mean).view(3, 1, 1)) / torch.tensor(look.std).view(3, 1, 1)
        seen = theirs[vision](pixel_values=pixels)
        ids = as_theirs(batch.text_tokens, JsonTokenizer(tmp_path / text / "tokenizer.json").own_ids)
        read = theirs[text](input_ids=ids, attention_mask=(batch.text_tokens != PAD).long())
    pooled = seen.last_hidden_state[:, 0] if vision == "vit" else seen.pooler_output.flatten(1)
    torch.testing.assert_close(got.images[:, 0], pooled, **NEAR)
    torch.testing.assert_close(got.texts[:, 0], read.last_hidden_state[:, 0], **NEAR)


def test_published_sizes_have_the_names_and_shapes_of_the_reference():
    """transformers' defaults are CLIP ViT-B/32's, SigLIP base's and ALIGN base's, the last one's texts of 64 ids."""
    import transformers

    from pretrain.recipes._towers import ALIGN_B7, CLIP_B16, SIGLIP_B16

    with torch.device("meta"):
        clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config={"patch_size": 16}))
        siglip = transformers.SiglipModel(transformers.SiglipConfig())
        align = transformers.AlignModel(transformers.AlignConfig(text_config={"max_position_embeddings": 64}))
        every = (CLIP_B16, clip, 49_408), (SIGLIP_B16, siglip, 32_000), (ALIGN_B7, align, 30_522)
        for model, theirs, vocabulary in every:
            own = model.build(()).state_dict()
            wanted = released._named(theirs.state_dict(), "vision_model.", "encoder.vision.model.")
            wanted |= released._named(theirs.state_dict(), "text_model.", "encoder.text.model.")
            wanted |= released._named(theirs.state_dict(), "text_projection.", "encoder.text.project.")
            wanted = {name: value for name, value in wanted.items() if theirs is not align or ".pooler." not in name}
            wanted = wanted if theirs is not clip else {k: v for k, v in wanted.items() if ".project." not in k}
            wanted = released._siglip(wanted) if theirs is siglip else wanted
            shapes = {f"encoder.{name}": tuple(value.shape) for name, value in own.items()}
            tables = ("token_embedding.weight", "word_embeddings.weight")
            table = next(name for name in wanted if name.endswith(tables))
            assert shapes.pop(table) == (model.vocab_size, wanted[table].shape[1])
            assert wanted.pop(table).shape[0] == vocabulary <= model.vocab_size
            assert shapes == {name: tuple(value.shape) for name, value in wanted.items()}
