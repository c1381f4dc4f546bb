"""What a client declares about itself, and all that a client function may touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedllm.core.payload import Tree

SERVER = "__global__"
"""The server as a client of its own engine. In a simulation it holds the global test, and all training rows pooled."""


@dataclass(frozen=True)
class Profile:
    """Declared heterogeneity. What a client does not declare is None, and methods fall back to the recipe."""

    rank: int | None = None
    """LoRA rank that this client can afford."""
    memory_bytes: int | None = None
    bandwidth: float | None = None
    """Bytes per second, up and down."""
    speed: float = 1.0
    """Relative compute speed; 0.5 takes twice as long."""
    availability: float = 1.0
    """Probability that the client answers when asked (drawn per round from its own stream)."""
    modality: str = "text"
    privacy: str | None = None


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client: its id, how many training examples it says it has, its profile."""

    id: str
    n: int
    profile: Profile = field(default_factory=Profile)


class Client(Protocol):
    """All that a client function may touch. Heavy work goes through `fit`, `loss`, `generate`, `embed`, `score`:
    on a real site these run at once; in a vectorized simulation many clients' requests run in one step."""

    id: str
    n: int
    profile: Profile
    model: Any
    data: Any
    local: Any
    """How the recipe has it train: `local.optimizer`, `local.count(n)` steps a round on n rows, ..."""
    public: Sequence[Any]
    """The federation's public rows, tokenized: nobody's, and everybody may train on them."""
    memory: MutableMapping[str, Any]
    """Never leaves the client; committed when the round ends."""

    def rng(self, owner: str) -> np.random.Generator:
        """This owner's stream for the present round and phase; repeated calls go on in the same stream."""
        ...

    def fit(self, theta: Tree, *, base: Tree | None = None, freeze: Sequence[str] = (), terms: Sequence[Any] = (),
            steps: int | None = None, on: Sequence[Any] | None = None) -> Any:
        """Train `theta` on the client's rows (or `on` others) as the recipe's `local` says; returns a `Fitted`."""
        ...

    def loss(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> float:
        """Mean loss of `theta` on these training rows (indices; None: all)."""
        ...

    def sensitivity(self, theta: Tree, rows: Sequence[int], *, base: Tree | None = None) -> Tree:
        """The mean of |d loss / d w| over these training rows, for every trainable w."""
        ...

    def generate(self, prompts: Sequence[str], theta: Tree | None = None, **options: Any) -> list[str]:
        """Greedy (or sampled) continuations of the prompts."""
        ...

    def embed(self, texts: Sequence[str], theta: Tree | None = None) -> Any:
        """Mean-pooled last hidden states, shape [len(texts), hidden]."""
        ...

    def score(self, theta: Tree, *, base: Tree | None = None, on: str = "local") -> dict[str, float]:
        """Test metrics of `theta` on the client's held-out rows (`on="global"`: a simulator's global test)."""
        ...

    def through(self, change: Callable[[Any], Any], closed: str = "") -> Any:
        """For layers: a context in which `change` sees, changes or refuses every request that the client makes."""
        ...

    def once(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)` for a pure function, computed once per process for equal arguments; treat it as read-only."""
        ...


Clients = Sequence[ClientInfo]
Metrics = Mapping[str, float]
