"""Losses and gradients of a step of VLMo's third stage against its own code (microsoft/unilm 768a3c8, vlmo/):

    VLMO_CODE=~/unilm/vlmo python -m pytest tests/models/multiway/test_reference_vlmo.py

On copied random weights, fp32, the same wrong partners, the same hidden words: each loss and the gradient of every
weight to 1e-5. Of theirs is left out what _vlmo.py says that ours leaves out: the contrast behind the fusion experts,
the pooler on [CLS] (ours reads the picture's class row), dropout, BERT's eps behind the embedding.
"""

from __future__ import annotations

from itertools import count as counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import PAD, Batch, Layout, make_batch
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.tasks.pretrain import PretrainTask
from tests.published_code import away, check_near, gradients, imported, place_of, split_qkv, timm
from tests.step_batches import EXPERTS, MODELS, step_batch

MODEL = MODELS["vlmo"]
COUNT, LENGTH = 6, MODEL.max_text_len
SIZES = {"image_size": MODEL.image_size, "drop_path_rate": 0.0, "max_text_len": LENGTH, "load_path": "",
         "max_text_len_of_initckpt": LENGTH, "vocab_size": MODEL.vocab_size, "model_arch": "",
         "loss_names": {"itm": 1, "itc": 1, "mlm": 1, "textmlm": 0, "vqa": 0, "nlvr2": 0, "irtr": 0}}  # fmt: skip
METRICS = ("mlm_loss", "mlm_accuracy", "itm_loss", "itm_accuracy", "itc_loss", "itc_logit_scale", "itc_i2t_accuracy",
           "itc_t2i_accuracy", "itc_vl_logit_scale", "itc_vl_i2t_accuracy", "itc_vl_t2i_accuracy")  # fmt: skip


class Lightning(nn.Module):
    """What theirs takes from pytorch_lightning's module."""

    hparams = SimpleNamespace(config=SIZES)
    device = torch.device("cpu")

    def save_hyperparameters(self) -> None:
        pass

    def log(self, name: str, value: Any) -> None:
        pass


class Ranks:
    """torch.distributed of one process that stands for several in turn: `others` answer what it gathers."""

    def __init__(self, rank: int = 0, others: list[list[Tensor]] | None = None):
        self.rank, self.others, self.sent, self.calls = rank, others or [], list[Tensor](), counter()

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return max(len(self.others), 1)

    def all_gather(self, into: list[Tensor], own: Tensor) -> None:
        self.sent.append(own.detach().clone())
        number = next(self.calls)
        for place, empty in enumerate(into):
            empty.copy_(own.detach() if place == self.rank else self.others[place][number])


def stubs() -> dict[str, dict[str, Any]]:
    import transformers.models.bert.modeling_bert  # noqa: F401  # it looks for scipy itself

    def small(_: str, pretrained: bool, drop_block_rate: None, **own: Any) -> nn.Module:
        from vlmo.modules.multiway_transformer import MultiWayTransformer  # type: ignore[import-not-found]

        return MultiWayTransformer(
            patch_size=MODEL.patch_size, embed_dim=MODEL.dim, depth=MODEL.depth, num_heads=MODEL.heads,
            mlp_ratio=MODEL.ffn_dim // MODEL.dim, vlffn_start_layer_index=MODEL.depth - MODEL.fusion_layers, **own,
        )  # fmt: skip

    def set_metrics(module: nn.Module) -> None:
        for name in METRICS:
            setattr(module, f"train_{name}", lambda *_: 0.0)

    lightning = {"pytorch_lightning": {"LightningModule": Lightning}, "pytorch_lightning.utilities": {},
                 "pytorch_lightning.utilities.distributed": {"rank_zero_info": lambda said: None}}  # fmt: skip
    return timm() | lightning | {
        "timm.models": {"create_model": small}, "scipy": {"interpolate": None},
        "vlmo.modules.vlmo_utils": {"set_metrics": set_metrics},
    }  # fmt: skip


def build_theirs(module: Any) -> Any:
    torch.manual_seed(0)
    theirs = module.VLMo(SIZES)
    words = theirs.text_embeddings
    for norm in (each for part in (theirs.transformer, words) for each in part.modules()):
        if isinstance(norm, nn.LayerNorm):
            norm.eps = MODEL.norm_eps
    away(theirs, seed=1)
    with torch.no_grad():
        # Of transformers 4.8, no positions are added where the blocks have relative ones.
        words.position_embeddings.weight.zero_()
    theirs.pooler = TakeClassRow()
    return theirs.train()


