"""Texts that a model writes for others to learn from: asked for by a deadline, read strictly, and none that repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import RecipeError, Withheld
from fedllm.core.payload import Tree
from fedllm.core.rng import seed_of
from fedllm.models.similar import embedder


def said_by(client: Any, name: str, prompts: Sequence[str], tokens: int, temperature: float, seed: int,
            theta: Tree | None = None) -> list[str]:
    """What the recipe's model of this name says after each prompt; of an endpoint with no `theta`.

    EndpointError where one does not answer by its own deadline (`timeout`, `retries`): the run ends, nothing has left
    in this round, and `fedllm resume` asks again.
    """
    held, options = client.holding(name), {"theta": theta} if theta else {}
    return [c.text for c in held.complete(prompts, tokens, temperature, seed, **options)]


def need_variety(name: str, texts: Sequence[str], least: float) -> list[int]:
    """`need_new` of a model by its name among the recipe's `models`."""
    return need_new(f"models.{name}", texts, least)


def need_new(who: str, texts: Sequence[str], least: float, quoted: bool = True) -> list[int]:
    """The places of texts that are neither empty nor there before; Withheld where these are fewer than the share
    `least` of all: a writer that repeats itself teaches nothing, and says what it was told. At a client, whose reasons
    leave, its most frequent text is not `quoted`."""
    seen: set[str] = set()
    fresh = []
    for i, text in enumerate(texts):
        bare = " ".join(text.split())
        if bare and bare not in seen:
            seen.add(bare)
            fresh.append(i)
    if len(fresh) < least * len(texts):
        [(most, times)] = Counter(" ".join(t.split()) for t in texts).most_common(1)
        often = f"{times} times {most[:60]!r}" if quoted else f"one of them {times} times"
        raise Withheld(f"{who} repeats itself: {len(fresh)} of its {len(texts)} texts are new and not empty, "
                       f"allowed are {least:.0%} and more ({often}); raise method.temperature")
    return fresh


def fresh(name: str, texts: Sequence[str], least: float) -> tuple[list[int], str]:
    """The same, and "", or no places and the reason: for a client that must say something in any case."""
    try:
        return need_new(f"models.{name}", texts, least, quoted=False), ""
    except Withheld as error:
        return [], str(error)


def need_parts(owner: str, name: str, text: str, *parts: str) -> None:
    """RecipeError for a template that lacks one of these parts, or has others."""
    try:
        said = text.format(**{p: "\0" for p in parts})
        whole = all("{" + p + "}" in text for p in parts) and "\0" in said
    except (KeyError, ValueError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise RecipeError(f"{owner}.{name} = {text!r:.200} is not allowed; it must name "
                          f"{' and '.join('{' + p + '}' for p in parts)}, and nothing else in braces")


def graded(told: Sequence[Tensor]) -> list[float]:
    """The mean grade of each text over the clients that have an opinion (not -1); -1 where nobody has."""
    each = torch.stack([t.double() for t in told])  # [clients, texts]
    some = (each >= 0).double()
    mean = (each.clamp(min=0) * some).sum(0) / some.sum(0).clamp(min=1)
    return torch.where(some.sum(0) > 0, mean, -1.0).tolist()


def meant(model: Any, batch: Any) -> Tensor:
    """For `client.measure`: how sure a classifier is of each row's label [N, 1]."""
    return model.class_logits(batch).softmax(-1).gather(1, batch.labels.clamp(min=0)[:, None])


def one_line(text: str) -> str:
    """What a model that was shown lines says on its own: the first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def grouped(texts: Sequence[str], size: int, embed: str) -> np.ndarray:
    """The group of each text [n], of ceil(n / size) by k-means; fewer where there are fewer different texts."""
    from sklearn.cluster import KMeans

    x = embedder(embed)[0](texts)
    k = min(-(-len(texts) // size), len(np.unique(x, axis=0)))
    return KMeans(k, n_init=2, random_state=seed_of("grouped") % 2**31).fit(x).labels_


def few_shots(texts: Sequence[str], of: Sequence[int], group: np.ndarray, leads: Sequence[str], more: int, shown: int,
              rng: np.random.Generator) -> tuple[list[str], list[int]]:
    """For each text `more` prompts, and the label that each asks for: up to `shown` texts of its group and label, each
    behind what leads to its label, and that once more."""
    out, meant = [], []
    for i in [i for _ in range(more) for i in range(len(texts))]:
        near = [j for j in range(len(texts)) if group[j] == group[i] and of[j] == of[i]]
        some = rng.choice(near, min(shown, len(near)), replace=False)
        out.append("".join(f"{leads[of[i]]} {one_line(texts[j])}\n" for j in some) + leads[of[i]])
        meant.append(int(of[i]))
    return out, meant


def named(said: str, labels: Sequence[str]) -> int:
    """The label that an answer names first, by number; -1 where it names none."""
    found = [(at, -len(label), i) for i, label in enumerate(labels) if (at := said.lower().find(label.lower())) >= 0]
    return min(found)[2] if found else -1


def balanced(mine: np.ndarray, most: int, boost: float, rng: np.random.Generator) -> list[int]:
    """Up to `most` of these; of a class that has fewer some again, `boost` of those that it lacks."""
    chosen = [int(i) for i in rng.choice(mine, min(most, len(mine)), replace=False)]
    again = round(boost * (most - len(chosen)))
    return [*chosen, *(int(i) for i in rng.choice(mine, again))] if again else chosen
