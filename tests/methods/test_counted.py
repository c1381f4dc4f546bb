"""Nothing that a method trains escapes the count: every method of the registry, found by itself, tokens and seconds."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm.core.ask import on_client
from fedllm.core.client import Fleet, Profile
from fedllm.core.errors import FedLLMError, QuorumError
from fedllm.core.layer import Layer
from fedllm.core.method import Method, Star
from fedllm.core.payload import pack, part
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess
from fedllm.engines.client import RUNNERS
from fedllm.engines.world import World
from fedllm.local.flops import Work, steps_of, work_of
from fedllm.local.requests import Booked
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import method_class, modules
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space
from fedllm.spaces.registry import SPACES
from fedllm.wire.edge_energy import EdgeEnergy
from tests.methods.conftest import KINDS, WORDS, tokenizer

TRAINS = [name for name in modules() if method_class(name).round is not Method.round
          and not getattr(method_class(name), "answer", None)]
FIRST = {"lora": {"rank": 2, "scaling": "shared"}, "soft_prompt": {"length": 2}, "full": {}}


@functools.cache
def network(task):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
                                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128))
        return net if task == "generation" else HeadedEncoder(net.model, len(KINDS), "mean")


def world(task, space, knobs):
    """Rows that suit any task: text and label, or a prompt with a response and one that was rejected."""
    rnd = random.Random(0)

    def rows(n):
        said = [[" ".join(rnd.choices(WORDS, k=rnd.randint(2, 5))) for _ in range(3)] for _ in range(n)]
        return [{"prompt": a, "response": b, "rejected": c, "category": rnd.choice(KINDS)} if task == "generation"
                else {"text": a, "label": i % 3, "category": rnd.choice(KINDS)} for i, (a, b, c) in enumerate(said)]

    fed = Federation({f"c{i}": Shard(rows(4 + i), rows(2)) for i in range(3)}, rows(2), task,
                     () if task == "generation" else KINDS, rows(4))
    model = Model(copy.deepcopy(network(task)), tokenizer(), task, make_space(space, **knobs), labels=fed.labels)
    spec = LocalSpec(optimizer="sgd", lr=0.01, steps=2, batch_size=2, max_length=48)
    return World(model, fed, spec, profiles={c: Profile() for c in fed.clients}, exact_match=False, fleet=Fleet())


def small(name):
    """The method with fewer of whatever it counts: as it is, and on a small budget of time."""
    cls = method_class(name)
    few = {k: max(meta["ge"] or 1, 4) for k, meta in cls.knobs().items()
           if isinstance(meta["default"], int) and not isinstance(meta["default"], bool) and meta["default"] > 8
           and meta["ge"] is not None}
    return cls(**few)


def suited(name):
    """The first of all worlds that the method takes."""
    method, why = small(name), []
    for task in ("generation", "classification"):
        for space, knobs in (FIRST | {s: {} for s in SPACES if s not in FIRST}).items():
            try:
                made = world(task, space, knobs)
                method.check(made.model)
                return method, made, method.init(made.model)
            except (FedLLMError, TypeError) as error:
                why.append(str(error))
    raise AssertionError(f"no world suits {name}: {why}")


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
    method, made = OnItsOwn(), world("generation", "lora", FIRST["lora"])
    object.__setattr__(method, "books", books)
    state = method.init(made.model)
    watched["alone"].clear()
    tokens, _, seconds = one_round(method, made, state)
    assert watched["alone"] == ["backward"] * 3 and bool(watched["booked"]) is books
    assert (tokens, seconds) == ((21, 3.0) if books else (0, 0.0))
