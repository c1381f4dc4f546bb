"""What the client-level DP layers share: the clip at home, and whose change it is that is clipped."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask
from fedllm.core.errors import RunError
from fedllm.core.payload import Payload, Tree, alike, norm
from fedllm.core.reduce import Mean, wide
from fedllm.core.rng import torch_stream
from fedllm.core.sums import without

OWN = "_dp/"
UNCOVERED = ("which clients were asked and how many rows they declare; evaluation on held-out rows; what a client "
             "keeps for itself; a round that is done again after a crash and gets other answers")


def told(ask: Ask, clip: float, lift: bool) -> tuple[dict[str, Any], Tree]:
    """What a client must know to clip, and the tensors that all were told alike: of these it is the change that counts.

    Add them back to the value that comes out (`put_back`).
    """
    common = alike(ask.msgs) if isinstance(ask.reducer, Mean) else {}
    return {OWN + "clip": clip, OWN + "lift": lift, OWN + "change": sorted(common)}, common


def contribution(fn: Any, msg: Payload, call: Any) -> tuple[dict[str, Tensor], bool]:
    """The client's lifted reply of weight 1 with an L2 norm of at most the clip, and whether it was below by itself."""
    plain = without(msg, OWN)
    reply = dict(call(plain))
    for k in msg[OWN + "change"]:
        if k in reply:
            reply[k] = wide(reply[k]) - wide(plain[k])
    if msg[OWN + "lift"]:
        reply = fn.__dict__["reduce"].lift({**reply, "n": 1} if "n" in reply else reply)
    given = {k: torch.as_tensor(wide(v), dtype=None if isinstance(v, Tensor) else torch.float32)
             for k, v in reply.items() if k not in ("n", "loss")}
    length, clip = norm(given), msg[OWN + "clip"]
    # u <- u * min(1, C / ||u||); the hair's breadth below 1 pays for rounding in the tensors' own type
    shrink = 1.0 if length <= clip else clip / length * (1 - 1e-6)
    return {k: v * shrink for k, v in given.items()}, length <= clip


def put_back(value: Payload, common: Mapping[str, Tensor]) -> dict[str, Any]:
    """Changes turned into values again."""
    return {k: v + common[k].to(v.dtype) if k in common else v for k, v in value.items()}


def fresh_secret() -> int:
    """What a run's noise is drawn from: the operating system's, kept in the layer's state and in its checkpoints alone.

    A round that a crash makes the run do again thus releases the very same numbers, at no further cost. Noise is keyed
    by the sum that it hides as well (`noise_stream`): another sum never gets the noise of an earlier one.
    """
    return secrets.randbits(128)


def noise_stream(seed: int | None, state: Mapping[str, Any], *key: object) -> torch.Generator:
    """The generator of this release; `seed`, if set, takes the place of the run's secret."""
    if seed is None and "secret" not in state:
        raise RunError("the secret of this run's noise was dropped when the run ended, so its releases cannot be made "
                       "again")
    return torch_stream(state["secret"] if seed is None else seed, "dp", *key)
