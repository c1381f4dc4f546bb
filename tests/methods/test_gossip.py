"""Gossip: equal to FedAvg where everybody hears everybody, conservative where not, and closed to the relay."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fedllm.core.errors import CompositionError, PayloadError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.payload import leaves
from fedllm.core.program import drive
from fedllm.engines import InProcess
from fedllm.methods._graphs import graph_of, metropolis, need_connected, spectral_gap
from fedllm.methods.registry import make_method
from fedllm.wire import codec
from fedllm.wire._keys import make_identity
from fedllm.wire._letters import KEY
from fedllm.wire.codec_quant import CodecQuant

IDS = [f"c{i}" for i in range(12)]


@pytest.mark.parametrize("kind", ["ring", "torus", "exponential", "random", "complete"])
@pytest.mark.parametrize("n", [4, 6, 12])
def test_graphs_are_connected_and_their_weights_doubly_stochastic(kind, n):
    near = graph_of(kind, IDS[:n], 4, 0, 1)
    need_connected(IDS[:n], [(a, b) for a, others in near.items() for b in others])
    w = metropolis(near)
    for a, others in near.items():
        assert a not in others and sum(w[a].values()) < 1
        assert all(w[a][b] == w[b][a] for b in others)
    assert 0 < spectral_gap(near) <= 1 + 1e-12


def test_degrees_and_gaps_are_those_of_the_books():
    near = {kind: graph_of(kind, [str(i) for i in range(16)]) for kind in ("ring", "torus", "exponential", "complete")}
    assert {k: {len(v) for v in g.values()} for k, g in near.items()} == {
        "ring": {2}, "torus": {4}, "exponential": {7}, "complete": {15}}
    gaps = {k: spectral_gap(g) for k, g in near.items()}
    assert gaps["ring"] < gaps["torus"] < gaps["exponential"] < gaps["complete"] == pytest.approx(1)
    assert gaps["ring"] == pytest.approx(2 / 3 * (1 - torch.cos(torch.tensor(2 * torch.pi / 16)).item()), abs=1e-6)


@pytest.mark.parametrize("make, says", [
    (lambda: graph_of("torus", IDS[:7]), r"a round has 7; 4 or 6 or 8 or 9 clients make one, or use 'ring'"),
    (lambda: graph_of("star", IDS), "method.graph = 'star' is not allowed"),
    (lambda: need_connected(IDS[:4], [("c0", "c1"), ("c2", "c3")]), r"to 2 parts .*c0, c1 \| c2, c3"),
    (lambda: need_connected(IDS[:4], [("c0", "c9")]), "'c9' is no client"),
    (lambda: need_connected(IDS[:4], [("c0",)]), "an edge is a pair"),
    (lambda: make_method("gossip", degree=1), "degree = 1 is not allowed"),
])
def test_graphs_that_cannot_be(make, says):
    with pytest.raises(RecipeError, match=says):
        make()


def test_what_does_not_fit_is_refused_before_the_run():
    with pytest.raises(CompositionError, match="a round of one client"):
        make_method("gossip").check_clients(IDS, 1)
    with pytest.raises(CompositionError, match="no layer can read sealed letters"):
        make_method("gossip").check_layers([CodecQuant()])


def test_where_all_hear_all_it_is_fedavg(begin, gap):
    ours = begin("gossip", graph="complete").go(3)
    theirs = begin("fedavg", weighting="uniform").go(3)
    for memory in ours.engine.memory.values():
        assert gap(memory["theta"], theirs.state["theta"]) < 1e-12


@pytest.mark.parametrize("knobs", [{}, {"tracking": True}, {"graph": "random", "degree": 2}], ids=str)
def test_engines_agree(begin, gap, knobs):
    one, other = (begin("gossip", engine=e, **knobs).go(3) for e in ("in_process", "vectorized"))
    assert one.state == other.state == {"round": 3}
    for c in one.engine.memory:
        for name in one.engine.memory[c]:
            assert gap(one.engine.memory[c][name], other.engine.memory[c][name]) < 1e-10


class Lossless(Layer):
    def client(self, fn, msg, client, call):
        return codec.decode(codec.encode(call(codec.decode(codec.encode(msg)))))


def test_a_lossless_layer_changes_nothing(begin, gap):
    plain = begin("gossip", dtype=torch.float32).go(2)
    coded = begin("gossip", dtype=torch.float32, layers=(Lossless(),), loopback=True).go(2)
    for c, memory in plain.engine.memory.items():
        assert gap(memory["theta"], coded.engine.memory[c]["theta"]) == 0


def test_tracking_keeps_its_corrections_at_zero_in_sum(begin, gap):
    run = begin("gossip", tracking=True).go(3)
    c = [m["c"] for m in run.engine.memory.values()]
    total = {n: sum(t[n] for t in c) for n in c[0]}
    assert max(float(t.abs().max()) for t in c[0].values()) > 1e-3
    assert max(float(t.abs().max()) for t in total.values()) < 1e-12


def test_tracking_needs_plain_sgd(begin):
    with pytest.raises(CompositionError, match="plain SGD"):
        begin("gossip", tracking=True, local={"optimizer": "adamw"}).go(1)


def test_a_silent_neighbor_gives_its_weight_back(begin, gap):
    """The mean over those who answer is what it would be without any mixing: W stays doubly stochastic."""
    run, alone = begin("gossip"), begin("local_only")
    info = run.engine.infos["c1"]
    run.engine.infos["c1"] = dataclasses.replace(info, profile=dataclasses.replace(info.profile, availability=0.0))
    run.go(1), alone.go(1)
    assert set(run.engine.memory) == {"c0", "c2", "c3"}
    mean = lambda r: {n: sum(r.engine.memory[c]["theta"][n] for c in ("c0", "c2", "c3")) / 3  # noqa: E731
                      for n in r.engine.memory["c0"]["theta"]}
    assert gap(mean(run), mean(alone)) < 1e-12


class Relay(InProcess):
    """Keeps all that it relays, and changes one letter where it is told to."""

    seen: tuple = ()
    break_letter = False

    def work(self, job, submit):
        got = super().work(job, submit)
        self.seen = (*self.seen, got)
        if self.break_letter and job.client == "c1" and "letter" in got:
            got = {**got, "letter": got["letter"].clone()}
            got["letter"][100] ^= 1
        return got


def test_the_relay_reads_nothing(begin):
    run = begin("gossip", kind=Relay, dtype=torch.float32).go(1)
    sent = b"".join(bytes(codec.encode(r)) for r in run.engine.seen)
    halves = [t for m in begin("local_only", dtype=torch.float32).go(1).engine.memory.values()
              for _, t in leaves(m["theta"])]
    assert len(sent) > sum(t.numel() * t.element_size() for t in halves)
    assert all(t.numpy().tobytes()[:64] not in sent for t in halves if t.abs().sum())
    assert run.state == {"round": 1} and not any(KEY in m for m in run.engine.memory.values())


def test_a_letter_that_was_changed_counts_as_silence(begin, gap, caplog):
    run = begin("gossip", kind=Relay)
    run.engine.break_letter = True
    run.go(1)
    assert "client 'c0' cannot open the letter of 'c1': it was changed on its way" in caplog.text
    c0, alone = run.engine.memory["c0"]["theta"], begin("local_only").go(1).engine.memory
    want = {n: (2 * alone["c0"]["theta"][n] + alone["c3"]["theta"][n]) / 3 for n in c0}
    assert gap(c0, want) < 1e-12


def test_with_identities_a_relay_cannot_put_itself_between(begin, tmp_path, caplog):
    for c in ("c0", "c1", "c2", "c3"):
        make_identity(tmp_path, c)
    good = begin("gossip", keys=str(tmp_path)).go(1)
    assert not caplog.text
    (tmp_path / "c1.pub").write_text((tmp_path / "c2.pub").read_text())  # the key that comes is not c1's
    bad = begin("gossip", keys=str(tmp_path))
    with pytest.raises(PayloadError, match="refuses the key of 'c1'"):
        drive(bad.method.round(bad.state, bad.world.infos()), InProcess((bad.method,), bad.world))
    assert good.state["round"] == 1
