"""Nothing that a method trains escapes the count: every method of the registry, found by itself, tokens and seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedllm.core.ask import on_client
from fedllm.core.client import Fleet
from fedllm.core.errors import QuorumError
from fedllm.core.layer import Layer
from fedllm.core.method import Method, Star
from fedllm.core.payload import pack, part
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.engines import InProcess
from fedllm.engines.carry import RUNNERS
from fedllm.local.flops import Work, steps_of, work_of
from fedllm.local.requests import Booked
from fedllm.methods.registry import METHODS, method_class
from fedllm.models import segments
from fedllm.models.model import Model
from fedllm.wire.edge_energy import EdgeEnergy
from tests.methods.conftest import begin, tried

TRAINS = [name for name in METHODS if method_class(name).round is not Method.round
          and not method_class(name).trial.apart and not getattr(method_class(name), "answer", None)]


def suited(name):
    """The world that the method is tried in, with declared time."""
    run = begin(name, engine="in_process", dtype=torch.float32, sizes=(4, 5, 6), **tried(name))
    profiles = {c.id: c.profile for c in run.world.infos()}
    return run.method, replace(run.world, profiles=profiles, fleet=Fleet()), run.state


@pytest.fixture
def watched(monkeypatch):
    """What gradient or forward of a model ran outside of requests, and how often work was booked."""
    seen = {"depth": 0, "alone": [], "booked": 0}

    def running(kind, run):
        def inner(lot, limits):
            seen["depth"] += 1
            seen["booked"] += kind is Booked
            try:
                return run(lot, limits)
            finally:
                seen["depth"] -= 1
        return inner

    def noted(name, call):
        def inner(*args, **options):
            if not seen["depth"]:
                seen["alone"].append(name)
            return call(*args, **options)
        return inner

    # whether a model can be cut is an examination, made once, and no client's work
    monkeypatch.setattr(segments, "_check", running(None, segments._check))
    for kind, run in list(RUNNERS.items()):
        monkeypatch.setitem(RUNNERS, kind, running(kind, run))
    monkeypatch.setattr(torch.Tensor, "backward", noted("backward", torch.Tensor.backward))
    monkeypatch.setattr(torch.autograd, "grad", noted("grad", torch.autograd.grad))
    monkeypatch.setattr(Model, "using", noted("using", Model.using))
    return seen


class Tally(Layer):
    """Sums what clients ask for, of those too that keep their answers to themselves."""

    def __init__(self):
        self.done, self.steps = Work(), 0.0

    def client(self, fn, msg, client, call):
        def watch(request):
            self.done, self.steps = self.done + work_of(request), self.steps + steps_of(request, 2)
            return request

        with client.through(watch):
            return call(msg)


def one_round(method, made, state):
    """Tokens, joules and virtual seconds of a round."""
    meter, tally = EdgeEnergy(), Tally()
    engine, states = InProcess((method, meter, tally), made), [meter.init(), {}]
    engine.begin(0)
    try:
        drive(method.round(state, made.infos()), engine, (meter, tally), states)
    except QuorumError:  # nobody has an answer worth sending (no text that is any good): the work was done all the same
        return tally.done.tokens, tally.done.flops, tally.steps
    return states[0]["round"]["tokens"], states[0]["round"]["client_joules"], engine.clock.now


@pytest.mark.parametrize("name", TRAINS)
def test_a_round_takes_tokens_time_and_energy(name, watched):
    method, made, state = suited(name)
    for c in made.federation.clients:  # what a row says to a body that rests is found when it is read, once
        made.encoded(c, "train")
    watched["alone"].clear()
    tokens, joules, seconds = one_round(method, made, state)
    assert tokens > 0 and joules > 0 and seconds > 0
    assert not watched["alone"] or watched["booked"], f"{name} computes on its own and books nothing: client.book"


class OnItsOwn(Star):
    """Descends by itself and says nothing: what the test above is there to find."""

    books = False

    @on_client(reduce=Mean())
    def local(self, msg, client):
        theta = {n: t.clone().requires_grad_() for n, t in part(msg, "theta").items()}
        if self.books:
            client.book(tokens=7, steps=3, flops=1e9)
        sum(t.pow(2).sum() for t in theta.values()).backward()
        return pack(theta={n: t.detach() - t.grad for n, t in theta.items()}, n=client.n)

    def merge(self, state, out):
        return {**state, "theta": part(out.value, "theta")}


@pytest.mark.parametrize("books", [False, True])
def test_who_computes_alone_is_found_and_what_is_booked_counts(books, watched):
    method, made = OnItsOwn(), suited("fedavg")[1]
    object.__setattr__(method, "books", books)
    state = method.init(made.model)
    watched["alone"].clear()
    tokens, _, seconds = one_round(method, made, state)
    assert watched["alone"] == ["backward"] * 3 and bool(watched["booked"]) is books
    assert (tokens, seconds) == ((21, 3.0) if books else (0, 0.0))
