"""Two shops without a user or an item in common: what their items are about is said in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.core.knobs import knob
from fedllm.core.rng import numpy_stream
from fedllm.data.simulated.registry import Simulated
from fedllm.data.table import Table

NAMES = ("arts", "office", "garden", "pets", "books", "tools")
WORDS = tuple(a + b for a in ("ba", "de", "ki", "lo", "mu", "ra", "si", "to") for b in (
    "rin", "vel", "mos", "tak", "nub", "pol", "sed", "gar", "fim", "zet"))


@dataclass(frozen=True)
class Shops(Simulated):
    """Columns user, shop, segment, item, time. Titles are words of an item's topic; users go from topic to topic by one
    chain for all shops, with a taste of their own, and pick by popularity within the topic."""

    shops: int = knob(2, "shops, the second and all later ones small", ge=1, le=len(NAMES))
    items: int = knob(120, "items of the first shop; the others have half", ge=10)
    users: int = knob(180, "users of the first shop; the others have a third", ge=4)
    length: int = knob(10, "interactions of a user, on average", ge=4)
    topics: int = knob(8, "topics of items", ge=2, le=16)
    popularity: float = knob(0.4, "how unequal items of a topic are: the n-th is taken n^-this as often", ge=0)
    segments: int = knob(4, "kinds of users, each with a taste of its own", ge=1)
    mixed: str = knob("", "a shop whose titles are dealt out anew, so that they say nothing", options=("", *NAMES))

    def tables(self, seed: int) -> Sequence[Table]:
        rng = numpy_stream(seed, "shops")
        words = rng.permutation(WORDS)[: 5 * self.topics].reshape(self.topics, 5)
        chain = rng.dirichlet(np.full(self.topics, 0.15), self.topics)  # which topic follows which
        tastes = rng.dirichlet(np.full(self.topics, 0.4), self.segments)
        rows = []
        for s, shop in enumerate(NAMES[: self.shops]):
            items, users = (self.items, self.users) if s == 0 else (self.items // 2, max(4, self.users // 3))
            topic = rng.integers(0, self.topics, items)
            wanted = (1.0 + rng.permutation(items)) ** -self.popularity
            titles = [f"{shop}/{' '.join([*rng.choice(words[t], 3, replace=False), f'no{i}'])}"
                      for i, t in enumerate(topic)]
            if shop == self.mixed:
                bare = [t.rpartition(" ")[0] for t in titles]
                titles = [f"{bare[j]} no{i}" for i, j in enumerate(rng.permutation(items))]
            for u in range(users):
                rows += self._user(rng, f"{shop}-{u:03d}", shop, topic, wanted, titles, chain, tastes)
        return [Table("sim:shops", rows)]

    def _user(self, rng: np.random.Generator, who: str, shop: str, topic: np.ndarray, wanted: np.ndarray,
              titles: Sequence[str], chain: np.ndarray, tastes: np.ndarray) -> list[dict[str, object]]:
        segment = int(rng.integers(self.segments))
        now, out = int(rng.choice(self.topics, p=tastes[segment])), []
        for at in range(max(4, int(rng.poisson(self.length)))):
            here = np.flatnonzero(topic == now)
            if len(here):
                item = int(rng.choice(here, p=wanted[here] / wanted[here].sum()))
                out.append({"user": who, "shop": shop, "segment": f"segment-{segment}", "item": titles[item],
                            "time": at})
            now = int(rng.choice(self.topics, p=0.7 * chain[now] + 0.3 * tastes[segment]))
        return out
