"""Programs, layers, reducers and folds, driven by an engine that lives in the test."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import PayloadError, QuorumError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.method import Knobs, knob
from fedllm.core.payload import digest, pack, part
from fedllm.core.program import Fold, drive, drive_all, serve
from fedllm.core.reduce import Mean, Sum
from fedllm.core.rng import numpy_stream, seed_of


class Loop:
    """The smallest engine: every client answers at once; `trips` counts the sends."""

    def __init__(self, stack, clients, silent=()):
        self.stack, self.clients, self.silent, self.trips = stack, clients, set(silent), 0

    def send(self, asks):
        self.trips += 1
        folds = [Fold(ask) for ask in asks]
        for fold in folds:
            for cid, msg in fold.ask.msgs.items():
                if cid in self.silent:
                    fold.miss(cid, "silent")
                else:
                    fold.take(cid, serve(self.stack, fold.ask.phase, msg, self.clients[cid]))
        return [fold.done() for fold in folds]


class Scale:
    """Asks every client for its number times a factor."""

    def round(self, state, clients):
        first = yield Ask(self.times, {c: pack(by=state) for c in clients})
        both = yield [Ask(self.times, {c: pack(by=2.0)}) for c in clients]
        return first.value["x"], [b.value["x"] for b in both]

    @on_client(reduce=Mean())
    def times(self, msg, client):
        return {"x": client.x * msg["by"], "n": client.n}

    def secret(self, msg, client):
        return {}


CLIENTS = {c: SimpleNamespace(id=c, x=torch.tensor([float(i)]), n=i + 1) for i, c in enumerate("abc")}


@dataclass(frozen=True)
class Double(Layer):
    """Doubles what goes down and counts asks in its state."""

    def init(self):
        return {"asks": 0}

    def server(self, ask, state):
        state["asks"] += 1
        return (yield replace(ask, msgs={c: {**m, "by": m["by"] * 2} for c, m in ask.msgs.items()}))


@dataclass(frozen=True)
class PlusOne(Layer):
    """Adds one to the reply on the client: shows the order in which layers are climbed."""

    def client(self, fn, msg, client, call):
        out = call(msg)
        return {**out, "x": out["x"] + 1}


@dataclass(frozen=True)
class TimesTen(Layer):
    def client(self, fn, msg, client, call):
        out = call(msg)
        return {**out, "x": out["x"] * 10}


def test_a_program_is_driven_to_its_end():
    method = Scale()
    mean, each = drive(method.round(3.0, "abc"), Loop((method,), CLIENTS))
    assert float(mean) == pytest.approx(3 * (0 * 1 + 1 * 2 + 2 * 3) / 6)
    assert [float(e) for e in each] == [0, 2, 4]


def test_layers_reach_every_ask_and_keep_their_state():
    method, layers, states = Scale(), (Double(),), [{"asks": 0}]
    mean, each = drive(method.round(3.0, "abc"), Loop((method, *layers), CLIENTS), layers, states)
    assert [float(e) for e in each] == [0, 4, 8] and float(mean) == pytest.approx(6 * 8 / 6)
    assert states[0]["asks"] == 4


@pytest.mark.parametrize("layers, want", [((PlusOne(), TimesTen()), 30.0), ((TimesTen(), PlusOne()), 21.0)])
def test_the_layer_listed_first_touches_the_reply_first(layers, want):
    stack = (Scale(), *layers)
    assert float(serve(stack, "Scale.times", pack(by=1.0), CLIENTS["c"])["x"]) == want


def test_many_programs_share_one_trip():
    method = Scale()
    engine = Loop((method,), CLIENTS)
    drive_all([method.round(1.0, "abc"), method.round(2.0, "abc")], engine, (), ())
    assert engine.trips == 2


@pytest.mark.parametrize("phase", ["Scale.secret", "Scale.__init__", "Other.times", "Scale", ""])
def test_only_client_functions_can_be_called(phase):
    with pytest.raises(PayloadError, match="is not a client function"):
        serve((Scale(),), phase, {}, CLIENTS["a"])


def fold(replies, reduce=None, quorum=1):
    f = Fold(Ask(Scale().times, {c: {} for c in "abcd"}, reduce=reduce), quorum)
    for cid, reply in replies.items():
        f.miss(cid, reply) if isinstance(reply, str) else f.take(cid, reply)
    return f.done()


def test_bad_replies_are_left_out_and_named():
    good = {"x": torch.ones(2), "n": 1}
    out = fold(
        {
            "a": good,
            "b": {"x": torch.tensor([1.0, float("nan")]), "n": 1},
            "c": {"x": torch.ones(3), "n": 1},
            "d": {"x": torch.ones(2)},
        }
    )
    assert out.answered == ("a",) and torch.equal(out.value["x"], torch.ones(2))
    assert "NaN" in out.missing["b"] and "'x'" in out.missing["b"]
    assert "(3,)" in out.missing["c"] and set(out.missing) == {"b", "c", "d"}


def test_quorum_counts_good_answers_and_says_who_is_missing():
    good = {"x": torch.ones(1), "n": 1}
    assert fold({"a": good, "b": good, "c": "gone", "d": "gone"}, quorum=0.5).answered == ("a", "b")
    with pytest.raises(QuorumError, match=r"2 of 4 clients answered, 3 needed \(c: gone"):
        fold({"a": good, "b": good, "c": "gone", "d": "gone"}, quorum=3)


def test_mean_is_weighted_keeps_its_inputs_and_widens_halves():
    a, b = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 4.0, dtype=torch.bfloat16)
    out = fold({"a": {"x": a, "n": 1, "loss": 1.0}, "b": {"x": b, "n": 2, "loss": 4.0}}, Mean())
    assert torch.allclose(out.value["x"], torch.full((4,), 3.0)) and out.value["x"].dtype == torch.float32
    assert out.value["loss"] == pytest.approx(3.0) and out.value["n"] == 3
    assert torch.equal(a, torch.ones(4, dtype=torch.bfloat16))


def test_mean_equals_the_sum_of_its_lifts():
    replies = [{"x": torch.randn(5), "n": n, "loss": 0.1 * n} for n in (1, 5, 2)]
    mean = Mean()
    acc = mean.zero()
    for r in replies:
        acc = mean.add(acc, r)
    total = {}
    for r in replies:
        total = Sum.plus(mean, total, mean.lift(r))
    a, b = mean.done(acc), mean.done(total)
    assert torch.allclose(a["x"], b["x"], atol=1e-6) and a["loss"] == pytest.approx(b["loss"])


def test_mean_of_nothing_is_refused():
    with pytest.raises(PayloadError, match="add up to 0"):
        fold({"a": {"x": torch.ones(1), "n": 0}}, Mean())


def test_pack_and_part():
    payload = pack(theta={"a.b": torch.ones(1)}, c={"a.b": torch.zeros(1)}, n=3, base=None)
    assert set(payload) == {"theta/a.b", "c/a.b", "n"} and set(part(payload, "c")) == {"a.b"}


def test_digest_sees_values_names_shapes_and_types():
    base = {"t": {"a": torch.ones(2, 3)}, "k": 1}
    other = [
        {"t": {"a": torch.ones(3, 2)}, "k": 1},
        {"t": {"b": torch.ones(2, 3)}, "k": 1},
        {"t": {"a": torch.ones(2, 3)}, "k": 2},
        {"t": {"a": torch.ones(2, 3).double()}, "k": 1},
    ]
    assert digest(base) == digest({"k": 1, "t": {"a": torch.ones(2, 3)}})
    assert len({digest(base), *map(digest, other)}) == 5


def test_streams_depend_on_their_whole_key():
    keys = [(0, 1, "a", "fit"), (0, 1, "a", "dp"), (0, 2, "a", "fit"), (1, 1, "a", "fit"), (0, 11, "", "afit")]
    assert len({seed_of(*k) for k in keys}) == len(keys)
    assert numpy_stream(*keys[0]).random() == numpy_stream(*keys[0]).random()


@dataclass(frozen=True)
class Some(Knobs):
    rank: int = knob(4, "rank", ge=1)
    mode: str = knob("a", "mode", options=("a", "b"))
    mu: float | None = knob(None, "mu", gt=0)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"rank": 0}, r"rank = 0 .* >= 1"),
        ({"rank": True}, "rank = True"),
        ({"rank": 2.5}, "rank = 2.5"),
        ({"mode": "c"}, r"mode = 'c' .*\['a', 'b'\]"),
        ({"mu": -1.0}, "mu = -1.0 .* > 0"),
        ({"mu": "x"}, "mu = 'x'"),
        ({"rnak": 3}, r"method.rnak: unknown key; did you mean 'rank'\?"),
        ({"mu": float("nan")}, "mu = nan"),
    ],
)
def test_knobs_name_the_key_the_value_and_what_is_allowed(values, says):
    with pytest.raises(RecipeError, match=says):
        Some.make(values, "method")
