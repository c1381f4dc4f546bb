"""Streams: several spaces on one network at once, each under a name of its own in one tree `<stream>/<trainable>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedllm.core.errors import ModelError, RecipeError
from fedllm.core.knobs import knob
from fedllm.core.payload import Tree, pack, part
from fedllm.spaces.registry import SPACES
from fedllm.spaces.space import Prompt, Space, Stack

PARTS = "streams"
"""Where a stack's notes hold the trainables of each stream."""


class View:
    """The stack as one stream sees it: its own trainables and notes, and all else as it is."""

    def __init__(self, whole: Stack, name: str) -> None:
        self.whole, self.name = whole, name

    def __getattr__(self, key: str) -> Any:
        return getattr(self.whole, key)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.whole.extra.get(PARTS, {}).get(self.name, {})

    @property
    def extra(self) -> dict[str, Any]:
        return self.whole.extra.setdefault(f"{PARTS}/{self.name}", {})


@dataclass(frozen=True)
class Streams(Space):
    """`of` maps a stream's name to a space (`full`, or `{name: lora, rank: 4}`), the one nearest the weights first.

    A stream is shared unless it is listed as `personal` (it never leaves a client) or `frozen` (nobody trains it).
    `part(theta, "tau")` is one stream; a tree may lack some, which then do nothing. Of several streams with
    `modules_to_save` only the first trains the classifier, unless a later one says that it does.
    """

    of: Mapping[str, Any] = knob(None, "stream -> space, the one nearest the weights first")
    personal: tuple[str, ...] = knob((), "streams that never leave a client")  # type: ignore[misc]
    frozen: tuple[str, ...] = knob((), "streams that nobody trains")  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "made", spaces_of(self.of))
        for key, names in (("personal", self.personal), ("frozen", self.frozen)):
            if odd := [n for n in names if n not in self.made]:
                raise RecipeError(f"Streams.{key} = {list(names)!r}: {odd[0]!r} is no stream; allowed are "
                                  f"{', '.join(self.made)}")
        if both := set(self.personal) & set(self.frozen):
            raise RecipeError(f"Streams.frozen = {list(self.frozen)!r}: {min(both)!r} is personal too; choose one")
        if not set(self.made) - set(self.frozen):
            raise RecipeError(f"Streams.frozen = {list(self.frozen)!r} leaves nothing to train; one stream at least "
                              "must not be frozen")

    made: ClassVar[Mapping[str, Space]]
    """The spaces by their stream's name."""

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        return any(space.ragged for space in self.made.values())

    @property
    def over_packed(self) -> bool:  # type: ignore[override]
        return all(space.over_packed for space in self.made.values())

    @property
    def by_token(self) -> bool:  # type: ignore[override]
        return all(space.by_token for space in self.made.values())

    @property
    def draws(self) -> bool:
        return any(space.draws for space in self.made.values())

    @property
    def virtual(self) -> int:
        return sum(space.virtual for space in self.made.values())

    @property
    def places(self) -> int:
        return sum(space.places for space in self.made.values())

    @property
    def stays(self) -> str:  # type: ignore[override]
        return next((f"of stream '{s}', {space.stays}" for s, space in self.made.items() if space.stays), "")

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        return pack(**{s: space.start(net, rng, rank) for s, space in self.made.items()})

    def install(self, net: nn.Module, stack: Stack) -> bool:
        """Each over those before it; ModelError where two would change one module and their changes do not add up."""
        owner: dict[str, str] = {}
        stackable = True
        for s, space in self.made.items():
            before, over = forwards(net), set(space.composes(net))
            if type(space).classes is not Space.classes:
                raise ModelError(f"space.of: stream '{s}' makes class prompts ('{space.stem}'), which is no part of a "
                                 "sum; use it as the space itself")
            stackable &= space.install(net, View(stack, s))  # type: ignore[arg-type]
            touched = [p for p, f in forwards(net).items() if f is not before[p]]
            if clash := [p for p in touched if p in owner and p not in over]:
                raise ModelError(f"space.of: streams '{owner[clash[0]]}' and '{s}' both change the module '{clash[0]}' "
                                 f"and '{space.stem}' would undo what lies beneath it; give them different modules, "
                                 "or list last the one that adds to a module's output (lora, ia3, adapter)")
            owner |= dict.fromkeys(touched, s)
        if len(ahead := [s for s, space in self.made.items() if type(space).before is not Space.before]) > 1:
            raise ModelError(f"space.of: streams '{ahead[0]}' and '{ahead[1]}' both put virtual tokens before the "
                             "text; give only one of them")
        return stackable

    def prepare(self, stack: Stack, trees: Sequence[Mapping[str, Tensor]]) -> None:
        stack.extra[PARTS] = {s: part(stack.tensors, s) for s in self.made}
        for s, space in self.made.items():
            if stack.extra[PARTS][s]:
                space.prepare(View(stack, s), [part(t, s) for t in trees])  # type: ignore[arg-type]

    def before(self, net: nn.Module, stack: Stack, rows: int) -> Prompt | None:
        said = (space.before(net, View(stack, s), rows) for s, space in self.made.items())  # type: ignore[arg-type]
        return next((prompt for prompt in said if prompt is not None), None)

    def multiplied(self, name: str) -> bool:
        s, _, rest = name.partition("/")
        return self.made[s].multiplied(rest)

    def place(self, name: str) -> str:
        s, _, rest = name.partition("/")
        return self.made[s].place(rest)

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        return not self._live(net, theta)

    def _live(self, net: nn.Module, theta: Mapping[str, Tensor]) -> list[str]:
        """The streams of a tree that make a difference."""
        return [s for s, space in self.made.items() if (mine := part(theta, s)) and not space.idle(net, mine)]

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        for s, space in self.made.items():
            if mine := part(theta, s):
                space.merge(net, mine)

    def to_peft(self, net: nn.Module, task: str, theta: Mapping[str, Tensor]) -> tuple[Any, Tree] | None:
        """That of one stream, where no other makes a difference."""
        live = self._live(net, theta)
        mine = [s for s in live or self.made if part(theta, s)] if len(live) < 2 else []
        made = (self.made[s].to_peft(net, task, part(theta, s)) for s in mine)
        return next((m for m in made if m is not None), None)

    def from_peft(self, config: Mapping[str, Any], tree: Tree, fresh: Mapping[str, Tensor]) -> Tree:
        """The adapter as the stream whose tensors it has; the others at their start."""
        for s, space in self.made.items():
            mine = part(fresh, s)
            if space.peft == config.get("peft_type") and mine.keys() == tree.keys():
                return {**fresh, **pack(**{s: space.from_peft(config, tree, mine)})}
        raise ModelError(f"a {config.get('peft_type')} adapter of these modules is none of the streams "
                         f"{', '.join(self.made)}")


