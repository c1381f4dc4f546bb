"""Whose rows come from which domain: a place for each, as clients come, and means within a place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.core.client import ClientInfo
from fedllm.core.errors import RecipeError
from fedllm.core.payload import Payload
from fedllm.core.reduce import Sum


def domain_of(client: ClientInfo) -> str:
    """What a client's profile says, or itself: a domain of its own."""
    return client.profile.domain or client.id


def places(known: Mapping[str, int], clients: Sequence[ClientInfo], domains: int) -> dict[str, int]:
    """Domain -> place, with those of these clients; RecipeError where there are more domains than places."""
    out = dict(known)
    for client in clients:
        out.setdefault(domain_of(client), len(out))
    if len(out) > domains:
        raise RecipeError(f"space.domains = {domains}, and the clients have {len(out)} ({', '.join(list(out)[:6])}"
                          f"{', ...' * (len(out) > 6)}); allowed is {len(out)} or more, or fewer domains by "
                          "clients.profiles (domain: a word)")
    return out


@dataclass(frozen=True)
class ByPlace(Sum):
    """The mean of `own` within each place (`place`, of `places`), and the mean of all else, all clients alike."""

    divides: ClassVar[bool] = True

    def lift(self, reply: Payload) -> Payload:
        own, place, many = reply["own"], int(reply["place"]), int(reply["places"])
        held = torch.zeros(many, dtype=own.dtype)
        held[place] = 1
        return {**{k: v for k, v in reply.items() if k not in ("place", "places")},
                "own": held.view(-1, *[1] * own.dim()) * own, "held": held, "one": 1}

    def done(self, total: Payload) -> Payload:
        held: Tensor = total["held"]
        own = total["own"] / held.clamp(min=1).view(-1, *[1] * (total["own"].dim() - 1))
        return {**{k: v / total["one"] for k, v in total.items() if k not in ("own", "held", "one")}, "own": own,
                "held": held}


