"""A tree of servers under any method whose replies are summed: edges add up their clients, the root adds up edges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedllm.core.ask import Replies
from fedllm.core.errors import CompositionError, QuorumError
from fedllm.core.layer import Algebra, Layer
from fedllm.core.payload import Payload
from fedllm.core.reduce import Lifted, Sum
from fedllm.core.sums import is_control, need_sums, refusal, without
from fedllm.core.tree import Branching, check_tree, climb
from fedllm.wire import codec

OWN = "server_tree/"


@dataclass(frozen=True)
class ServerTree(Branching, Layer):
    """Any Sum, added up along a tree; equal to the flat sum up to rounding, since a Sum is associative.

    Listed above secure aggregation each edge opens the sum of its own clients (three at least, each edge a session of
    its own); listed below it, masked replies are added on the way and only the root's sum can be opened. The layer's
    state counts bytes on the links between servers, `up` and `down`, and what the same answers would have been without
    a tree, `flat_up` and `flat_down`. All servers of the tree run at the coordinator here: it is the algebra and the
    traffic that are real, not the machines.
    """

    algebra = Algebra("tree", needs="sum", reveals="sum", instead="a method whose reducer is a Sum, such as fedavg")


    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        need_sums(self, method, reducers)

    def bind(self, facts: Any) -> ServerTree:
        if self.tree:
            check_tree(self.tree, list(facts.rows), "tree")
        return self

    def init(self) -> dict[str, Any]:
        return {"up": 0, "down": 0, "flat_up": 0, "flat_down": 0}

    def server(self, ask: Any, state: Any) -> Any:
        if is_control(ask):
            return (yield ask)
        if not isinstance(ask.reducer, Sum):
            raise CompositionError(refusal(self, ask.phase, ask.reducer))
        if ask.enough is not None or ask.flight is not None:
            raise CompositionError(f"server_tree and '{ask.phase}' do not fit together: it takes the first answers "
                                   "that come, and an edge does not know which these are; leave the tree out")
        own = ask.reducer == ask.fn.__dict__.get("reduce")
        form = ask.lifted() if own else ask.form
        reduce = Lifted() if own else ask.reducer  # a layer's own: lifted, masked or encrypted, and still a summand
        places = self.places(list(ask.msgs))
        outs = yield [replace(ask, msgs={c: {**ask.msgs[c], OWN + "lift": own} for c in mine}, reduce=reduce, quorum=0,
                              form=form)
                      for mine in places.values()]
        missing = {c: why for out in outs for c, why in out.missing.items()}
        outs = self._alike(outs, missing)
        answered = {c for out in outs for c in out.answered}
        if len(answered) < (needed := ask.needed()):
            why = "; ".join(f"{c}: {w}" for c, w in list(missing.items())[:5])
            raise QuorumError(f"{ask.phase}: {len(answered)} of {len(ask.msgs)} clients answered under the servers of "
                              f"the tree, {needed} needed ({why})")
        sums = {path: out.value for path, out in zip(places, outs, strict=True) if out.answered}
        total, sent = climb(sums, ask.reducer.plus, reduce.done)
        value = ask.reducer.done(total)
        self._count(ask, places, sent, len(answered), state)
        return Replies({}, value, tuple(c for c in ask.msgs if c in answered), missing,
                       {c: n for out in outs for c, n in out.notes.items()},
                       {c: s for out in outs for c, s in out.seconds.items()})

    @staticmethod
    def _alike(outs: Sequence[Replies], missing: dict[str, str]) -> list[Replies]:
        """The servers' sums, without those whose names or shapes are not those of most clients' sums."""
        signs = [None if out.value is None else frozenset(
            (k, str(tuple(v.shape)) if isinstance(v, Tensor) else "") for k, v in out.value.items()) for out in outs]
        votes: Counter[Any] = Counter()
        for sign, out in zip(signs, outs, strict=True):
            votes[sign] += len(out.answered)
        most = max(votes, key=lambda sign: votes[sign], default=None)
        missing |= {c: "reply refused: its names or shapes are not as in the other replies"
                    for sign, out in zip(signs, outs, strict=True) if sign != most for c in out.answered}
        return [out if sign == most else Replies() for sign, out in zip(signs, outs, strict=True)]

    def _count(self, ask: Any, places: Any, sent: Any, answered: int, state: Any) -> None:
        """A server hands one message to all its clients where all are told the same, and each its own where not."""
        first, *others = ask.msgs.values()
        same = all(o.keys() == first.keys() and all(o[k] is first[k] for k in o) for o in others)
        state["flat_up"] += answered * codec.size(next(iter(sent.values()), {}))
        state["flat_down"] += sum(map(codec.size, ask.msgs.values()))
        state["up"] += sum(map(codec.size, sent.values()))
        for path in {p[:k] for p in places for k in range(1, len(p) + 1)}:
            below = [c for p, mine in places.items() if p[: len(path)] == path for c in mine]
            state["down"] += codec.size(first) if same else sum(codec.size(ask.msgs[c]) for c in below)

    def client(self, fn: Any, msg: Payload, client: Any, call: Any) -> Payload:
        if OWN + "lift" not in msg:
            return call(msg)
        reply = call(without(msg, OWN))
        if not msg[OWN + "lift"]:
            return reply
        notes = {k: v for k, v in reply.items() if k.startswith("note/")}
        return {**fn.__dict__["reduce"].lift(without(reply, "note/")), **notes}
