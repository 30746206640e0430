"""timm's BEiT-3 loads what export to-released writes and gives our patches."""

from __future__ import annotations

import pytest
import torch

import tests.vision_operators  # noqa: F401
from pretrain.batch import Layout, make_batch
from pretrain.released_weights import read_tensors, to_released, write_tensors
from tests.test_export import CONFIG, weights
from tests.toy_models import pictures

ABSENT = "timm is not installed; it is no part of the suite"


@torch.no_grad()
def test_timm_loads_the_vision_tower_of_our_export(tmp_path):
    timm = pytest.importorskip("timm", reason=ABSENT)
    if not hasattr(timm, "create_model"):  # what benchmarks.compare puts in its place for torchscale
        pytest.skip(ABSENT)
    state = weights()
    write_tensors(tmp_path / "ours.pth", to_released(state, CONFIG))
    sizes = {"img_size": CONFIG.image_size, "patch_size": CONFIG.patch_size, "embed_dim": CONFIG.dim}
    sizes |= {"depth": CONFIG.depth, "num_heads": CONFIG.heads, "mlp_ratio": CONFIG.ffn_dim / CONFIG.dim}
    theirs = timm.create_model("beit3_base_patch16_224", num_classes=0, **sizes).eval()
    from timm.models.vision_transformer import checkpoint_filter_fn

    read = checkpoint_filter_fn(read_tensors(tmp_path / "ours.pth"), theirs)
    told = theirs.load_state_dict(read, strict=False)
    # It pools patches and then has a norm, which is a classifier's; its blocks are followed by none.
    assert set(told.missing_keys) <= {"fc_norm.weight", "fc_norm.bias"}, told.missing_keys
    ours = CONFIG.build(("vision", "language"))
    ours.load_state_dict({name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")})
    rows = list[torch.Tensor]()
    ours.blocks[-1].register_forward_hook(lambda module, inputs, out: rows.append(out))
    pixels = pictures(3)
    ours.eval()(make_batch(Layout(images=3, patches=CONFIG.patches), images=pixels))
    theirs.fc_norm, theirs.norm = torch.nn.Identity(), torch.nn.Identity()
    got = theirs.forward_features(pixels.float() / 127.5 - 1)
    torch.testing.assert_close(got, rows[0].view_as(got), rtol=0, atol=1e-5 * rows[0].abs().max().item())
