"""The annotation files of the public sets as records: captions of COCO and of Karpathy's splits, questions of VQAv2,
sentences about two pictures of NLVR2 and about one of SNLI-VE. Each is recognised by what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.lists.formats import json_elements
from data_tools.records.record import Pictures, Record, Unusable, captions_of

KEYS = ("images", "annotations", "questions")
LABELS = ("False", "True")  # NLVR2's, by number
RELATIONS = ("entailment", "neutral", "contradiction")  # SNLI-VE's, by number


def read_annotations(path: Path, pictures: Pictures, answers: Path | None) -> Iterator[Record | Unusable]:
    """A .json that is one object. `answers`: VQAv2's annotations, for a file of questions. ValueError for a file that
    is none of these."""
    parts: dict[str, list[Any]] = {}
    for key, value in json_elements(path, KEYS):
        parts.setdefault(key, []).append(value)
    if "questions" in parts:
        return _questions(parts["questions"], pictures, answers)
    if answers is not None:
        raise ValueError(f"--answers {answers} belongs to a file of questions, and {path} has none; leave it out")
    images, notes = parts.get("images", []), parts.get("annotations", [])
    if any(isinstance(image, dict) and "sentences" in image for image in images):
        return _karpathy(images, pictures)
    if any(isinstance(note, dict) and "caption" in note for note in notes):
        return _coco(images, notes, pictures)
    raise ValueError(
        f"{path} has neither COCO's images and annotations with captions, nor Karpathy's images with sentences, nor "
        "VQAv2's questions; give one of these, or a table"
    )


def _coco(images: list[Any], notes: list[Any], pictures: Pictures) -> Iterator[Record | Unusable]:
    captions: dict[Any, list[Any]] = {}
    for note in notes:
        if isinstance(note, dict) and isinstance(note.get("image_id"), int | str):
            captions.setdefault(note["image_id"], []).append(note.get("caption"))
    for image in images:
        number, file = (image.get("id"), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if not isinstance(number, int | str) or not isinstance(file, str):
            yield Unusable(str(image)[:60], "bad_row", "it has no id and file_name")
            continue
        yield _captioned(file, captions.get(number, []), "", pictures)


def _karpathy(images: list[Any], pictures: Pictures) -> Iterator[Record | Unusable]:
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield Unusable(str(image)[:60], "bad_row", "it has no filename")
            continue
        sentences = image.get("sentences")
        raw = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else []
        split = str(image.get("split", ""))
        # Everyone trains on "restval", the part of COCO's validation set that is in neither val nor test.
        yield _captioned(image["filename"], raw, "train" if split == "restval" else split, pictures)


def _captioned(file: str, captions: list[Any], split: str, pictures: Pictures) -> Record | Unusable:
    try:
        return Record(file, (pictures.find(file),), captions_of(captions), None, split)
    except ValueError as error:
        return Unusable(file, "bad_row", str(error))


def _questions(questions: list[Any], pictures: Pictures, answers: Path | None) -> Iterator[Record | Unusable]:
    """VQAv2's: a record for each question, whose text is the caption; `answers` in its JSON are those of ten people."""
    given: dict[Any, list[str]] = {}
    chosen: dict[Any, str] = {}
    for _, note in json_elements(answers, ("annotations",)) if answers is not None else ():
        if isinstance(note, dict) and isinstance(note.get("question_id"), int):
            listed = note.get("answers")
            texts = [a.get("answer") for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []
            given[note["question_id"]] = [text for text in texts if isinstance(text, str)]
            if isinstance(note.get("multiple_choice_answer"), str):
                chosen[note["question_id"]] = note["multiple_choice_answer"]
    if answers is not None and not given:
        raise ValueError(f"--answers {answers} has no annotations with a question_id; give VQAv2's annotations")
    for question in questions:
        if not isinstance(question, dict):
            yield Unusable(str(question)[:60], "bad_row", "it is no object")
            continue
        number, image = question.get("question_id"), question.get("image_id")
        name = f"question {number}"
        try:
            if not isinstance(number, int) or not isinstance(image, int):
                raise ValueError("it has no question_id and image_id")
            facts: dict[str, Any] = {"question_id": number}
            if answers is not None:
                if not given.get(number):
                    raise ValueError("it has no answers")
                facts["answers"] = given[number]
                facts |= {"answer": chosen[number]} if number in chosen else {}
            yield Record(name, (pictures.numbered(image),), captions_of(question.get("question")), facts=facts)
        except ValueError as error:
            yield Unusable(name, "bad_row", str(error))


def is_two_pictures(row: dict[str, Any]) -> bool:
    """Whether a line of JSON is one of NLVR2's."""
    return isinstance(row.get("identifier"), str) and isinstance(row.get("sentence"), str)


def two_pictures(row: dict[str, Any], pictures: Pictures) -> Record | Unusable:
    """NLVR2's: {"identifier": "dev-850-0-0", "sentence", "label"}; its pictures are dev-850-0-img0.png and -img1.png
    (lil-lab/nlvr, nlvr2/README.md)."""
    name = row["identifier"]
    stem = name.rpartition("-")[0]
    try:
        found = pictures.find(f"{stem}-img0.png"), pictures.find(f"{stem}-img1.png")
        label = row.get("label")
        if label is not None and label not in LABELS:
            raise ValueError(f"its label {str(label)[:20]!r} is neither True nor False")
        number = None if label is None else LABELS.index(str(label))
        return Record(name, found, captions_of(row["sentence"]), number, facts={"identifier": name})
    except ValueError as error:
        return Unusable(name, "bad_row", str(error))


def is_entailment(row: dict[str, Any]) -> bool:
    """Whether a line of JSON is one of SNLI-VE's."""
    return all(isinstance(row.get(name), str) for name in ("Flickr30K_ID", "gold_label", "sentence2"))


def entailment(row: dict[str, Any], pictures: Pictures) -> Record | Unusable:
    """SNLI-VE's: {"Flickr30K_ID": "4705552913", "pairID", "gold_label", "sentence2"} and more, of which sentence1, the
    caption that the picture replaces, is not read (necla-ml/SNLI-VE, vet/tools/snli_ve_generator.py). SNLI's label "-",
    where people did not agree, is none."""
    pair, label = str(row.get("pairID", row["Flickr30K_ID"])), row["gold_label"]
    if label == "-":
        return Unusable(pair, "no_label", "people did not agree on its label")
    try:
        if label not in RELATIONS:
            raise ValueError(f"its gold_label {label[:20]!r} is none of {', '.join(RELATIONS)}")
        found = pictures.find(f"{row['Flickr30K_ID']}.jpg")
        facts = {"pair_id": pair}
        return Record(pair, (found,), captions_of(row["sentence2"]), RELATIONS.index(label), facts=facts)
    except ValueError as error:
        return Unusable(pair, "bad_row", str(error))