def spaces_of(of: Any) -> dict[str, Space]:
    """The spaces that a recipe's `of` describes."""
    if not isinstance(of, Mapping) or len(of) < 2:
        raise RecipeError(f"Streams.of = {of!r} is not allowed; it must map two names or more to spaces, as in "
                          "{sigma: full, tau: {name: lora, rank: 4}}")
    made: dict[str, Space] = {}
    for stream, said in of.items():
        spec = {"name": said} if isinstance(said, str) else dict(said) if isinstance(said, Mapping) else {}
        if not isinstance(stream, str) or not stream.isidentifier() or not isinstance(spec.get("name"), str):
            raise RecipeError(f"Streams.of.{stream} = {said!r} is not allowed; it must be a name without blanks and a "
                              "space: its name, or {name: ..., knobs}")
        kind = SPACES.find(spec.pop("name"), "space.name")
        if issubclass(kind, Streams):
            raise RecipeError(f"Streams.of.{stream}: streams do not hold streams; list its parts here")
        if made and "modules_to_save" in kind.knobs():
            spec.setdefault("modules_to_save", ())
        made[stream] = kind.make({k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()}, f"of.{stream}")
    return made


def forwards(net: nn.Module) -> dict[str, Any]:
    """By path, what has been put in the place of a module's own forward."""
    return {path: module.__dict__.get("forward") for path, module in net.named_modules()}
