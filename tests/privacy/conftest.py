"""A loop engine with drop-outs and a transcript, and a tiny federation on a real model."""

from types import SimpleNamespace

import pytest
import torch

from fedllm.core.program import Fold, serve


class Loop:
    """The smallest engine. `silent` maps a phase's end (or "") to clients that do not answer it; `seen` is all that
    the server received, `spoil` may change a reply before it arrives."""

    def __init__(self, stack, clients, silent=None, spoil=None):
        self.stack, self.clients, self.silent, self.spoil = tuple(stack), clients, silent or {}, spoil
        self.seen, self.told = [], []

    def send(self, asks):
        folds = [Fold(ask) for ask in asks]
        for fold in folds:
            name = fold.ask.phase.rpartition(".")[-1]
            gone = {*self.silent.get(name, ()), *self.silent.get("", ())}
            for cid, msg in fold.ask.msgs.items():
                self.told.append((fold.ask.phase, cid, msg))
                if cid in gone:
                    fold.miss(cid, "silent")
                    continue
                reply = serve(self.stack, fold.ask.phase, msg, self.clients[cid])
                reply = self.spoil(fold.ask.phase, cid, reply) if self.spoil else reply
                self.seen.append((fold.ask.phase, cid, reply))
                fold.take(cid, reply)
        return [fold.done() for fold in folds]


@pytest.fixture
def loop():
    return Loop


@pytest.fixture
def people():
    def make(count, size=40, seed=0):
        g = torch.Generator().manual_seed(seed)
        return {f"c{i:02}": SimpleNamespace(id=f"c{i:02}", x=torch.randn(size, generator=g), n=i + 1, memory={},
                                            spend=lambda release, count=1: None,
                                            round=0) for i in range(count)}

    return make


@pytest.fixture(scope="session")
def tiny(tiny_llama_folder):
    """Make (engine, method, state, world) of a federation of `k` clients on the tiny Llama."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedllm.core.client import Profile
    from fedllm.data.federation import Federation, Shard
    from fedllm.engines import InProcess, Vectorized
    from fedllm.engines.world import World
    from fedllm.local.spec import LocalSpec
    from fedllm.methods.registry import make_method
    from fedllm.models.model import Model
    from fedllm.spaces import make_space
    from tests.conftest import PLACE

    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "say", "the", "word"]

    def row(k, i):
        text = [words[(7 * i + 3 * k + j * (i + 1)) % len(words)] for j in range(3 + (5 * i + k) % 9)]
        return {"prompt": " ".join(text), "response": " ".join(text[:2])}

    def make(method="fedavg", layers=(), k=5, engine="vectorized", space="lora", ranks=(), dtype=torch.float32,
             spec=None, knobs=None, loopback=False, **space_knobs):
        net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=dtype).to(PLACE)
        space_knobs = {"rank": 4, **space_knobs} if space == "lora" else space_knobs
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
        model = Model(net, tokenizer, "generation", make_space(space, **space_knobs))
        shards = {f"c{i}": Shard([row(i, j) for j in range(6 + i)], [row(i, 50)]) for i in range(k)}
        profiles = {f"c{i}": Profile(rank=r) for i, r in enumerate(ranks)}
        world = World(model, Federation(shards, [row(9, 1)], "generation"),
                      spec or LocalSpec(optimizer="sgd", lr=0.1, steps=2, batch_size=3), profiles=profiles)
        m = make_method(method, **(knobs or {}))
        kind = {"vectorized": Vectorized, "in_process": InProcess}[engine]
        return kind((m, *layers), world, loopback=loopback), m, m.init(model), world

    return make
