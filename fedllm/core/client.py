"""What a client declares about itself, and all that a client function may touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedllm.core.payload import Tree

SERVER = "__global__"
"""The server as a client of its own engine. In a simulation it holds the global test, and all training rows pooled
(only methods that say `simulation_only` train on those)."""


@dataclass(frozen=True)
class Query:
    """What a client function spends (`client.spend`) to answer one query: a site counts it, and may refuse."""


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
    latency: float = 0.0
    """Seconds that each message is under way beside what its bytes take."""
    dropout: float = 0.0
    """Probability that the client is lost while it works (drawn per round from its own stream)."""
    device: str | None = None
    """What it computes on, by a name of `core.energy.DEVICES`."""
    link: str | None = None
    """How it reaches the server, by a name of `core.energy.LINKS`; bandwidth and latency follow where not declared."""
    model: str | None = None
    """The model that it holds, by a name of the recipe's `models`, a model's id or a folder; None: the recipe's own."""
    modality: str = "text"
    privacy: str | None = None
    shares: str | None = None
    """What its answers to a query hold, of `core.shares.SHARES`; None: snippets."""
    domain: str | None = None
    """Where its rows come from, in a word (a look, a scanner): clients of one domain share what a method keeps for it.
    None: a domain of its own."""


@dataclass(frozen=True)
class Fleet:
    """What makes time in a simulation: with it, seconds are worked out from what clients declare, not measured."""

    step_seconds: float = 1.0
    """Of one local step (forward and backward over one batch) at speed 1; a forward alone takes a third of it."""
    day_seconds: float = 86400.0
    day_share: float = 1.0
    """Share of a day in which a client is there at all; each client's day begins at an hour of its own."""

    def compute(self, profile: Profile, steps: float) -> float:
        """Seconds of so many steps."""
        return steps * self.step_seconds / profile.speed

    def travel(self, profile: Profile, size: int) -> float:
        """Seconds of a message of so many bytes."""
        return profile.latency + (size / profile.bandwidth if profile.bandwidth else 0.0)


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
    """The model that it holds; requests go to it, and rows are tokenized as it reads them."""
    models: Mapping[str, Any]
    """The recipe's `models` by name: models with spaces and tokenizers of their own, or endpoints (`complete`)."""
    data: Any
    training: Any
    """How the recipe has it train: `training.optimizer`, `training.count(n)` steps a round on n rows, ..."""
    public: Sequence[Any]
    """The federation's public rows, tokenized: nobody's, and everybody may train on them."""
    memory: MutableMapping[str, Any]
    """Never leaves the client; committed when the round ends."""
    session: MutableMapping[str, Any]
    """Scratch of the round: what one of its functions leaves for the next. Never on disk, gone when the round ends."""
    pace: float | None
    """Seconds of one local step here, as the fleet declares it; None where time is not declared but real."""

    def rng(self, owner: str) -> np.random.Generator:
        """This owner's stream for the present round and phase; repeated calls go on in the same stream."""
        ...

    def fit(self, theta: Tree, *, base: Tree | None = None, freeze: Sequence[str] = (), terms: Sequence[Any] = (),
            steps: int | None = None, on: Sequence[Any] | None = None, objective: Any = None,
            side: Mapping[str, Sequence[Any]] | None = None, moments: Any = False, rate: float = 1.0) -> Any:
        """Train `theta` on the client's rows (or `on` others) as `training` says; returns a `Fitted`.

        `objective` (local/objectives/) takes the place of the task's own loss, `side` holds what it needs beside each
        row. `moments=client.memory.get("adam")` goes on with an optimizer's state; `Fitted.moments` is the next one.
        The learning rate is `rate` times the recipe's.
        """
        ...

    def measure(self, theta: Tree, rows: Sequence[Any], fn: Callable[..., Any], *, base: Tree | None = None) -> Any:
        """`fn(model, batch)` -> a vector for each of these rows [rows, width]; no gradient."""
        ...

    def book(self, *, tokens: int, steps: float, flops: float = 0.0) -> None:
        """Count work that a function does by itself and not by a request: whoever descends on its own says so here."""
        ...

    def loss(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> float:
        """Mean loss of `theta` on these training rows (indices; None: all)."""
        ...

    def losses(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> np.ndarray:
        """Loss of `theta` on each of these training rows (indices; None: all), per target."""
        ...

    tokens: Sequence[Any]
    """The client's own training rows, tokenized."""

    def held_out(self, on: str = "local") -> Sequence[Any]:
        """The rows that `score` tests on, as they are, for methods that test in a way of their own."""
        ...

    def probe(self, thetas: Sequence[Tree], rows: Sequence[int] | None = None, *, on: Sequence[Any] | None = None,
              base: Tree | None = None) -> list[Any]:
        """Row losses (`RowLosses`) of each of these trainables on the same training rows, or `on` others: one forward
        for all of them and, in a vectorized simulation, for all clients too."""
        ...

    def encode(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Rows as the model reads them."""
        ...

    def outputs(self, texts: Sequence[Any]) -> Any:
        """Class logits [texts, classes] of texts that are given as embeddings, each [T, d]; no gradient."""
        ...

    def logits(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> list[np.ndarray]:
        """What the head says of each of these training rows: [classes], or [T, classes] where tokens have classes."""
        ...

    def forward(self, segment: Any, theta: Tree, x: Any, mask: Any, *, base: Tree | None = None) -> Any:
        """States [B, T, d] after one segment of the model (`models/segments.py`), of ids [B, T] or states [B, T, d]."""
        ...

    def backward(self, segment: Any, theta: Tree, x: Any, mask: Any, g: Any = None, *, labels: Any = None,
                 base: Tree | None = None, times: float = 1.0) -> Any:
        """The gradients of that forward (`Slopes`) from `g`, dL/d(its states), or at the last segment from labels, of
        which the mean loss counts so many `times`."""
        ...

    def sensitivity(self, theta: Tree, rows: Sequence[int], *, base: Tree | None = None) -> Tree:
        """The mean of |d loss / d w| over these training rows, for every trainable w."""
        ...

    def gradient(self, theta: Tree, rows: Sequence[int] | None = None, *, base: Tree | None = None) -> Tree:
        """The mean over these training rows (None: all) of d loss(row) / d w, for every trainable w: no optimizer, no
        step. A layer that hides single rows (DP-SGD) refuses it."""
        ...

    def generate(self, prompts: Sequence[str], theta: Tree | None = None, **options: Any) -> list[str]:
        """Greedy (or sampled) continuations of the prompts."""
        ...

    def embed(self, texts: Sequence[str], theta: Tree | None = None) -> Any:
        """Mean-pooled last hidden states, shape [len(texts), hidden]."""
        ...

    def score(self, theta: Tree, *, base: Tree | None = None, on: str = "local",
              only: Mapping[str, str] | None = None) -> dict[str, float]:
        """Test metrics of `theta` on the client's held-out rows (`on="global"`: a simulator's global test), of which
        `only` keeps those whose columns say this."""
        ...

    def judged(self, said: str, wanted: str) -> float:
        """How right an answer is, from 0 to 1, by the first metric that the recipe names (`evaluate.metric`)."""
        ...

    def env(self, rng: np.random.Generator, row: Mapping[str, Any] | None = None) -> Any:
        """The client's environment, or that of `row` (`reset`, `step`, ends after `max_steps`; one in words also has
        `text`, `commands` and `say`); `rng` seeds its episodes."""
        ...

    def rollout(self, theta: Tree, episodes: int, *, rng: np.random.Generator | None = None, greedy: bool = False,
                on: Sequence[Any] | None = None) -> list[Any]:
        """`Episode`s of the policy `theta` in the client's environment (or in each of `on`); in a vectorized simulation
        all clients act in one forward a step."""
        ...

    def improve(self, theta: Tree, seen: Any, actions: Any, weights: Any, *, steps: int = 1) -> Any:
        """Policy-gradient steps: descend - mean_n w_n log pi(a_n | o_n); returns a `Fitted`."""
        ...

    def through(self, change: Callable[[Any], Any], closed: str = "", heard: Callable[[Any], None] = ...) -> Any:
        """For layers: a context in which `change` sees, changes or refuses every request that the client makes, and
        `heard` is told each answer."""
        ...

    def complete(self, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
                 ) -> list[Any]:
        """What the model says after each prompt (`Completion`: text, its log-probability, tokens read and said); an
        endpoint answers this request and no other."""
        ...

    def holding(self, name: str) -> Client:
        """This very client with the model of this name for its own: its requests go there, its rows are read so."""
        ...

    def having(self, model: Any) -> Client:
        """This very client with a model that it has made of what it holds: an emulator, a narrower network."""
        ...

    def spend(self, release: Any, count: int = 1) -> None:
        """For layers: so many noisy releases (`privacy.accountant.Release`) are about to leave. A site of a real
        federation books them in its own ledger, or refuses."""
        ...

    def once(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(*args)` for a pure function, computed once per process for equal arguments; treat it as read-only."""
        ...


Clients = Sequence[ClientInfo]
Metrics = Mapping[str, float]
