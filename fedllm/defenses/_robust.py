"""What robust rules share: each client's contribution as one row of a matrix, and what a rule makes of the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, Replies
from fedllm.core.errors import CompositionError, FedLLMError, QuorumError, RecipeError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Facts, Layer, name_of
from fedllm.core.payload import Payload, Tree, alike
from fedllm.core.reduce import Mean, Sum, wide


@dataclass(frozen=True)
class Every:
    """Keeps all replies in the order of the ask, under `replies`; the server then holds them all."""

    ragged: ClassVar[bool] = False

    def zero(self) -> list[Payload]:
        return []

    def add(self, acc: list[Payload], reply: Payload) -> list[Payload]:
        return [*acc, reply]

    def done(self, acc: list[Payload]) -> Payload:
        return {"replies": acc}


@dataclass(frozen=True)
class Rows:
    """What each client adds to the method's sum at weight 1, whatever number of rows it declares.

    For a Mean of weights that all were told alike it is their change; for FlexLoRA's products the products.
    """

    clients: list[str]
    x: Tensor  # [K, d], fp32 or wider
    form: list[tuple[str, tuple[int, ...]]]
    numbers: dict[str, list[float]]
    """Everything that is no tensor, such as the training loss; the result has its median."""
    common: Tree
    refused: dict[str, str]

    @classmethod
    def of(cls, ask: Ask, out: Replies) -> Rows:
        """From replies that were kept one by one; those unlike the most of them are refused."""
        lifted, refused = _lifted(ask.reducer, out)
        common = alike(ask.msgs) if isinstance(ask.reducer, Mean) else {}
        if not lifted:
            raise QuorumError(f"{ask.phase}: no reply can be used ({'; '.join(refused.values()) or 'nobody answered'})")
        form = [(k, tuple(v.shape)) for k, v in next(iter(lifted.values())).items() if isinstance(v, Tensor)]
        named = {k for k, _ in form}

        def row(reply: Payload) -> Tensor:
            change = (wide(reply[k]) - wide(common[k]) if k in common else wide(reply[k]) for k, _ in form)
            return torch.cat([c.reshape(-1).float() if not c.is_floating_point() else c.reshape(-1) for c in change])

        numbers = {k: [float(r[k]) for r in lifted.values()] for k in next(iter(lifted.values()))
                   if k not in named and k != "n"}
        return cls(list(lifted), torch.stack([row(r) for r in lifted.values()]), form, numbers, common, refused)

    def like(self, tree: Tree, layer: Layer) -> Tensor:
        """A tree of trainables as one row [d]; refuses a method whose replies hold anything else."""
        parts = []
        for key, shape in self.form:
            name = key.partition("/")[2]
            if name not in tree or tuple(tree[name].shape) != shape:
                raise CompositionError(f"layer '{name_of(layer)}' compares replies with the trainables told, and this "
                                       f"method sends '{key}', which is none of them; use fedavg")
            parts.append(tree[name].reshape(-1).to(self.x.dtype))
        return torch.cat(parts)

    def value(self, reducer: Sum, g: Tensor) -> Payload:
        """What the method's reducer makes of one contribution `g` [d] in the place of the mean of all."""
        total: dict[str, Any] = {"n": 1.0} | {k: _middle(v) for k, v in self.numbers.items()}
        at = 0
        for key, shape in self.form:
            size = int(torch.Size(shape).numel())
            total[key] = g[at : at + size].reshape(shape)
            at += size
        value = {k: v + wide(self.common[k]) if k in self.common else v for k, v in reducer.done(total).items()}
        return value | {"n": float(len(self.clients))}


def _lifted(reducer: Any, out: Replies) -> tuple[dict[str, Payload], dict[str, str]]:
    """Each reply lifted at weight 1, and why others cannot be used."""
    lifted: dict[str, Payload] = {}
    refused: dict[str, str] = {}
    replies = out.value["replies"] if out.value else []
    for client, reply in zip(out.answered, replies, strict=True):
        try:
            lifted[client] = reducer.lift({**reply, "n": 1} if "n" in reply else reply)
        except (FedLLMError, KeyError, TypeError, ValueError, RuntimeError) as error:
            refused[client] = f"reply refused: {type(error).__name__} {error}"
    shapes = {c: tuple((k, tuple(v.shape) if isinstance(v, Tensor) else None) for k, v in sorted(r.items()))
              for c, r in lifted.items()}
    usual = Counter(shapes.values()).most_common(1)[0][0] if shapes else ()
    for client in [c for c, s in shapes.items() if s != usual]:
        refused[client] = "reply refused: its names or shapes are not those of most replies"
        del lifted[client]
    return lifted, refused


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


@dataclass(frozen=True)
class Verdict:
    """What the server goes on with, and what each client's part in it is."""

    g: Tensor  # [d]
    weights: Tensor | None = None  # [K]; None: the rule looks at no client as a whole


