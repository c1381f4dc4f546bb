"""Groups texts by what they are about: k-means over embeddings, given or made from their words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from fedllm.core.errors import DataError

Embed = Callable[[Sequence[str]], np.ndarray] | np.ndarray
"""Embeds texts as an array [len(texts), dim], or is that array already, a row of it for each row of data."""

DIM = 64


def clusters(texts: Sequence[str], k: int, rng: np.random.Generator, embed: Embed | None = None) -> np.ndarray:
    """Each text's cluster in [0, k), shape [len(texts)]; a cluster may be empty where fewer than k texts differ."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    points = tfidf(texts) if embed is None else np.asarray(embed if isinstance(embed, np.ndarray) else embed(texts))
    if points.ndim != 2 or len(points) != len(texts) or not np.isfinite(points).all():
        raise DataError(f"by_cluster: the embeddings have shape {points.shape}; they must be finite, one vector for "
                        f"each of the {len(texts)} rows")
    with warnings.catch_warnings():
        # Too few distinct points: the caller's complaint about an empty client is the clearer one.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(k, n_init=4, random_state=int(rng.integers(2**31))).fit_predict(points)


def tfidf(texts: Sequence[str]) -> np.ndarray:
    """TF-IDF of words, reduced to at most 64 dimensions: shape [len(texts), <= 64], rows of length 1 or 0."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    try:
        words = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, max_features=50_000).fit_transform(texts)
    except ValueError as error:
        raise DataError(f"by_cluster: the texts hold no words to cluster by ({error})") from error
    if words.shape[1] <= DIM:
        return words.toarray()
    return normalize(TruncatedSVD(DIM, random_state=0).fit_transform(words))
