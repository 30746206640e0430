"""Released-format weights are fine-tuned for each task, evaluated, exported, and load elsewhere. The data goes the way
that a user's does: public file formats, from_table, shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import pretrain
from data_tools import answers, from_table
from pretrain import evaluate
from pretrain.export import main
from pretrain.objectives.masked import MaskedData
from pretrain.released_weights import from_released, read_model, read_tensors, to_released, write_tensors
from pretrain.tasks.pretrain import PretrainTask
from tests.small_run import WORDS, Ranks, command
from tests.toy_models import RELEASED
from tests.toys import encoded, picture, write_text_model

RECIPE = """
from dataclasses import replace
from pretrain.config import BatchSize, Recipe
from pretrain.data.mixture import Loading
from pretrain.recipes._beit3_tasks import BASE, recipe
from tests.toy_models import RELEASED

WHOLE = recipe("tasks", RELEASED, {name: replace(how, size=48) for name, how in BASE.items()})
def small(stage):
    (kind,) = stage.mix
    own = {"classes": 3} if kind == "images" else {"text_len": 12}
    source = replace(stage.mix[kind], **own)
    evals = []
    for each in stage.evals:
        name = next(name for name in ("images", "questions", "pairs") if hasattr(each, name))
        evals.append(replace(each, **{name: replace(getattr(each, name), **own)}, samples=6, batch=4))
    sizes = {"classes": 3, "answers": 4}  # of snli_ve there are three anyway
    objectives = [replace(each, **{name: size for name, size in sizes.items() if hasattr(each, name)})
                  for each in stage.objectives]
    return replace(stage, mix={kind: source}, batch=BatchSize(**{kind: 4}), objectives=tuple(objectives), steps=2,
                   optim=replace(stage.optim, lr=1e-3, warmup_steps=0), evals=tuple(evals))
RECIPE = replace(WHOLE, stages={name: small(stage) for name, stage in WHOLE.stages.items()}, log_every=1,
                 loading=Loading(workers=0, streams=2, block_shards=2))
