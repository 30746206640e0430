"""Losses and gradients of a step against ALBEF's own code (salesforce/ALBEF b9727e4, models/model_pretrain.py):

    ALBEF_CODE=~/ALBEF python -m pytest tests/models/fusion/test_reference_albef.py

Two steps of one rank on copied random weights, fp32, the same wrong partners, the same hidden words: each loss and the
gradient of every weight to 1e-5. Its dropout is set to 0 and its soft targets for words are switched off: albef_base.py
says that it has none of them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.batch import PAD, Batch, Layout, make_batch
from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.objectives.momentum import MomentumContrast
from pretrain.tasks.pretrain import PretrainTask
from tests.models.fusion.test_text_queries_image import BLOCK
from tests.models.towers.others import LENGTH, dual_batch
from tests.published_code import away, check_near, gradients, imported, place_of, split_qkv, timm

WORDS, COUNT, QUEUE, WIDTH, ALPHA, MOMENTUM, TEMPERATURE = 40, 6, 12, 12, 0.4, 0.9, 0.4
MODEL = TextQueriesImage(
    dim=16, heads=2, ffn_dim=32, image_depth=2, text_depth=2, fusion_depth=2, image_size=32, patch_size=16,
    vocab_size=WORDS, max_text_len=LENGTH,
)  # fmt: skip
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "mlp_ratio": 2}


class OldModel(nn.Module):
    """What their BERT takes from transformers 4.8's PreTrainedModel."""

    dtype = torch.float32

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def init_weights(self) -> None:
        if hasattr(self, "cls"):  # tie_weights
            self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def get_head_mask(self, mask: None, layers: int) -> list[None]:
        return [None] * layers

    def invert_attention_mask(self, mask: Tensor) -> Tensor:
        return (1.0 - mask[:, None, None, :].float()) * -10_000.0

    @classmethod
    def from_pretrained(cls, path: str, config: Any) -> OldModel:
        return cls(config)


def transformers_48() -> dict[str, dict[str, Any]]:
    import transformers
    from transformers import activations, modeling_outputs, pytorch_utils
    from transformers.models.bert.configuration_bert import BertConfig

    def unchanged(*_: Any, **__: Any) -> Any:
        return lambda decorated: decorated

    names = ("add_code_sample_docstrings", "add_start_docstrings", "add_start_docstrings_to_model_forward",
             "replace_return_docstrings")  # fmt: skip
    utils = {"PreTrainedModel": OldModel, "apply_chunking_to_forward": pytorch_utils.apply_chunking_to_forward}
    pruning = {"find_pruneable_heads_and_indices": None, "prune_linear_layer": None}
    return {
        "transformers": {"logging": transformers.logging},
        "transformers.activations": vars(activations),
        "transformers.file_utils": dict.fromkeys(names, unchanged) | {"ModelOutput": dict},
        "transformers.modeling_outputs": vars(modeling_outputs),
        "transformers.modeling_utils": utils | pruning,
        "transformers.utils": {"logging": transformers.logging},
        "transformers.models": {},
        "transformers.models.bert": {},
        "transformers.models.bert.configuration_bert": {"BertConfig": BertConfig},
    }


def build_theirs(module: Any) -> Any:
    from transformers.models.bert.configuration_bert import BertConfig

    config = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=LENGTH, type_vocab_size=2,
        layer_norm_eps=1e-12, pad_token_id=PAD,
    )  # fmt: skip
    config.fusion_layer, config.encoder_width, config.add_cross_attention = 2, 16, False
    config.output_attentions = config.output_hidden_states = False
    vit = module.VisionTransformer
    module.VisionTransformer = lambda **own: vit(**own | SIZES)
    module.BertConfig = SimpleNamespace(from_json_file=lambda path: config)
    module.concat_all_gather = lambda rows: rows
    settings = {"mlm_probability": 0.15, "embed_dim": WIDTH, "image_res": 32, "vision_width": 16, "bert_config": "",
                "temp": 0.5, "queue_size": QUEUE, "momentum": MOMENTUM}  # fmt: skip
    torch.manual_seed(0)
    theirs = module.ALBEF(config=settings, init_deit=False)
    away(theirs, seed=1)
    theirs.temp.data.fill_(TEMPERATURE)  # inside of the bounds that theirs and ours do not share
    theirs.copy_params()
    theirs.text_encoder.register_forward_pre_hook(lambda _, __, own: ((__), own | {"alpha": 0}), with_kwargs=True)
    return theirs


