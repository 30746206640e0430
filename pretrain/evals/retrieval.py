"""Image-text retrieval: R@1/5/10 both ways over one candidate set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.batch import Layout, make_batch
from pretrain.contracts import Evaluation
from pretrain.data.sources import CAPTIONS, CaptionShards, PairShards
from pretrain.evals.trained import Trained, check_counts, missing_head, uint8_pictures

SHOWN, RESULTS = 4, 5  # hits and misses shown per direction, results shown per query


class Candidates(NamedTuple):
    """N pictures and their M captions; `tokens` and `pictures`, which are only shown, lie on the host."""

    images: Tensor  # float [N, E]
    texts: Tensor  # float [M, E]
    owner: Tensor  # int64 [M]: the picture of each caption
    tokens: Tensor  # int64 [M, L]
    pictures: Tensor  # uint8 [N, 3, H, W]
    keys: tuple[str, ...]  # of the pictures


@dataclass(frozen=True)
class Retrieval(Evaluation):
    """Every picture of `pairs` against every caption, by the dual encoder. A result is right if it is the query's own
    partner, or has the very same caption.

    With CaptionShards a picture has several captions, and numbers are those of the published protocol (Karpathy's
    splits): a picture's query is a hit if any of its captions is among the k best, a caption's only if its own picture
    is. `samples` counts pictures: 5000 for COCO's 5K protocol, 1000 for Flickr30k. With `folds` above 1 the same
    vectors are also compared inside that many equal parts, and the means over these stand under `folds`: 5 of 5000 are
    COCO's 1K protocol (VSE++, arXiv 1707.05612, 4.1). The parts are consecutive pictures in the order of the shards.
    """

    pairs: PairShards
    samples: int = 1000
    batch: int = 128
    folds: int = 1

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch, folds=self.folds)

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "contrastive")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        """-> percentages for eval.json, and samples for the report."""
        candidates = self._candidates(trained)
        right = own_captions(candidates.owner, len(candidates.images))
        if not isinstance(self.pairs, CaptionShards):
            refuse_repeated_pictures(candidates)
            # A picture whose caption is repeated has several right answers.
            _, caption = candidates.tokens.unique(dim=0, return_inverse=True)
            right |= (caption[:, None] == caption[None, :]).to(right.device)
        scores = candidates.images @ candidates.texts.T
        metrics = {f"retrieval/{name}": value for name, value in both_ways(scores, right).items()}
        if self.folds > 1:
            means = mean_of_folds(scores, right, candidates.owner, self.folds)
            metrics |= {f"retrieval/folds/{name}": value for name, value in means.items()}
        metrics["retrieval/candidates"] = float(len(candidates.images))
        if len(candidates.texts) != len(candidates.images):
            metrics["retrieval/captions"] = float(len(candidates.texts))
        return metrics, {"retrieval": self._show(trained, scores, right, candidates)}

    def _candidates(self, trained: Trained) -> Candidates:
        head, several = trained.head("contrastive"), isinstance(self.pairs, CaptionShards)
        samples = min(self.samples, trained.samples_of(self.pairs))
        images, texts, tokens, pictures, keys = [], [], [], [], list[str]()
        for batch in trained.batches({"dual": self.pairs}, self.batch, samples):
            image, text = head.embed(trained.task.encoder(batch), batch.layout)
            rows = list(batch.text_tokens[:, None])
            if several:
                rows = [torch.as_tensor(ids).to(text.device) for ids in batch.extra[CAPTIONS]]
                text = torch.cat([_embed_texts(trained, head, ids) for ids in torch.cat(rows).split(self.batch)])
            images += image
            texts += text.split([len(ids) for ids in rows])
            tokens += [ids.cpu() for ids in rows]
            pictures += uint8_pictures(batch.images).cpu()
            keys += batch.keys
        # The last batch may be filled up from the start, and a picture comes twice if it replaced a bad sample.
        places = list(range(samples))
        if several:
            places = sorted({key: place for place, key in reversed(list(enumerate(keys[:samples])))}.values())
        counts = torch.tensor([len(texts[place]) for place in places])
        return Candidates(
            torch.stack([images[place] for place in places]),
            torch.cat([texts[place] for place in places]),
            torch.arange(len(places)).repeat_interleave(counts).to(images[0].device),
            torch.cat([tokens[place] for place in places]),
            torch.stack([pictures[place] for place in places]),
            tuple(keys[place] for place in places),
        )

    def _show(self, trained: Trained, scores: Tensor, right: Tensor, candidates: Candidates) -> list[dict]:
        """Some hits and some misses of each direction, with their best results."""
        if trained.text is None:
            return []
        captions = [trained.text.decode(row.tolist()) for row in candidates.tokens]
        owner = candidates.owner.tolist()
        first = [owner.index(place) for place in range(len(candidates.images))]  # each picture's first caption
        pictures, shown = candidates.pictures, []
        for direction, table, good in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
            ranks = first_right(table, good)
            hits, misses = (ranks == 0).nonzero().flatten(), (ranks > 0).nonzero().flatten()
            by_text = direction == "text_to_image"
            for query in [*hits[:SHOWN].tolist(), *misses[:SHOWN].tolist()]:
                best = table[query].topk(min(RESULTS, table.shape[1])).indices.tolist()
                results = [
                    {"image": trained.save_picture(pictures[i], f"pair{i}") if by_text else None,
                     "text": captions[first[i] if by_text else i], "right": bool(good[query, i])}
                    for i in best
                ]  # fmt: skip
                shown.append({
                    "direction": direction,
                    "query_text": captions[query] if by_text else None,
                    "query_image": None if by_text else trained.save_picture(pictures[query], f"pair{query}"),
                    "rank": int(ranks[query]) + 1,
                    "results": results,
                })  # fmt: skip
        return shown


def _embed_texts(trained: Trained, head: Any, ids: Tensor) -> Tensor:
    """Captions int64 [n, L] by themselves -> [n, E]."""
    layout = Layout(texts=len(ids), text_len=ids.shape[1])
    images = torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=ids.device)
    return head.embed_texts(trained.task.encoder(make_batch(layout, images=images, text_tokens=ids)))


def own_captions(owner: Tensor, pictures: int) -> Tensor:
    """bool [pictures, captions]: which captions are a picture's own."""
    return owner[None, :] == torch.arange(pictures, device=owner.device)[:, None]


