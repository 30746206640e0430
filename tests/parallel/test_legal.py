"""What a user reads when sizes, model, batch, JSON and ranks do not go together: one sentence, with the way out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pretrain.contracts import ModelSizes
from pretrain.parallel.ds_config import load_ds_config, zero_stage
from pretrain.parallel.legal import check_legal, problems
from pretrain.parallel.sizes import Parallel
from pretrain.recipes import load_recipe

CONFIGS = Path(__file__).parents[2] / "ds_configs"
GIANT = ModelSizes(dim=1408, depth=40, heads=16, ffn_dim=6144, vocab_size=64064)
CODES = {"objectives.0.image_codes": 8192}
COUNTS = {"images": 2048, "pairs": 2048, "texts": 2048}
FACTS = {"world": 64, "counts": COUNTS, "accumulation": 4, "model": GIANT, "classes": CODES, "node": 8}


def zero(stage: int, bf16: bool = False, **more) -> dict:
    return {"zero_optimization": {"stage": stage, **more}, "bf16": {"enabled": bf16}}


def problems_of(parallel: Parallel | None = None, config: dict | None = None, **facts) -> list[str]:
    """The problems of giant on 64 ranks, 8 a node, but for what is given."""
    return problems(parallel or Parallel(), **FACTS | facts, config=zero(1, bf16=True) if config is None else config)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("sequence", [1, 2])
def test_family_a_is_legal(stage, tensor, sequence):
    assert problems_of(Parallel(tensor=tensor, sequence=sequence), zero(stage, bf16=stage > 0)) == []


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("pipe", [2, 8])
def test_family_b_is_legal(tensor, pipe):
    assert problems_of(Parallel(tensor=tensor, pipe=pipe), zero(1, bf16=True)) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_each_shipped_config_is_legal_without_model_parallelism(path):
    config = load_ds_config(path, micro=24, accumulation=4, world=64, clip=3.0)
    assert problems_of(config=config) == []
    pipelined = problems_of(Parallel(pipe=2), config)
    assert (pipelined == []) == (zero_stage(config) == 1), pipelined


# ---- (parallel, changes of the facts, what the one sentence must hold)
SENTENCES = {
    "heads": (
        Parallel(tensor=32),
        {"model": GIANT._replace(vocab_size=64064, ffn_dim=6144)},
        ["model.heads=16 is not a multiple of parallel.tensor=32", "use parallel.tensor=1, 2, 4, 8 or 16"],
    ),
    "heads over sequence ranks": (
        Parallel(tensor=4, sequence=8),
        {"counts": {"images": 2048}, "accumulation": 1},
        ["parallel.tensor * parallel.sequence=4 * 8=32", "use parallel.sequence=1, 2 or 4"],
    ),
    "inner width": (
        Parallel(tensor=8),
        {"model": GIANT._replace(ffn_dim=6148)},
        ["model.ffn_dim=6148 is not a multiple of parallel.tensor=8", "set model.ffn_dim=6152"],
    ),
    "vocabulary": (
        Parallel(tensor=4),
        {"model": GIANT._replace(vocab_size=1010)},
        ["model.vocab_size=1010 is not a multiple of parallel.tensor=4", "set model.vocab_size=1016", "never used"],
    ),
    "image codes": (
        Parallel(tensor=8),
        {"classes": {"objectives.0.image_codes": 1020}},
        ["objectives.0.image_codes=1020", "set objectives.0.image_codes=1024"],
    ),
    "world": (
        Parallel(tensor=2, pipe=4),
        {"world": 60},
        ["60 ranks are not a multiple of parallel.tensor * parallel.pipe=8", "start 56 or 64 ranks"],
    ),
    "fewer ranks than one copy": (Parallel(tensor=8), {"world": 4}, ["4 ranks", "parallel.tensor=8; start 8 ranks"]),
    "more stages than blocks": (
        Parallel(pipe=64),
        {"accumulation": 1},
        ["parallel.pipe=64 stages are more than the model's 40 blocks", "use parallel.pipe=40 or less"],
    ),
    "ZeRO-2 with stages": (
        Parallel(pipe=2),
        {"config": zero(2)},
        ["parallel.pipe=2 does not go with zero_optimization.stage=2", "zero1_bf16.json, or parallel.pipe=1"],
    ),
    "ZeRO-3 with stages": (Parallel(pipe=2), {"config": zero(3)}, ["zero_optimization.stage=3", "zero1.json"]),
    "ZeRO-0 with stages": (Parallel(pipe=2), {"config": zero(0)}, ["zero_optimization.stage=0", "wrong gradient norm"]),
    "offload with stages": (
        Parallel(pipe=2),
        {"config": zero(1, offload_optimizer={"device": "cpu"})},
        ["zero_optimization.offload_optimizer.device=cpu", "remove it from the JSON, or set parallel.pipe=1"],
    ),
    "tokenizer with tensor ranks": (
        Parallel(tensor=2),
        {"model": None},
        ["parallel.tensor=2 does not go with this stage's model", "set parallel.tensor=1"],
    ),
    "tokenizer with stages": (Parallel(pipe=2), {"model": None}, ["parallel.pipe=2", "set parallel.pipe=1"]),
    "tokenizer with sequence ranks": (Parallel(sequence=2), {"model": None}, ["set parallel.sequence=1"]),
    "batch": (
        Parallel(tensor=2),
        {"counts": COUNTS | {"pairs": 2000}},
        ["batch.pairs=2000", "data ranks * batch.accumulation=32 * 4=128", "use batch.pairs=1920 or 2048"],
    ),
    "small batch": (Parallel(), {"counts": {"texts": 100}}, ["batch.texts=100", "use batch.texts=256"]),
    "pipeline section": (
        Parallel(),
        {"config": zero(1) | {"pipeline": {"pipe_partitioned": False}}},
        ["section pipeline", "parallel.pipe=1"],
    ),
    "DeepCompile": (
        Parallel(tensor=2),
        {"config": zero(1) | {"compile": {"deepcompile": True}}},
        ["compile.deepcompile=true does not go with parallel.tensor=2"],
    ),
    "compiled twice": (
        Parallel(),
        {"config": zero(1) | {"compile": {"deepcompile": True}}, "compiled": True},
        ["compile=true in the recipe and compile.deepcompile=true in the JSON", "set compile=false"],
    ),
    "compiled blocks in parts": (
        Parallel(),
        {"config": zero(3), "compiled": True},
        ["compile=true does not go with zero_optimization.stage=3", "or set compile=false"],
    ),
    "hpZ without ZeRO-3": (
        Parallel(),
        {"config": zero(2, zero_hpz_partition_size=8)},
        ["zero_hpz_partition_size=8 needs zero_optimization.stage=3, not 2"],
    ),
    "hpZ with tensor ranks": (
        Parallel(tensor=2),
        {"config": zero(3, zero_hpz_partition_size=8)},
        ["zero_hpz_partition_size=8 would mix the slices of parallel.tensor=2 ranks"],
    ),
    "hpZ over nodes": (
        Parallel(),
        {"config": zero(3, zero_hpz_partition_size=16)},
        ["zero_hpz_partition_size=16 is more than a node's 8 ranks", "use 2, 4 or 8"],
    ),
    "hpZ that cuts a node": (
        Parallel(),
        {"config": zero(3, zero_hpz_partition_size=3), "world": 48, "counts": {"images": 480}, "accumulation": 1},
        ["zero_hpz_partition_size=3 does not divide the 8 ranks of a node", "use 2, 4 or 8"],
    ),
    "hpZ that does not divide the world": (
        Parallel(),
        {"config": zero(3, zero_hpz_partition_size=3), "node": None},
        ["zero_hpz_partition_size=3 does not divide 64 ranks"],
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_one_sentence_with_the_way_out(case):
    parallel, facts, says = SENTENCES[case]
    facts = FACTS | {"config": zero(1)} | facts
    sentences = problems(parallel, **facts)
    assert len(sentences) == 1, sentences
    for part in says:
        assert part in sentences[0], sentences[0]
    assert "\n" not in sentences[0] and not sentences[0].endswith(".")
    with pytest.raises(ValueError, match=re.escape(sentences[0])):
        check_legal(parallel, **facts)


@pytest.mark.parametrize(
    ("stage", "setting", "says"),
    [
        ("retrieval", "parallel.pipe=2", "the objective contrastive.*set parallel.pipe=1 and split by parallel.tensor"),
        ("tokenizer", "compile=true", "compile=true has no blocks to compile.*set compile=false"),
    ],
)
def test_objectives_and_tasks_refuse_for_themselves(stage, setting, says):
    with pytest.raises(ValueError, match=says):
        load_recipe("tiny", stage, [setting])


def test_the_sizes_that_a_sentence_offers_are_legal():
    wrong = GIANT._replace(vocab_size=1010, ffn_dim=6146)
    codes = {"objectives.0.image_codes": 1022}
    for tensor in (4, 8, 16):
        offered = {}
        for sentence in problems_of(Parallel(tensor=tensor), model=wrong, classes=codes):
            name, size = re.search(r"set ([\w.]+)=(\d+)", sentence).groups()
            offered[name] = int(size)
        assert len(offered) == 3
        sizes = {name.removeprefix("model."): size for name, size in offered.items() if name not in codes}
        right = {name: offered[name] for name in codes}
        assert problems_of(Parallel(tensor=tensor), model=wrong._replace(**sizes), classes=right) == []
    for count in (1999, 2049):
        (sentence,) = problems_of(counts={"images": count})
        for size in re.search(r"use batch\.images=(\d+) or (\d+)", sentence).groups():
            assert problems_of(counts={"images": int(size)}) == []


def test_everything_that_is_wrong_is_said():
    sentences = problems_of(Parallel(tensor=3, pipe=50), zero(3), model=GIANT._replace(vocab_size=1000))
    assert len(sentences) >= 6
    for part in ("64 ranks", "heads", "vocab_size", "image_codes", "blocks", "stage=3"):
        assert any(part in sentence for sentence in sentences), part


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "parallel sizes"),
        ({"pipeline": {"stages": 4}}, "pipeline.stages"),
        ({"pipeline": {"activation_checkpoint_interval": 1}}, "pipeline.activation_checkpoint_interval"),
        ({"sequence_parallel_size": 2}, "parallel sizes"),
        ({"mics_shard_size": 8}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}}, "1 or more"),
    ],
)
def test_a_json_that_fights_the_recipe_is_refused_where_it_is_read(tmp_path, content, says):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"mine\.json") as error:
        load_ds_config(path, micro=1, accumulation=1, world=1, clip=0)
    assert says in str(error.value)