def as_ours(state: dict[str, Tensor], *, gradient: bool = False) -> dict[str, Tensor]:
    """Their tensors by our names. A token's type, of which there is one, is part of the position here; the temperature
    is the logarithm of a scale."""
    words, bert, eye = "encoder.text_embed", "text_encoder.bert", "encoder.image"
    before = "text_encoder.cls.predictions.transform"
    positions, kinds = (state[f"{bert}.embeddings.{name}_embeddings.weight"] for name in ("position", "token_type"))
    own = {
        f"{words}.tokens.weight": state[f"{bert}.embeddings.word_embeddings.weight"],
        f"{words}.positions": positions + (0 if gradient else kinds[0]),
        f"{eye}.vision_embed.cls_token": state["visual_encoder.cls_token"],
        f"{eye}.vision_embed.positions": state["visual_encoder.pos_embed"][0],
        "objectives.masked.text.bias": state["text_encoder.cls.predictions.bias"],
    }
    temperature = state["temp"].reshape(1)
    own["objectives.contrastive.logit_scale"] = -TEMPERATURE * temperature if gradient else -temperature.log()
    for part in ("weight", "bias"):
        pairs = {f"visual_encoder.norm.{part}": f"{eye}.norm.shared.{part}",
                 f"visual_encoder.patch_embed.proj.{part}": f"{eye}.vision_embed.proj.{part}",
                 f"{bert}.embeddings.LayerNorm.{part}": f"{words}.norm.{part}",
                 f"vision_proj.{part}": f"objectives.contrastive.vision.{part}",
                 f"text_proj.{part}": f"objectives.contrastive.language.{part}",
                 f"itm_head.{part}": f"objectives.matching.match.{part}",
                 f"{before}.dense.{part}": f"objectives.masked.transform.0.{part}",
                 f"{before}.LayerNorm.{part}": f"objectives.masked.transform.2.{part}"}  # fmt: skip
        for number in range(2):
            block, mine = f"visual_encoder.blocks.{number}", f"{eye}.blocks.{number}"
            pairs |= {f"{block}.{old}.{part}": f"{mine}.{new}.{part}" for old, new in (
                ("norm1", "norm.shared"), ("attn.proj", "attention.out.shared"), ("norm2", "experts.vision.norm"),
                ("mlp.fc1", "experts.vision.up"), ("mlp.fc2", "experts.vision.down"),
            )}  # fmt: skip
            own |= split_qkv(state, f"{block}.attn.qkv.{part}", f"{mine}.attention")
        for number in range(4):
            mine = f"encoder.{'text' if number < 2 else 'fusion'}.{number % 2}"
            for old, new in BLOCK.items():
                pairs[f"{bert}.encoder.layer.{number}.{old}.{part}"] = f"{mine}.{new}.{part}"
        own |= {new: state[old].flatten(1) if "patch_embed" in old and part == "weight" else state[old]
                for old, new in pairs.items() if old in state}  # fmt: skip
    return own


