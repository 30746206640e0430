"""Trained weights as a model that embeds pictures and texts: what `pretrain.load` returns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import BOS, EOS, PAD, Layout, make_batch
from pretrain.data.shards.reader import BadSample
from pretrain.data.text_tokenizer import AnyTokenizer, open_tokenizer
from pretrain.data.transforms import ImageTransform, sample_rng
from pretrain.evals.zero_shot import TEMPLATES, class_vectors
from pretrain.hub.write import evaluation_look
from pretrain.models.generation import NextWord, Writing, never_written, next_word_head, text_reader, write
from pretrain.pictures import Picture, encoded_picture
from pretrain.stored_model import FURTHER, build_stored, read_stored, stored_tokenizer
from pretrain.tasks.pretrain import PretrainTask

T = TypeVar("T")
GAP = "<mask>"  # stands for a missing piece in the texts of fill_mask
DTYPES = (torch.float32, torch.bfloat16)


class Pretrained:
    """An encoder with the heads that the weights have, made by `load`. `model` is its configuration, `task` the module,
    `transform` makes its pixels of a picture, and `text` is its tokenizer, None where the weights came without one.
    Results lie on the host, in float32. Shapes: N pictures, texts or pairs, S pixels a side, P patches of a picture,
    L ids of a text, D width, E width of the dual encoder's vectors."""

    def __init__(
        self,
        task: PretrainTask,
        model: Any,
        transform: ImageTransform,
        text: AnyTokenizer | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.task, self.model, self.transform, self.text = task.to(device).eval(), model, transform, text
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def embed_images(self, pictures: Iterable[Picture], batch: int = 64) -> Tensor:
        """Pictures (paths, encoded bytes, PIL pictures, or uint8 arrays [H, W, 3] or [H, W]) -> unit vectors [N, E] of
        the dual encoder. ValueError for weights without a contrastive head; BadSample, a ValueError too, for a picture
        that cannot be used, with its number."""
        parts = [self.embed_looks(pixels) for pixels in self._looks(pictures, batch)]
        return torch.cat(parts) if parts else torch.zeros(0, self.head.width)

    @torch.no_grad()
    def embed_looks(self, pixels: Tensor) -> Tensor:
        """Pixels as `look` returns them, uint8 [N, 3, S, S] -> unit vectors [N, E], in one pass."""
        layout = Layout(images=len(pixels), patches=self._patches)
        return self.head.embed_images(self._encode(layout, images=pixels)).cpu()

    @torch.no_grad()
    def patches(self, pictures: Iterable[Picture], batch: int = 64) -> Tensor:
        """-> the rows of each picture's patches after the final norm, by the vision encoder, [N, P, D], for classifiers
        of one's own; embed_images uses the class row instead. ValueError for towers, which give one row for each
        picture."""
        parts = []
        for pixels in self._looks(pictures, batch):
            layout = Layout(images=len(pixels), patches=self._patches)
            rows = self._encode(layout, images=pixels).images
            if rows.shape[1] == 1:
                raise ValueError(f"a {type(self.model).__name__} gives one row for each picture; use embed_images")
            parts.append(rows[:, 1:].float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self._patches, self.model.width("images"))

    def look(self, picture: Picture) -> Tensor:
        """A picture as the encoder sees it: uint8 [3, S, S], S the model's image_size. Any number of threads may call
        it, and every method takes its result in the place of a picture. BadSample for a picture that cannot be decoded,
        ValueError for an object that is none."""
        if isinstance(picture, Tensor):
            return picture
        return torch.from_numpy(self.transform(encoded_picture(picture)))

    @torch.no_grad()
    def embed_texts(self, texts: Iterable[str | list[int]], batch: int = 64) -> Tensor:
        """Texts, or their ids -> unit vectors [N, E] of the dual encoder. A text is cut at the model's
        `max_text_len`. ValueError for weights without a contrastive head, or without a text tokenizer."""
        width = self.head.width
        parts = [self.embed_tokens(self.tokens(some)) for some in _batches(texts, batch)]
        return torch.cat(parts) if parts else torch.zeros(0, width)

    @torch.no_grad()
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Ids as `tokens` returns them, int64 [N, L] -> unit vectors [N, E], in one pass."""
        layout = Layout(texts=len(tokens), text_len=tokens.shape[1])
        return self.head.embed_texts(self._encode(layout, text_tokens=tokens)).cpu()

    def similarity(self, pictures: Iterable[Picture], texts: Iterable[str], batch: int = 64) -> Tensor:
        """-> cosines [N, M] of every picture with every text."""
        return self.embed_images(pictures, batch) @ self.embed_texts(texts, batch).T

    def classify(
        self, pictures: Iterable[Picture], names: Sequence[str], templates: Sequence[str] = TEMPLATES, batch: int = 64
    ) -> Tensor:
        """-> cosines [N, classes] of pictures with classes that only their names describe, each put where a template
        has {}; the largest is the answer. ValueError as for `similarity`, and for a template without {}."""
        return self.embed_images(pictures, batch) @ class_vectors(self.embed_texts, names, templates).T

    @torch.no_grad()
    def embed_pairs(self, pictures: Sequence[Picture], texts: Sequence[str], batch: int = 64) -> Tensor:
        """Each picture together with its own text, by the fusion encoder -> its class row after the final norm, [N,
        D]. ValueError where there are not as many texts as pictures, and for dual towers, which fuse nothing."""
        parts = [encoded.first.pair_images.float().cpu() for encoded in self._pairs(pictures, texts, batch)]
        return torch.cat(parts) if parts else torch.zeros(0, self.model.width("pair_images"))

    @torch.no_grad()
    def score_pairs(self, pictures: Sequence[Picture], texts: Sequence[str], batch: int = 64) -> Tensor:
        """Each picture together with its own text -> the probability that they belong together [N], by the head of the
        objective matching. ValueError for weights without it, or as `embed_pairs`."""
        parts = [self._match_probabilities(encoded) for encoded in self._pairs(pictures, texts, batch)]
        return torch.cat(parts) if parts else torch.zeros(0)

    @torch.no_grad()
    def score_looks(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """As `score_pairs`, in one pass, from pixels as `look` returns them, uint8 [N, 3, S, S]."""
        tokens = self.tokens(texts)
        layout = Layout(pairs=len(tokens), patches=self._patches, pair_len=tokens.shape[1])
        return self._match_probabilities(self._encode(layout, images=pixels, pair_tokens=tokens))

    def _match_probabilities(self, encoded: Any) -> Tensor:
        """[N]: how likely each picture and its text belong together."""
        head = self._head("matching", "train a stage with Matching(), or compare vectors by similarity")
        return head.match(encoded.first.pair_images).float().softmax(-1)[:, 1].cpu()

    @torch.no_grad()
    def class_scores(self, pictures: Iterable[Picture], batch: int = 64) -> Tensor:
        """-> the probability of each class [N, classes], by a stage that was fine-tuned for them (ImageClassification);
        labels.json of the stage's data has their names. ValueError for other weights."""
        parts = []
        head = self._head("classification", "fine-tune a stage for classes, or use classify with their names")
        for pixels in self._looks(pictures, batch):
            layout = Layout(images=len(pixels), patches=self._patches)
            parts.append(head.logits(self._encode(layout, images=pixels)).float().softmax(-1).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, head.classes.out_features)

    @torch.no_grad()
    def answer_scores(self, pictures: Sequence[Picture], questions: Sequence[str], batch: int = 64) -> Tensor:
        """Each picture with its own question -> the probability of each answer by itself [N, answers], by a stage that
        was fine-tuned for them (Answering); the stage's data lists the answers. ValueError for other weights."""
        head = self._head("answering", "fine-tune a stage on questions with Answering(...)")
        parts = [head.logits(each).float().sigmoid().cpu() for each in self._pairs(pictures, questions, batch)]
        return torch.cat(parts) if parts else torch.zeros(0, head.answer[-1].out_features)

    @torch.no_grad()
    def fill_mask(
        self, texts: Sequence[str], pictures: Sequence[Picture] | None = None, *, best: int = 5, batch: int = 64
    ) -> list[list[list[tuple[str, float]]]]:
        """Texts with one "<mask>" or more, each of which stands for one piece of the tokenizer; `pictures`: one for
        each text, or none -> for each text and each of its gaps the `best` pieces with their probabilities among all
        pieces, the most likely first. ValueError for weights without a head of masked words, and for a text without a
        gap."""
        text = self.tokenizer()
        head = self._head("masked", "load a stage that hides words: language or fusion")
        never = never_written(self.model.vocab_size, text.mask_id, self.device)
        never[EOS] = -torch.inf
        encoded = [_with_gaps(each, text, self.model.max_text_len) for each in texts]
        if pictures is None:
            passes: Iterator[Any] = (
                self._encode(Layout(texts=len(ids), text_len=ids.shape[1]), text_tokens=ids).texts
                for ids in map(_padded, _batches(encoded, batch))
            )
        else:
            passes = (each.pair_texts for each in self._pairs(pictures, encoded, batch))
        answers: list[list[list[tuple[str, float]]]] = []
        for rows in passes:
            for row in rows:
                gaps = [place for place, i in enumerate(encoded[len(answers)]) if i == text.mask_id]
                shares, ids = (head.words.logits(row[gaps]).float() + never).softmax(-1).topk(min(best, text.mask_id))
                answers.append([
                    [(text.decode([i]) or text.token(i), share) for i, share in zip(*each, strict=True)]
                    for each in zip(ids.tolist(), shares.tolist(), strict=True)
                ])  # fmt: skip
        return answers

    @torch.no_grad()
    def caption(
        self, pictures: Iterable[Picture], how: Writing | None = None, *, seed: int = 0, batch: int = 16
    ) -> list[str]:
        """Pictures -> a text for each, by beam search unless `how` asks for another way; with top_p, picture number n
        draws its words from (seed, n). ValueError for weights that have no head of words."""
        how, texts = how or Writing(), list[str]()
        for pixels in self._looks(pictures, batch):
            drawn = [sample_rng(seed, 0, len(texts) + n).random(how.max_words) for n in range(len(pixels))]
            texts += self.caption_looks(pixels, how, torch.from_numpy(np.stack(drawn)))
        return texts

    @torch.no_grad()
    def caption_looks(self, pixels: Tensor, how: Writing, draws: Tensor | None = None) -> list[str]:
        """Pixels as `look` returns them, uint8 [N, 3, S, S] -> a text for each picture. `draws`: for top_p, uniform
        numbers in [0, 1), [N, max_words]. No text gets longer than the model's max_text_len."""
        text = self.tokenizer()
        how = replace(how, max_words=min(how.max_words, self.model.max_text_len - 1))
        logits, mask_id = self.next_word_head(text)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            reader = text_reader(self.task.encoder, pixels.to(self.device), self._patches, how.max_words + 1)
            ids = write(NextWord(reader, logits, text.mask_id, mask_id), len(pixels), how, draws, self.device)
        return [text.decode(row) for row in ids.tolist()]

    def next_word_head(self, text: AnyTokenizer) -> tuple[Any, int | None]:
        """(the function that makes logits of the next word, the id of the <mask> that stands in that word's place, or
        None). ValueError for weights that cannot write texts about pictures."""
        head = next_word_head(self.task.objectives, text.mask_id)
        if head is None:
            self._head("masked", "load a stage with Captioning(), or one that hides words")
        if not hasattr(self.task.encoder, "causal_text"):
            raise ValueError(f"a {type(self.model).__name__} reads whole texts and writes none; load a Multiway's")
        if "vision" not in self.task.encoder.expert_names:
            raise ValueError("these weights have no vision expert and cannot see a picture; load a fusion stage")
        assert head is not None
        return head

    @property
    def _patches(self) -> int:
        return (self.model.image_size // self.model.patch_size) ** 2

    @property
    def head(self) -> Any:
        """The head of the objective contrastive. ValueError for weights that have none."""
        return self._head(
            "contrastive",
            "so pictures and texts have no vectors that can be compared; load a retrieval stage, or use embed_pairs",
        )

    def _head(self, name: str, way_out: str) -> Any:
        """The head of an objective. ValueError, which ends with `way_out`, for weights that have none."""
        if name not in self.task.objectives:
            raise ValueError(f"these weights have no {name} head{',' if way_out.startswith('so ') else ';'} {way_out}")
        return self.task.objectives[name]

    def _pairs(self, pictures: Sequence[Picture], texts: Sequence[str | list[int]], batch: int) -> Iterator[Any]:
        """Each picture fused with its own text (or with the ids of one): the encoder's rows of up to `batch` pairs at a
        time. ValueError where there are not as many texts as pictures, and for weights that fuse nothing."""
        if len(pictures) != len(texts):
            raise ValueError(f"there are {len(pictures)} pictures and {len(texts)} texts; give one text for each")
        self.model.width("pair_images")  # ValueError where nothing is fused
        for pixels, some in zip(self._looks(pictures, batch), _batches(texts, batch), strict=True):
            tokens = self.tokens(some)
            layout = Layout(pairs=len(tokens), patches=self._patches, pair_len=tokens.shape[1])
            yield self._encode(layout, images=pixels, pair_tokens=tokens)

    def tokenizer(self) -> AnyTokenizer:
        """The tokenizer of the weights. ValueError for weights that came without one."""
        if self.text is None:
            raise ValueError("these weights came without a text tokenizer; give load(..., text_tokenizer=FILE)")
        return self.text

    def _encode(self, layout: Layout, **parts: Tensor) -> Any:
        """The encoder's rows of one packed pass. `parts`: fields of a Batch of this layout."""
        batch = make_batch(layout, **parts).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.task.encoder(batch)

    def _looks(self, pictures: Iterable[Picture], batch: int) -> Iterator[Tensor]:
        """Up to `batch` pictures at a time, as `look` returns them: uint8 [N, 3, S, S]. BadSample has its number."""
        for number, some in enumerate(_batches(pictures, batch)):
            looks = []
            for place, picture in enumerate(some):
                try:
                    looks.append(self.look(picture))
                except BadSample as error:
                    raise BadSample(f"picture {number * batch + place}: {error}") from None
            yield torch.stack(looks)

    def tokens(self, texts: Sequence[str | list[int]]) -> Tensor:
        """Texts, or their ids -> int64 [N, L], padded with PAD. ValueError for weights without a text tokenizer."""
        text = self.tokenizer()
        return _padded([text.encode(t, self.model.max_text_len) if isinstance(t, str) else t for t in texts])


def load(
    weights: str | os.PathLike,
    *,
    text_tokenizer: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pretrained:
    """The directory of a trained stage of any of our models, a weights.safetensors, a released BEiT-3 file (.pth with
    unilm's names), or a Hugging Face directory of ours -> a model to use; no recipe is needed, and nothing in the files
    is executed. Others' CLIP, SigLIP, ALIGN, ViLT and BLIP come in by `pretrain.export from-hf`.

    `text_tokenizer`: a SentencePiece model or a tokenizer.json, for weights that came without theirs. `device`: a GPU
    where there is one. `dtype`: float32, or bfloat16 (autocast). ValueError for whatever cannot be used.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(map(str, DTYPES))}; use one of these")
    path = Path(weights).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a stage's directory, a weights.safetensors or a released .pth")
    state, model, config = read_stored(path, FURTHER)
    task = build_stored(state, model, path)
    directory = path if path.is_dir() else path.parent
    text = stored_tokenizer(directory, None if text_tokenizer is None else Path(text_tokenizer))
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = open_tokenizer(text) if text is not None else None
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size - model.reserved_ids:
        raise ValueError(
            f"{text} has {tokenizer.vocab_size} ids and the model of {path} a vocabulary of {model.vocab_size}; give "
            "text_tokenizer= the one that it was trained with"
        )
    return Pretrained(task, model, _transform(config, model), tokenizer, where, dtype)


def _with_gaps(text: str, tokenizer: AnyTokenizer, longest: int) -> list[int]:
    """The ids of a text with its gaps, BOS and EOS included. ValueError for a text without a gap, or with more than
    `longest` ids."""
    parts = text.split(GAP)
    if len(parts) == 1:
        raise ValueError(f"{text[:60]!r} has no {GAP}; write it where a word is missing")
    ids = [i for part in parts for i in (*tokenizer.pieces(part), tokenizer.mask_id)][:-1]
    if len(ids) + 2 > longest:
        raise ValueError(f"{text[:60]!r} has {len(ids) + 2} ids and the model reads {longest}; shorten it")
    return [BOS, *ids, EOS]


def _padded(ids: Sequence[list[int]]) -> Tensor:
    """Ids of N texts -> int64 [N, the longest's length], with PAD behind the shorter ones."""
    tokens = torch.full((len(ids), max(map(len, ids))), PAD)
    for row, own in zip(tokens, ids, strict=True):
        row[: len(own)] = torch.tensor(own)
    return tokens


def _transform(config: dict[str, Any], model: Any) -> ImageTransform:
    """The transform with which the stage's own evaluation looks at pictures; released weights squash them."""
    return ImageTransform(size=model.image_size, train=False, evaluation=evaluation_look(config))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last of those that are left. ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"batch={size} is below 1; use 64")
    some: list[T] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
