"""Clients whose data is an environment: what a recipe says of it, and a row for each client."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from fedllm.data.federation import Federation, Shard
from fedllm.data.spec import Spec
from fedllm.environments.registry import MAX_STEPS, dealt
from fedllm.environments.registry import PREFIX as SCENE
from fedllm.environments.rules import Rules
from fedllm.environments.toolbox import PATIENCE


class EnvironmentSpec(Spec):
    """Who acts where; every other key is a parameter of the environment, or a list of values dealt to the clients."""

    model_config = ConfigDict(extra="allow")

    clients: Annotated[int, Field(ge=1)] = 6
    """Number of clients, each with a layout of its own where `layout` is not given."""
    max_steps: Annotated[int, Field(ge=1)] = MAX_STEPS
    """Longest episode: what has not ended by then is cut off, and counted as cut."""
    held_out: Annotated[int, Field(ge=0)] = 0
    """Environments that no client has, with layouts of their own: the global test. 0: the test is in all clients'."""
    may: list[Literal["write", "network"]] = Field(default_factory=list)
    """What tools may do beside reading, at every client: such a tool is off unless it is named here."""
    mcp: Literal["builtin"] | Annotated[list[str], Field(min_length=1)] | None = None
    """Where tools come from: builtin (fedllm's own MCP server, a process over stdio), or the command of an MCP server
    as a list of words ({db}, {files} and {layout} are filled in). None: this process has them. Never sent to a site."""
    seconds: Annotated[float, Field(gt=0, le=600)] = PATIENCE
    """Seconds that a call of a tool may take."""
    calls: Annotated[int, Field(ge=1)] | None = None
    """Calls of tools in an episode, at most; None: as many as `max_steps` lets through."""
    characters: Annotated[int, Field(ge=1)] | None = None
    """Characters of all answers of tools in an episode, at most."""
    record: str | None = None
    """A file that every call and its answer are written to, for `replay`."""
    replay: str | None = None
    """A file so written: it answers in the place of the tools, and no server is begun."""


def scene_rows(source: str, spec: EnvironmentSpec | None, seed: int) -> list[dict[str, Any]]:
    """Each client's environment, as a row, and then those that no client has."""
    given = spec or EnvironmentSpec()
    rules = {key: getattr(given, key) for key in Rules.names()}
    return dealt(source.removeprefix(SCENE), given.model_extra or {}, given.clients, given.max_steps, seed,
                 given.held_out, **rules)


def environments(source: str, spec: EnvironmentSpec, seed: int) -> Federation:
    """Each client has one row, its environment, to learn in and to be tested in; the global test is all of them, or
    those that are held out."""
    rows = scene_rows(source, spec, seed)
    shards = {f"client-{i}": Shard([row], [row], {"environment": row["environment"]})
              for i, row in enumerate(rows[: spec.clients])}
    return Federation(shards, rows[spec.clients :] or rows, "environment")
