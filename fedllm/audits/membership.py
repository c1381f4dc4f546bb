"""Membership inference: can somebody who has the model tell the rows that it was trained on from others?

Scores are higher for members. Row by row they come from the log-probabilities of the tokens that are learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.stats import beta, norm, rankdata
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.local.requests import Limits
from fedllm.models.batch import IGNORE, collate
from fedllm.models.kernels import fast
from fedllm.models.model import Model

K = 0.2
"""Share of a row's least likely tokens that min-k looks at."""


def row_scores(model: Model, theta: Tree, base: Tree | None, rows: Sequence[Encoded],
               limits: Limits) -> dict[str, np.ndarray]:
    """`loss` (Yeom et al. 2018), `min_k` (Shi et al. 2023) and `min_k_pp` (Zhang et al. 2024) of each row, and `phi`,
    log p / (1 - p) of the row's mean token (Carlini et al. 2022). A class label is a row's only token."""
    out: dict[str, list[float]] = {"loss": [], "min_k": [], "min_k_pp": [], "phi": []}
    at, longest = 0, max((len(e.ids) for e in rows), default=1)
    size = max(1, limits.read(model) // (4 * longest))
    while at < len(rows):
        for logp, z in _tokens(model, theta, base, rows[at : at + size]):
            mean = float(logp.mean())
            out["loss"].append(mean)
            out["min_k"].append(_lowest(logp))
            out["min_k_pp"].append(_lowest(z))
            out["phi"].append(mean - float(np.log(max(-np.expm1(min(mean, -1e-12)), 1e-30))))
        at += size
    return {n: np.array(v) for n, v in out.items()}


def _lowest(x: np.ndarray) -> float:
    return float(np.sort(x)[: max(1, int(K * len(x)))].mean())


@torch.no_grad()
def _tokens(model: Model, theta: Tree, base: Tree | None, rows: Sequence[Encoded]
            ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each row's targets: log p, and how many standard deviations it lies above the mean of log p under p."""
    batch = collate([rows], model.pad, model.device)
    with model.using([theta], base), fast(model.device, batch.ids.shape[1], model.fast_kernels):
        if model.task == "classification":
            logp = model.class_logits(batch).double().log_softmax(-1)  # [N, C]
            return [_standing(p[None], y[None]) for p, y in zip(logp, batch.labels, strict=True)]
        h = model.hidden(batch)[:, :-1]
        out = []
        for i in range(len(rows)):
            good = batch.labels[i, 1:] != IGNORE
            logp = model.logits_of(h[i][good][None])[0].double().log_softmax(-1)  # [t, V]
            out.append(_standing(logp, batch.labels[i, 1:][good]))
        return out


def _standing(logp: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    mine = logp.gather(1, y[:, None])[:, 0]
    p = logp.exp()
    mean = (p * logp).nan_to_num().sum(1)
    std = ((p * logp.pow(2)).nan_to_num().sum(1) - mean.pow(2)).clamp(min=1e-12).sqrt()
    return mine.cpu().numpy(), ((mine - mean) / std).cpu().numpy()


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a member scores above another row; ties count half."""
    both = rankdata(np.concatenate([members, others]))
    n, m = len(members), len(others)
    return float((both[:n].sum() - n * (n + 1) / 2) / (n * m))


def tpr_at(members: np.ndarray, others: np.ndarray, fpr: float) -> dict[str, float] | None:
    """Share of members above the threshold that this share of others passes, with its 95 % Clopper-Pearson bounds.

    None where there are too few others to speak of such a rate.
    """
    if len(others) * fpr < 1:
        return None
    threshold = np.sort(others)[::-1][int(len(others) * fpr) - 1]
    hits, n = int((members > threshold).sum()), len(members)
    low, high = bounds(hits, n)
    return {"tpr": hits / n, "low": low, "high": high, "fpr": fpr}


def bounds(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson: between what shares the true one lies."""
    a = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(a, hits, n - hits + 1))
    return low, 1.0 if hits == n else float(beta.ppf(1 - a, hits + 1, n - hits))


def lira(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Online LiRA with pooled spreads: log N(phi; mean in) - log N(phi; mean out) of each row [n].

    `shadows` [S, n] is phi under each shadow model, `inside` [S, n] which of them was trained on the row. Rows that no
    shadow has in, or none out, are NaN: drop them.
    """
    count_in, count_out = inside.sum(0), (~inside).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_in = np.where(inside, shadows, 0).sum(0) / count_in
        mean_out = np.where(inside, 0, shadows).sum(0) / count_out
    spread_in = _pooled(np.where(inside, shadows - mean_in, np.nan))
    spread_out = _pooled(np.where(inside, np.nan, shadows - mean_out))
    return norm.logpdf(target, mean_in, spread_in) - norm.logpdf(target, mean_out, spread_out)


def _pooled(away: np.ndarray) -> float:
    """Spread over all rows and shadows: few shadows a row say nothing about its own."""
    good = away[np.isfinite(away)]
    return max(float(good.std()), 1e-6) if len(good) else 1e-6


def report(members: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """`auc` and true positive rates at 1 % and 0.1 % false positives, for every score."""
    out = {}
    for name, mine in members.items():
        a, b = mine[np.isfinite(mine)], others[name][np.isfinite(others[name])]
        if len(a) and len(b):
            out[name] = {"auc": auc(a, b), "at_1_percent": tpr_at(a, b, 0.01), "at_0.1_percent": tpr_at(a, b, 0.001)}
    return out