class Robust(Knobs, Layer, ABC):
    """A rule that sees every reply by itself and gives the method one contribution in the place of their mean.

    Works over any method that folds by a Sum (each reply is lifted at weight 1: declared numbers of rows are a way to
    attack). Who was cast out, and how often, is in its state: `seen` and `out`, by client.
    """

    algebra = Algebra("robust", needs="set")
    flags: ClassVar[float] = 0.0
    """A client whose weight is at most this counts as cast out."""
    names_clients: ClassVar[bool] = False
    """Whether the rule may cast out single clients."""
    fewest: ClassVar[int] = 3
    """Replies among which one that is wrong can be told from the others, or outvoted by them."""

    def short(self, n: int) -> tuple[str, str] | None:
        """(the knob that is at fault, with its value; what would do) where the rule defends nothing over n replies."""
        return self.below(n, self.fewest, f"name = '{name_of(self)}'", "")

    def below(self, n: int, least: int, knob: str, otherwise: str) -> tuple[str, str] | None:
        """What `short` says of a rule that needs so many; `otherwise` is another way out."""
        return (knob, f"{name_of(self)} needs n >= {least}{otherwise and f', or {otherwise}'}") if n < least else None

    def bind(self, facts: Facts) -> Robust:
        return self.enough(facts)

    def enough(self, facts: Facts) -> Robust:
        """This rule, or a RecipeError where so few clients are asked that it would defend nothing."""
        n = asked(facts)
        if short := self.short(n):
            raise RecipeError(f"{type(self).__name__}.{short[0]} is not allowed with n = {n} client{'s' * (n != 1)} a "
                              f"round: {short[1]}")
        return self

    @abstractmethod
    def rule(self, rows: Rows, state: MutableMapping[str, Any]) -> Verdict:
        """The contribution that stands for all rows."""

    def decide(self, ask: Ask, rows: Rows, state: MutableMapping[str, Any]) -> Program:
        """A program around `rule`, for rules that ask for more than the replies."""
        yield from ()
        return self.rule(rows, state)

    def init(self) -> dict[str, Any]:
        return {"seen": {}, "out": {}}

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        mine = f"layer '{name_of(self)}' weighs contributions to a sum"
        for name, reducer in reducers.items():
            if name != "score" and not isinstance(reducer, Sum):
                how = "keeps replies one by one" if reducer is None else f"folds by {type(reducer).__name__}"
                raise CompositionError(f"{mine} and '{type(method).__name__}.{name}' {how}, so they do not fit "
                                       "together; a method whose reducer is a Sum works, such as fedavg")

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        if isinstance(ask.owner, Layer) or not isinstance(ask.reducer, Sum):
            return (yield ask)
        out = yield replace(ask, reduce=Every())
        rows = Rows.of(ask, out)
        n = len(rows.clients)
        if short := self.short(n):  # a round with too few is refused, and nothing is lowered in silence
            raise QuorumError(f"{ask.phase}: n = {n} repl{'ies are' if n != 1 else 'y is'} too few with {short[0]}: "
                              f"{short[1]}")
        verdict = yield from self.decide(ask, rows, state)
        for i, client in enumerate(rows.clients):
            state["seen"][client] = state["seen"].get(client, 0) + 1
            if verdict.weights is not None and float(verdict.weights[i]) <= self.flags:
                state["out"][client] = state["out"].get(client, 0) + 1
        return replace(out, value=rows.value(ask.reducer, verdict.g), answered=tuple(rows.clients),
                       missing={**out.missing, **rows.refused})


@dataclass(frozen=True)
class Tolerant(Robust, ABC):
    """A rule that is told how many clients may be malicious, and that holds for n >= a f + b alone."""

    needs: ClassVar[tuple[int, int]] = (2, 1)

    f: int | None = knob(None, "malicious clients a round that it must stand; None: a fifth of those asked, or as many "
                               "as it can, and one at least", ge=0)

    def bind(self, facts: Facts) -> Robust:
        return replace(self.enough(facts), f=self.faults(asked(facts)))  # type: ignore[type-var]

    def faults(self, n: int) -> int:
        """f, for n clients."""
        a, b = self.needs
        return max(1, min(n // 5, (n - b) // a)) if self.f is None else self.f

    def short(self, n: int) -> tuple[str, str] | None:
        (a, b), f = self.needs, self.faults(n)
        why = f"{name_of(self)} needs n >= {a}f + {b} = {a * f + b}"
        return (f"f = {f}", why) if n < a * f + b else None


def asked(facts: Facts) -> int:
    """Clients asked in a round."""
    return min(facts.cohort or len(facts.rows), len(facts.rows))


def distances(x: Tensor) -> Tensor:
    """Squared distances [K, K] of the rows of x [K, d], in fp64, from differences: products would drown them."""
    return torch.stack([(x - row).double().pow(2).sum(1) for row in x])