def step_of(seed: int) -> Batch:
    """Six pairs, seen apart and fused, the fused ones with hidden words."""
    dual = dual_batch(WORDS - 1, seed=seed, count=COUNT, patch=16)
    made = torch.Generator().manual_seed(seed)
    ids = dual.text_tokens
    masked = (torch.rand(ids.shape, generator=made) < 0.4) & (ids > 3)
    masked[:, 1] |= ids[:, 1] > 3
    return make_batch(
        Layout(images=COUNT, pairs=COUNT, texts=COUNT, patches=4, pair_len=LENGTH, text_len=LENGTH, dual=COUNT),
        images=torch.cat([dual.images, dual.images]), pair_tokens=ids, pair_masked=masked, text_tokens=ids,
        pair_inputs=ids.masked_fill(masked, WORDS - 1), draws={"matching": torch.rand(3 * COUNT, 1, generator=made)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def models():
    place = place_of("ALBEF_CODE", "ALBEF", "DIRECTORY")
    with imported(place, ("models.model_pretrain",), timm() | transformers_48(), "models") as (module,):
        theirs = build_theirs(module)
        contrast = MomentumContrast(WIDTH, 0.5, momentum=MOMENTUM, queue=QUEUE, alpha=ALPHA, projection_bias=True)
        words = MaskedData(image_ratio=0, pair_image_ratio=0, text_ratio=0, pair_text_ratio=0.15, dual=False,
                           tied_text_head=True, transform=True, mean_over="targets")  # fmt: skip
        ours = PretrainTask(MODEL, ("vision", "language"), (contrast, Matching("local"), words))
        rest = ours.load_state_dict(as_ours(theirs.state_dict()), strict=False)
        assert not rest.unexpected_keys
        assert {n for n in rest.missing_keys if ".teacher." not in n and ".queue." not in n} == {
            "encoder.image.vision_embed.mask_token", "objectives.masked.text.weight",
        }  # fmt: skip
        ours.before_training([])
        for kind, own in (("image", "images"), ("text", "texts")):
            getattr(ours.objectives["contrastive"].queue, own).copy_(getattr(theirs, f"{kind}_queue").T)
        yield ours.train(), theirs.train()


def their_losses(theirs: Any, batch: Batch, wrong: tuple[Tensor, Tensor], monkeypatch) -> list[Tensor]:
    wrong_text, wrong_image = wrong
    drawn = iter([*wrong_image, *wrong_text])  # a picture for each text first
    monkeypatch.setattr(torch, "multinomial", lambda shares, count: next(drawn))
    theirs.mask = lambda *_, **__: (batch.pair_inputs, batch.pair_tokens.masked_fill(~batch.pair_masked, -100))
    text = SimpleNamespace(input_ids=batch.text_tokens, attention_mask=(batch.text_tokens != PAD).long())
    words, contrast, match = theirs(batch.images[:COUNT].float() / 127.5 - 1, text, alpha=ALPHA)
    assert next(drawn, None) is None
    return [contrast, match, words]


def test_losses_and_gradients_equal_the_published_code(models, monkeypatch):
    ours, theirs = models
    for seed in (1, 2):
        batch = step_of(seed)
        report = ours(batch)
        wrong = ours.objectives["matching"].draw(ours.encoder(batch), batch)
        losses = their_losses(theirs, batch, wrong, monkeypatch)
        names = ("contrastive", "matching", "masked")
        check_near({n: report[f"loss/{n}"] for n in names}, dict(zip(names, losses, strict=True)))
        ours.zero_grad()
        theirs.zero_grad()
        report["loss"].backward()
        sum(losses).backward()
        check_near(gradients(ours), as_ours(gradients(theirs), gradient=True))
        # A step; the teachers follow and the queues take the vectors, theirs when the next one begins.
        away(theirs, seed=seed + 5, std=0.01)
        theirs.temp.data.fill_(TEMPERATURE)
        ours.load_state_dict(as_ours(theirs.state_dict()), strict=False)
        ours.after_step()
        for kind, own in (("image", "images"), ("text", "texts")):
            queue = getattr(theirs, f"{kind}_queue").T
            check_near({own: getattr(ours.objectives["contrastive"].queue, own)}, {own: queue})
