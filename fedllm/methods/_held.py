"""What clients hold of the server's trainables: told whole once, and then by what they change.

The server's state has `version` and `holds`: at which version a client was when its answer last counted. Who is one
version behind is told the last step; whoever else is told all. A site that lost what it held says so, and is told all
in the next round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.client import Client
from fedllm.core.errors import Withheld
from fedllm.core.method import State


def behind(state: State, client: str) -> bool:
    """Whether the last step alone brings this client to the present version."""
    return state["version"] > 0 and state["holds"].get(client) == state["version"] - 1


def counted(state: State, asked: Sequence[str], answered: Sequence[str]) -> dict[str, Any]:
    """The entries `version` and `holds` of the next state."""
    holds = {c: v for c, v in state["holds"].items() if c not in asked}
    return {"version": state["version"] + 1,
            "holds": dict(sorted((holds | dict.fromkeys(answered, state["version"])).items()))}


def held(client: Client, version: int) -> Mapping[str, Any]:
    """What the client kept of the version before this one; Withheld where it kept none, or another."""
    mine = client.memory.get("held")
    if mine is None or mine["version"] != version - 1:
        at = "nothing" if mine is None else f"version {mine['version']}"
        raise Withheld(f"it holds {at} of the trainables and was told a step from version {version - 1}; it must be "
                       "told them whole")
    return mine
