"""The single stream against transformers.ViltModel: rows, and the gradients of every weight, on copied weights."""

from __future__ import annotations

import pytest
import torch

from pretrain.batch import PAD, Layout, make_batch
from pretrain.checkpoint.weights import read_weights
from pretrain.data.json_tokenizer import JsonTokenizer
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.vilt import from_vilt
from pretrain.run.huggingface import from_huggingface
from pretrain.run.stored_weights import model_in
from pretrain.tensors import load_tensors
from tests.models.towers.others import SIZES, as_theirs, dual_batch, moved, write_directory


def test_rows_and_gradients_equal_the_reference(tmp_path):
    import transformers

    torch.manual_seed(0)
    settings = SIZES | {"image_size": 32, "patch_size": 8, "vocab_size": 25, "max_position_embeddings": 8}
    theirs = moved(transformers.ViltModel(transformers.ViltConfig(**settings), add_pooling_layer=False))
    from_huggingface(write_directory(tmp_path / "theirs", theirs, "bert"), None, tmp_path / "ours")
    state, config = read_weights(tmp_path / "ours")
    model = model_in(config, tmp_path)
    assert isinstance(model, MultiwayConfig) and model.ffn == "shared"
    encoder = model.build(("vision", "language")).eval()
    load_tensors(encoder, {name.removeprefix("encoder."): value for name, value in state.items()}, "export")

    batch = dual_batch(model.vocab_size - 1)
    order = JsonTokenizer(tmp_path / "ours/text.json").own_ids
    real = batch.text_tokens != PAD
    pairs = make_batch(
        Layout(pairs=len(real), patches=16, pair_len=real.shape[1]), images=batch.images, pair_tokens=batch.text_tokens
    )
    rows = encoder(pairs)
    wanted = theirs(
        input_ids=as_theirs(batch.text_tokens, order),
        attention_mask=real.long(),
        pixel_values=batch.images.float() / 127.5 - 1,
    ).last_hidden_state
    words, patches = wanted.split([real.shape[1], wanted.shape[1] - real.shape[1]], dim=1)
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(rows.pair_texts[real], words[real], **near)
    # It draws an order of the patches anew in each pass; the class row stays first.
    torch.testing.assert_close(rows.pair_images[:, 0], patches[:, 0], **near)
    torch.testing.assert_close(rows.pair_images.sum(1), patches.sum(1), **near)

    weigh = torch.randn(model.dim, generator=torch.Generator().manual_seed(1))
    for own in ((rows.pair_texts[real], rows.pair_images), (words[real], patches)):
        sum(((part * weigh) ** 2).sum() / 100 for part in own).backward()
    # The rows that are sums here have the gradient of each of their parts, so these are left out of the sums.
    grads = {name: value.grad.clone() for name, value in theirs.named_parameters()}
    kept = {name: grads[name] for name in grads if "token_type" in name}
    for name in kept:
        grads[name] = torch.zeros_like(grads[name])
    wanted_grads = from_vilt(grads, theirs.config, order)
    for name, value in encoder.named_parameters():
        if "mask_token" in name or name == "text_embed.tokens.weight":
            continue
        torch.testing.assert_close(
            value.grad, wanted_grads[f"encoder.{name}"], **near, msg=lambda t, n=name: f"{n}: {t}"
        )
    table = encoder.text_embed.tokens.weight.grad[4:-1]
    torch.testing.assert_close(table, wanted_grads["encoder.text_embed.tokens.weight"][4:-1], **near)
    torch.testing.assert_close(
        kept["embeddings.token_type_embeddings.weight"][0], encoder.text_embed.norm.bias.grad, **near
    )


def test_a_single_stream_has_no_fusion_expert():
    sizes = {"dim": 16, "depth": 2, "heads": 2, "ffn_dim": 32, "image_size": 32, "patch_size": 8, "vocab_size": 25}
    with pytest.raises(ValueError, match=r"fusion_layers=1 does not go with model\.ffn='shared'.*; use 0"):
        MultiwayConfig(**sizes, ffn="shared", fusion_layers=1)
    names = {name for name, _ in MultiwayConfig(**sizes, ffn="shared").build(("vision", "language")).named_parameters()}
    assert {name.split(".")[3] for name in names if ".experts." in name} == {"shared"}