class TakeClassRow(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, LENGTH]  # behind the words


def as_ours(state: dict[str, Tensor], *, gradient: bool = False) -> dict[str, Tensor]:
    """Their tensors by our names. A word's type is a part of the word here, and what tells words and patches apart one
    of the text norm's bias, the patches' bias and the class row."""
    kinds = state["token_type_embeddings.weight"] * (0 if gradient else 1)
    first = state["text_embeddings.token_type_embeddings.weight"][0] * (0 if gradient else 1)
    own = {
        "text_embed.tokens.weight": state["text_embeddings.word_embeddings.weight"] + first,
        "text_embed.norm.weight": state["text_embeddings.LayerNorm.weight"],
        "text_embed.norm.bias": state["text_embeddings.LayerNorm.bias"] + kinds[0],
        "vision_embed.proj.weight": state["transformer.patch_embed.proj.weight"].flatten(1),
        "vision_embed.proj.bias": state["transformer.patch_embed.proj.bias"] + kinds[1],
        "vision_embed.cls_token": state["transformer.cls_token"] + kinds[1],
        "relative_position.table": state["relative_position_bias_table"],
    }
    for part in ("weight", "bias"):
        own[f"norm.shared.{part}"] = state[f"transformer.norm.{part}"]
    for number in range(MODEL.depth):
        block, mine = f"transformer.blocks.{number}", f"blocks.{number}"
        own |= {f"{mine}.attention_scale": state[f"{block}.gamma_1"], f"{mine}.expert_scale": state[f"{block}.gamma_2"]}
        own |= {f"{mine}.attention.{name}.shared.bias": state[f"{block}.attn.{name}_bias"] for name in "qv"}
        own |= split_qkv(state, f"{block}.attn.qkv.weight", f"{mine}.attention")
        for part in ("weight", "bias"):
            pairs = {"norm1": "norm.shared", "attn.proj": "attention.out.shared"}
            for old, new in (("text", "language"), ("imag", "vision"), ("vl", "fusion")):
                pairs |= {f"norm2_{old}": f"experts.{new}.norm", f"mlp_{old}.fc1": f"experts.{new}.up",
                          f"mlp_{old}.fc2": f"experts.{new}.down"}  # fmt: skip
            own |= {f"{mine}.{new}.{part}": state[key] for old, new in pairs.items()
                    if (key := f"{block}.{old}.{part}") in state}  # fmt: skip
    own = {f"encoder.{name}": value for name, value in own.items()}
    for part in ("weight", "bias"):
        for old, new in (("dense", 0), ("LayerNorm", 2)):
            own[f"objectives.masked.transform.{new}.{part}"] = state[f"mlm_score.transform.{old}.{part}"]
    return own | {
        "objectives.contrastive.vision.weight": state["itc_image_proj.fc.weight"],
        "objectives.contrastive.language.weight": state["itc_text_proj.fc.weight"],
        "objectives.contrastive.logit_scale": state["logit_scale"].reshape(1),
        "objectives.matching.match.weight": state["itm_score.fc.weight"],
        "objectives.matching.match.bias": state["itm_score.fc.bias"],
        "objectives.masked.text.weight": state["mlm_score.decoder.weight"],
        "objectives.masked.text.bias": state["mlm_score.bias"],
    }


def step_of(seed: int, count: int = COUNT) -> Batch:
    """Pairs, seen apart and fused, the fused ones with hidden words."""
    made = step_batch((count, 0, count), seed, 0, 1, depth=MODEL.depth, draws={"matching": 1})
    drawn = made.draws["matching"]
    return make_batch(
        Layout(images=count, pairs=count, texts=count, patches=16, pair_len=LENGTH, text_len=LENGTH, dual=count),
        images=made.images.repeat(2, 1, 1, 1), pair_tokens=made.text_tokens, pair_inputs=made.text_inputs,
        pair_masked=made.text_masked, text_tokens=made.text_tokens,
        draws={"matching": torch.cat([drawn[:count], drawn])},
    )  # fmt: skip


def as_their_batch(batch: Batch, some: slice = slice(COUNT)) -> dict[str, Any]:
    ids = batch.text_tokens[some]
    return {"image": [batch.images[some].float() / 127.5 - 1], "text_ids": ids, "text_masks": (ids != PAD).long(),
            "text_labels": ids, "text_ids_mlm": batch.pair_inputs[some],
            "text_labels_mlm": batch.pair_tokens.masked_fill(~batch.pair_masked, -100)[some]}  # fmt: skip