def refuse_repeated_pictures(candidates: Candidates) -> None:
    """ValueError if one picture occurs under two keys with different captions: all its right answers but one would
    count as misses."""
    seen: dict[bytes, int] = {}
    keys, tokens = candidates.keys, candidates.tokens
    for place, picture in enumerate(candidates.pictures):
        earlier = seen.setdefault(hashlib.blake2b(picture.numpy().tobytes(), digest_size=16).digest(), place)
        if keys[earlier] != keys[place] and not tokens[earlier].equal(tokens[place]):
            raise ValueError(
                f"evals: {keys[earlier]} and {keys[place]} are the same picture with different captions, and retrieval "
                "would count right answers as misses; write one sample for each picture, with a list "
                f'"{CAPTIONS}" in its JSON, and read them by CaptionShards, or take repeated pictures out by '
                "python -m data_tools.dedup"
            )


def first_right(scores: Tensor, right: Tensor) -> Tensor:
    """int64 [N]: for each row of scores [N, M], how many wrong columns score at least as high as its best right one. A
    tie counts against us, so that a collapsed model scores nothing."""
    best = scores.masked_fill(~right, -torch.inf).max(-1, keepdim=True).values
    # Not `scores >= best`, which is False for NaN: a diverged model must not look perfect.
    return (~(scores < best) & ~right).sum(-1)


def both_ways(scores: Tensor, right: Tensor) -> dict[str, float]:
    """`recall` of pictures and of texts, by direction."""
    metrics = {f"image_to_text/{k}": value for k, value in recall(scores, right).items()}
    return metrics | {f"text_to_image/{k}": value for k, value in recall(scores.T, right.T).items()}


def mean_of_folds(scores: Tensor, right: Tensor, owner: Tensor, folds: int) -> dict[str, float]:
    """The means of `both_ways` over equal parts of the pictures, each with its own captions; and `candidates`, the
    number of pictures in a part. scores [N, M]: of N pictures and their M captions, which are in the order of the
    pictures; `owner` [M]. ValueError if the parts are not equal."""
    pictures, parts = len(scores), list[dict[str, float]]()
    if pictures % folds:
        raise ValueError(f"evals: {pictures} pictures do not make folds={folds} equal parts; use samples that do")
    size = pictures // folds
    for start in range(0, pictures, size):
        first, last = torch.searchsorted(owner, torch.tensor([start, start + size], device=owner.device)).tolist()
        rows, columns = slice(start, start + size), slice(first, last)
        parts.append(both_ways(scores[rows, columns], right[rows, columns]))
    return {name: sum(part[name] for part in parts) / folds for name in parts[0]} | {"candidates": float(size)}


def recall(scores: Tensor, right: Tensor) -> dict[str, float]:
    """Percent of rows that have a right column among their k best."""
    ranks = first_right(scores, right)
    return {f"R@{k}": 100 * (ranks < k).double().mean().item() for k in (1, 5, 10)}
