"""Image-text retrieval: R@1/5/10 both ways over one candidate set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.contracts import Evaluation
from pretrain.data.sources import PairShards
from pretrain.evals.trained import Trained, check_counts, missing_head, uint8_pictures

SHOWN, RESULTS = 4, 5  # hits and misses shown per direction, results shown per query


@dataclass(frozen=True)
class Retrieval(Evaluation):
    """Every picture of `pairs` against every caption, by the dual encoder. A result is right when it is the query's own
    partner or carries the very same caption."""

    pairs: PairShards
    samples: int = 1000
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "contrastive")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        """-> percentages for eval.json, and what the report shows."""
        head = trained.head("contrastive")
        images, texts, tokens, pictures = [], [], [], []
        samples = min(self.samples, trained.samples_of(self.pairs))
        for batch in trained.batches({"dual": self.pairs}, self.batch, samples):
            image, text = head.embed(trained.task.encoder(batch), batch.layout)
            images.append(image)
            texts.append(text)
            tokens.append(batch.text_tokens.cpu())
            pictures.append(uint8_pictures(batch.images).cpu())
        image, text = torch.cat(images)[:samples], torch.cat(texts)[:samples]
        token, picture = torch.cat(tokens)[:samples], torch.cat(pictures)[:samples]
        # [N, N]: same caption, so a picture with a repeated caption has several right answers.
        _, caption = token.unique(dim=0, return_inverse=True)
        right = (caption[:, None] == caption[None, :]).to(image.device)
        scores = image @ text.T
        metrics = {f"retrieval/image_to_text/{k}": v for k, v in recall(scores, right).items()}
        metrics |= {f"retrieval/text_to_image/{k}": v for k, v in recall(scores.T, right.T).items()}
        metrics["retrieval/candidates"] = float(len(image))
        return metrics, {"retrieval": self._show(trained, scores, right, token, picture)}

    def _show(self, trained: Trained, scores: Tensor, right: Tensor, tokens: Tensor, pictures: Tensor) -> list[dict]:
        """Some hits and some misses of each direction, with their best results."""
        if trained.text is None:
            return []
        captions = [trained.text.decode(row.tolist()) for row in tokens]
        shown = []
        for direction, table, good in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
            ranks = first_right(table, good)
            hits, misses = (ranks == 0).nonzero().flatten(), (ranks > 0).nonzero().flatten()
            for query in [*hits[:SHOWN].tolist(), *misses[:SHOWN].tolist()]:
                best = table[query].topk(min(RESULTS, len(table))).indices.tolist()
                by_text = direction == "text_to_image"
                results = [
                    {"image": trained.save_picture(pictures[i], f"pair{i}") if by_text else None,
                     "text": captions[i], "right": bool(good[query, i])}
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


def first_right(scores: Tensor, right: Tensor) -> Tensor:
    """For each row of scores [N, M], how many wrong columns score at least as high as its best right one: [N]. A tie
    counts against us, so a collapsed model scores nothing."""
    best = scores.masked_fill(~right, -torch.inf).max(-1, keepdim=True).values
    # Not `scores >= best`: no number compares with NaN, and a diverged model must not look perfect.
    return (~(scores < best) & ~right).sum(-1)


def recall(scores: Tensor, right: Tensor) -> dict[str, float]:
    """Percent of rows that have a right column among their k best."""
    ranks = first_right(scores, right)
    return {f"R@{k}": 100 * (ranks < k).double().mean().item() for k in (1, 5, 10)}