"""
HEADS = {
    "imagenet": "head.weight", "vqa": "head.3.weight", "nlvr2": "head.dense2.weight",
    "captioning": "mlm_head.weight", "retrieval": "vision_head.weight", "snli_ve": "head.3.weight",
}  # fmt: skip
OBJECTIVES = {
    "imagenet": "classification", "vqa": "answering", "nlvr2": "reasoning", "captioning": "masked",
    "retrieval": "contrastive", "snli_ve": "entailment",
}  # fmt: skip
METRICS = {"imagenet": "classification/top-1", "vqa": "answers/accuracy", "nlvr2": "reasoning/accuracy",
           "captioning": "captions/CIDEr", "retrieval": "retrieval/image_to_text/R@1",
           "snli_ve": "entailment/accuracy"}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Each task's data, the text tokenizer, and released-format weights as from-released leaves them."""
    place, raw = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("raw")
    pictures = raw / "pictures"
    pictures.mkdir()
    for n in range(1, 9):
        (pictures / f"{n}.jpg").write_bytes(encoded(picture(n)))
        for split in ("train", "val"):
            folder = raw / "classes" / split / f"class{n % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{n}.jpg").write_bytes(encoded(picture(n)))
    words = WORDS.split()
    texts = {n: [" ".join(words[(n + k) * j % len(words)] for j in (1, 2, 3)) for k in range(5)] for n in range(1, 9)}
    questions = [{"image_id": n, "question_id": n, "question": texts[n][0]} for n in range(1, 9)]
    notes = [{"question_id": n, "answers": [{"answer": f"answer {n % 4}"}] * 10} for n in range(1, 9)]
    (raw / "q.json").write_text(json.dumps({"questions": questions}))
    (raw / "a.json").write_text(json.dumps({"annotations": notes}))
    split = {n: "test" if n > 5 else "train" for n in range(1, 9)}
    karpathy = [{"filename": f"{n}.jpg", "split": split[n], "sentences": [{"raw": t} for t in texts[n]]} for n in texts]
    (raw / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    for n in range(1, 9):
        for side in (0, 1):
            (pictures / f"dev-{n}-0-img{side}.png").write_bytes(encoded(picture(n + 9 * side), "PNG"))
    lines = [{"identifier": f"dev-{n}-0-0", "sentence": texts[n][0], "label": str(n % 2 == 0)} for n in range(1, 9)]
    (raw / "nlvr2.json").write_text("\n".join(map(json.dumps, lines)))
    relations = ("entailment", "neutral", "contradiction", "-")
    pairs = [{"Flickr30K_ID": str(n), "pairID": f"{n}.jpg#0r1n", "gold_label": relations[n % 4],
              "sentence1": texts[n][1], "sentence2": texts[n][0]} for n in range(1, 9)]  # fmt: skip
    (raw / "snli_ve.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    where = ["--pictures", str(pictures)]
    make = lambda *line: from_table.main([*map(str, line), "--workers", "1"])  # noqa: E731
    assert make(raw / "classes", "--label-folders", "--out", place / "imagenet") == 0
    assert make(raw / "karpathy.json", *where, "--out", place / "coco") == 0
    for name in ("train", "val"):
        assert make(raw / "q.json", *where, "--answers", raw / "a.json", "--out", place / "vqa" / name) == 0
    for name in ("train", "dev"):
        assert make(raw / "nlvr2.json", *where, "--out", place / "nlvr2" / name) == 0
        assert make(raw / "snli_ve.jsonl", *where, "--out", place / "snli_ve" / name) == 0
    assert answers.main([str(place / "vqa/train"), "--least", "1", "--out", str(place / "vqa/answers.json")]) == 0
    write_text_model(place / "text.model", [text for some in texts.values() for text in some] * 3, 44)
    (place / "recipe.py").write_text(RECIPE)
    torch.manual_seed(0)
    whole = PretrainTask(RELEASED, ("vision", "language"), [MaskedData(image_codes=7)])
    write_tensors(raw / "released.pth", to_released(whole.state_dict(), RELEASED))
    assert main(["from-released", str(raw / "released.pth"), str(place / "released"), "--heads", "4"]) == 0
    return place


@pytest.mark.slow
@pytest.mark.parametrize("task", HEADS)
def test_released_weights_are_fine_tuned_evaluated_and_exported(data, tmp_path, task, monkeypatch):
    monkeypatch.setenv("BEIT3", str(data / "released"))
    monkeypatch.setenv("DATA", str(data))
    run, log = tmp_path / "run", tmp_path / "log"
    line = command(data, run, task, ds="zero0.json")
    assert Ranks(line, data, 1, log, BEIT3=str(data / "released")).wait(120) == [0], log.read_text()
    said = log.read_text()
    assert "weights made to fit this stage's model: encoder.vision_embed.positions" in said  # 32 to 48 pixels
    line = ["--run-dir", str(run), "--stage", task, "--recipe", str(data / "recipe.py")]
    assert evaluate.main(line) == 0
    value = json.loads((run / task / "eval.json").read_text())[METRICS[task]]
    assert 0 <= value <= (1000 if task == "captioning" else 100)
    state, cfg, _ = read_model(run / task)
    model = pretrain.load(run / task, text_tokenizer=data / "text.model")
    assert OBJECTIVES[task] in model.task.objectives and cfg.image_size == 48
    if task == "captioning":
        shown = json.loads((run / task / "samples.json").read_text())["captions"]
        assert shown and {"input", "written", "references"} == set(shown[0])
        assert len(model.caption([encoded(picture(1))])) == 1
    assert main(["to-released", str(run / task), str(tmp_path / "out.pth")]) == 0
    released = read_tensors(tmp_path / "out.pth")
    assert HEADS[task] in released
    back, same = from_released(released, heads=4)
    state |= {name.replace("entailment", "answering"): value for name, value in state.items()}  # the same layers
    assert same == cfg and all(torch.equal(back[name], state[name]) for name in back)
