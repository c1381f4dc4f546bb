"""Who of a fleet gets which size this round: a fixed one, the largest that fits, a random one, or what PPO learned.

SABPPO (FedPEAT, arXiv 2310.17491): an actor-critic with one shared trunk and a categorical branch for each device; what
all choose together has the sum of the branches' log-probabilities. Schulman et al., PPO, arXiv 1707.06347, and GAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedllm.core.rng import torch_stream

OUT = -1
"""In the place of a size: this device is not asked."""
WIDTH, EPOCHS, LAMBDA, ENTROPY = 32, 4, 0.95, 0.01
Memory = Mapping[str, Any]


@dataclass(frozen=True)
class Scene:
    """What a controller sees before a round."""

    fits: np.ndarray
    """[devices, sizes]: whether the memory that a device declares is enough."""
    seconds: np.ndarray
    """[devices, sizes]: how long its answer would take."""
    seen: np.ndarray
    """[devices, features], each around 1 at most."""


class Controller(Protocol):
    """Chooses a size's number, or `OUT`, for each device; what it has learned is a value of the server's state."""

    def begin(self, features: int, sizes: int, seed: int) -> Memory:
        """What it knows before the first round."""
        ...

    def choose(self, memory: Memory, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Memory]: ...

    def learn(self, memory: Memory, reward: float) -> Memory:
        """After the round that it chose last."""
        ...


class Still:
    """A controller that learns nothing."""

    def begin(self, features: int, sizes: int, seed: int) -> Memory:
        return {}

    def learn(self, memory: Memory, reward: float) -> Memory:
        return memory


@dataclass(frozen=True)
class Fixed(Still):
    """One size for all, whatever they declare."""

    size: int

    def choose(self, memory: Memory, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Memory]:
        return np.full(len(scene.fits), self.size), memory


@dataclass(frozen=True)
class Greedy(Still):
    """The largest that fits into memory and deadline; where none is in time, the quickest that fits."""

    deadline: float

    def choose(self, memory: Memory, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Memory]:
        fine = scene.fits & (scene.seconds <= self.deadline)
        largest = fine.shape[1] - 1 - fine[:, ::-1].argmax(1)
        quickest = np.where(scene.fits, scene.seconds, np.inf).argmin(1)
        return np.where(fine.any(1), largest, np.where(scene.fits.any(1), quickest, OUT)), memory


@dataclass(frozen=True)
class Chance(Still):
    """Any that fits, or none, all equally likely."""

    def choose(self, memory: Memory, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Memory]:
        open_ = np.concatenate([np.ones((len(scene.fits), 1), bool), scene.fits], 1)
        drawn = np.array([rng.choice(np.flatnonzero(row)) for row in open_]) - 1
        return somebody(drawn, scene), memory


def somebody(choice: np.ndarray, scene: Scene) -> np.ndarray:
    """The choice; where nobody would be asked, the one whom the smallest fits and who is quickest is."""
    if (choice == OUT).all() and scene.fits.any():
        at = int(np.where(scene.fits.any(1), np.where(scene.fits, scene.seconds, np.inf).min(1), np.inf).argmin())
        choice = choice.copy()
        choice[at] = int(scene.fits[at].argmax())
    return choice


@dataclass(frozen=True)
class SABPPO:
    """Branches are the same small network for every device, which sees the device and the mean of all, so that a round
    may ask any of them. What does not fit has probability 0. Rewards are standardized by all that came before.
    """

    lr: float
    clip: float
    gamma: float
    every: int
    """Rounds from one update to the next."""

    def begin(self, features: int, sizes: int, seed: int) -> Memory:
        rng = torch_stream(seed, "sabppo")
        draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64) * shape[-1] ** -0.5  # noqa: E731
        return {"w": {"trunk": draw(WIDTH, 2 * features), "bias": torch.zeros(WIDTH, dtype=torch.float64),
                      "branch": 0.1 * draw(sizes + 1, WIDTH), "worth": 0.1 * draw(1, WIDTH)},
                "seen": {}, "rewards": [0, 0.0, 0.0]}

    def choose(self, memory: Memory, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, Memory]:
        x = torch.from_numpy(np.concatenate([scene.seen, np.broadcast_to(scene.seen.mean(0), scene.seen.shape)], 1))
        open_ = torch.from_numpy(np.concatenate([np.ones((len(x), 1), bool), scene.fits], 1))
        with torch.no_grad():
            log_p, worth = policy(memory["w"], x, open_)
        drawn = (log_p.exp().cumsum(1) < torch.from_numpy(rng.random((len(x), 1)))).sum(1)
        drawn = torch.minimum(drawn, log_p.shape[1] - 1 - open_.flip(1).int().argmax(1))  # where rounding went past 1
        choice = torch.from_numpy(somebody(drawn.numpy() - 1, scene)) + 1
        step = {"x": x, "open": open_, "choice": choice, "log_p": float(joint(log_p, choice)), "worth": float(worth)}
        return choice.numpy() - 1, {**memory, "seen": numbered([*memory["seen"].values(), step])}

    def learn(self, memory: Memory, reward: float) -> Memory:
        n, mean, m2 = memory["rewards"]  # Welford's
        n, off = n + 1, reward - mean
        mean += off / n
        m2 += off * (reward - mean)
        scaled = (reward - mean) / max(1e-6, (m2 / n) ** 0.5) if n > 1 else 0.0
        *before, last = memory["seen"].values()
        seen = [*before, {**last, "reward": scaled}]
        new = {**memory, "rewards": [n, mean, m2], "seen": numbered(seen)}
        if len(seen) <= self.every:
            return new
        return {**new, "w": self.updated(memory["w"], seen), "seen": numbered(seen[-1:])}

    def updated(self, w: Mapping[str, Tensor], seen: list[Any]) -> dict[str, Tensor]:
        """A few epochs of Adam on the clipped objective; the last step is there for its worth alone."""
        advantage, ahead = [], 0.0
        for now, then in zip(reversed(seen[:-1]), reversed(seen[1:]), strict=True):
            # A_t = d_t + gamma lambda A_(t+1), d_t = r_t + gamma V(s_(t+1)) - V(s_t)
            ahead = now["reward"] + self.gamma * then["worth"] - now["worth"] + self.gamma * LAMBDA * ahead
            advantage.insert(0, ahead)
        a, steps = torch.tensor(advantage, dtype=torch.float64), seen[:-1]
        returns = a + torch.tensor([s["worth"] for s in steps], dtype=torch.float64)
        a = (a - a.mean()) / a.std(correction=0).clamp(min=1e-6)
        params = {n: t.clone().requires_grad_() for n, t in w.items()}
        adam = torch.optim.Adam(params.values(), lr=self.lr)
        for _ in range(EPOCHS):
            loss = torch.zeros((), dtype=torch.float64)
            for step, a_t, return_t in zip(steps, a, returns, strict=True):
                log_p, worth = policy(params, step["x"], step["open"])
                ratio = (joint(log_p, step["choice"]) - step["log_p"]).exp()
                kept = torch.minimum(ratio * a_t, ratio.clamp(1 - self.clip, 1 + self.clip) * a_t)
                entropy = -(log_p.exp() * log_p.clamp(min=-50)).sum(1).mean()
                loss = loss - kept + 0.5 * (worth - return_t) ** 2 - ENTROPY * entropy
            adam.zero_grad()
            (loss / len(steps)).backward()
            adam.step()
        return {n: t.detach() for n, t in params.items()}


def numbered(steps: list[Any]) -> dict[str, Any]:
    """A list as a state holds it: a mapping whose names are in its order."""
    return {f"{i:04d}": step for i, step in enumerate(steps)}


def policy(w: Mapping[str, Tensor], x: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [devices, 1 + sizes] (the first: not asked), and what the state is worth; x [devices, f]."""
    h = torch.tanh(x @ w["trunk"].T + w["bias"])  # [devices, WIDTH], the shared trunk
    return (h @ w["branch"].T).masked_fill(~open_, -torch.inf).log_softmax(1), (h @ w["worth"].T).mean()


def joint(log_p: Tensor, choice: Tensor) -> Tensor:
    """log pi(all choices) = sum_k log pi_k(choice_k)."""
    return log_p.gather(1, choice[:, None]).sum()