def contrast_of(said: dict[str, Tensor]) -> Tensor:
    """The first of the two contrasts of which theirs takes the mean."""
    logits = said["itc_i2t_logits"], said["itc_t2i_logits"]
    return sum(F.cross_entropy(each, said["itc_labels"]) for each in logits) / 2


@pytest.fixture(scope="module")
def models():
    place = place_of("VLMO_CODE", "VLMo", "unilm/vlmo")
    names = ("vlmo.modules.vlmo_module", "vlmo.modules.objectives")
    with imported(place, names, stubs(), "vlmo") as (module, objectives):
        theirs = build_theirs(module)
        words = MaskedData(image_ratio=0, pair_image_ratio=0, text_ratio=0, pair_text_ratio=0.15, dual=False,
                           mean_over="targets", transform=True)  # fmt: skip
        ours = PretrainTask(MODEL, EXPERTS, (Contrastive(), Matching(), words), weights={"masked": 0.25})
        rest = ours.load_state_dict(as_ours(theirs.state_dict()), strict=False)
        assert not rest.unexpected_keys
        assert set(rest.missing_keys) == {"encoder.vision_embed.mask_token"}
        yield ours.train(), theirs, objectives


@pytest.fixture
def on_the_host(monkeypatch):
    """Theirs asks for the number of a GPU."""
    monkeypatch.setattr(Tensor, "get_device", lambda self: self.device)


@pytest.mark.usefixtures("on_the_host")
def test_losses_and_gradients_equal_the_published_code(models, monkeypatch):
    ours, theirs, objectives = models
    batch = step_of(1)
    report = ours(batch)
    wrong_text, wrong_image = ours.objectives["matching"].draw(ours.encoder(batch), batch)
    drawn, asked = iter([*wrong_image, *wrong_text]), list[Tensor]()
    monkeypatch.setattr(torch, "multinomial", lambda shares, count: (asked.append(shares), next(drawn))[1])
    objectives.dist = Ranks()
    theirs.current_tasks = ["mlm", "itc", "itm"]
    said = theirs(as_their_batch(batch))
    losses = {"contrastive": contrast_of(said), "matching": said["itm_loss"], "masked": said["mlm_loss"] / 0.25}
    assert next(drawn, None) is None
    check_near({name: report[f"loss/{name}"] for name in losses}, losses)
    # Partners are drawn with the same chances.
    images, texts = ours.objectives["contrastive"].embed(ours.encoder(batch), batch.layout)
    alike = ours.objectives["contrastive"].logit_scale.exp() * texts @ images.T
    shares = torch.stack(asked[:COUNT])
    check_near({"": alike.fill_diagonal_(-torch.inf).softmax(-1)}, {"": shares / shares.sum(-1, keepdim=True)})
    report["loss"].backward()
    (losses["contrastive"] + said["itm_loss"] + said["mlm_loss"]).backward()
    check_near(gradients(ours), as_ours(gradients(theirs), gradient=True))


@pytest.mark.usefixtures("on_the_host")
def test_their_contrast_on_two_ranks_has_half_of_its_gradient(models):
    """The same loss as of all pairs at once, and as ours; but what other ranks sent carries no gradient, and the mean
    over ranks of what the own rows get is the gradient divided by the number of ranks."""
    _, theirs, objectives = models
    batch = step_of(2)
    halves = [as_their_batch(batch, slice(rank * COUNT // 2, (rank + 1) * COUNT // 2)) for rank in range(2)]

    def contrast(some: dict[str, Any], ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
        objectives.dist = ranks
        theirs.zero_grad()
        loss = contrast_of(objectives.compute_itc(theirs, some))
        loss.backward()
        return loss.detach(), {name: value.clone() for name, value in gradients(theirs).items()}

    whole, wanted = contrast(as_their_batch(batch), Ranks())
    sent = []
    for half in halves:
        contrast(half, alone := Ranks())
        sent.append(alone.sent)
    both = [contrast(half, Ranks(rank, sent)) for rank, half in enumerate(halves)]
    check_near({str(rank): loss for rank, (loss, _) in enumerate(both)}, {"0": whole, "1": whole})
    mean = {name: (both[0][1][name] + both[1][1][name]) / 2 for name in wanted}
    scale = "logit_scale"  # every rank has all logits
    check_near(mean, {name: value * (1 if name == scale else 0.5) for name, value in wanted.items()})
    assert wanted["itc_image_proj.fc.weight"].abs().max() > 1e-3
