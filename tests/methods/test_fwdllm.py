"""FwdLLM: the estimate against the gradient, the pacing, the directions that both sides make, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from evidence.rigs.trials import Trial
from evidence.rigs.zeroth import softmax_world
from fedllm.core.errors import QuorumError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.rng import seed_of
from fedllm.engines.client import ClientCall
from fedllm.local.perturb import Directions, Halves, flat
from fedllm.methods.efficiency.fwdllm import directions
from fedllm.methods.registry import make_method

ONE = {"most": 0, "threshold": 1e9}


class Tape(Layer):
    """Keeps what each client was told and said."""

    def __init__(self):
        self.heard = []

    def client(self, fn, msg, client, call):
        said = call(msg)
        self.heard.append((client.id, msg, said))
        return said


def gradient(world, client="client-0"):
    """Of the softmax model's mean loss on the first batch, by hand at w = 0: mean over rows of (1/16 - onehot) x^T."""
    rows = world.encoded(client, "train")[: world.local.batch_size]
    x = world.model.net.x[torch.tensor([int(e.ids[0]) for e in rows])]
    off = torch.full((len(rows), 16), 1 / 16)
    off[torch.arange(len(rows)), torch.tensor([e.labels for e in rows])] -= 1
    return (off.T @ x / len(rows)).flatten()


def off_by(h, seed=0):
    """How far a client's scalars are from the gradient along its directions, relative."""
    world, tape = softmax_world(seed, clients=1), Tape()
    run = Trial("fwdllm", world, {**ONE, "perturbations": 32, "h": h}, layers=(tape,))
    like = run.state["theta"]
    [(_, msg, said)] = (run.rounds(1), tape.heard)[1]
    exact = torch.stack(directions("gaussian", msg["seed"], 32, 1, None, like)) @ gradient(world)
    return float((said["jvp"] - exact).norm() / exact.norm())


def test_a_scalar_is_the_gradient_along_its_direction():
    """(L(w + h v) - L(w - h v)) / 2h is off by O(h^2): within 2 % at h = 0.01, and far more at 0.1."""
    assert off_by(0.01) <= 0.02
    assert off_by(0.1) > 20 * off_by(0.01)


@pytest.mark.parametrize("count", [64, 512])
def test_the_cosine_grows_with_the_share_of_directions(count):
    """cos(g, gradient) = sqrt(n / (n + d + 1)) for n perturbations of d = 256 numbers, to 0.04 in the mean of four."""
    cosines = []
    for seed in range(4):
        world = softmax_world(seed, clients=1)
        run = Trial("fwdllm", world, {**ONE, "perturbations": count}).rounds(1)
        cosines.append(float(torch.cosine_similarity(run.state["gradient"], gradient(world), 0)))
    assert sum(cosines) / 4 == pytest.approx(math.sqrt(count / (count + 257)), abs=0.04)


def test_directions_near_the_last_gradient_turn_the_estimate_and_do_not_lengthen_it():
    """On a linear loss, with a last gradient of cosine 0.7: a cosine 15 % higher, the component along it unchanged."""
    torch.manual_seed(0)
    like = {"a": torch.zeros(20, 10), "b": torch.zeros(300)}
    g = torch.randn(500)
    last = g / g.norm() + torch.nn.functional.normalize(torch.randn(500), dim=0)
    made = {}
    for candidates in (1, 10):
        vs = torch.stack(directions("gaussian", 3, 100, candidates, last, like))
        made[candidates] = (vs * (vs @ g)[:, None]).mean(0)
    cosine = {k: float(torch.cosine_similarity(m, g, 0)) for k, m in made.items()}
    assert cosine[10] > 1.15 * cosine[1]
    assert 0.6 < float(made[10] @ g / (g @ g)) < 1.5
    first = Directions(3, 500)
    same = directions("gaussian", 3, 4, 10, torch.zeros(500), like)  # no last gradient: the first ones drawn
    assert all(torch.equal(v, first.direction(j)) for j, v in enumerate(same))


def paced(world, **knobs):
    """A round under a tape: the run, and the halves' disagreement after each visit, worked out anew."""
    tape = Tape()
    run = Trial("fwdllm", world, {"perturbations": 8, **knobs}, layers=(tape,))
    like, place = run.state["theta"], {c.id: i for i, c in enumerate(world.infos())}
    run.rounds(1)
    size, seen, pool, by_client = len(place), [], Halves(len(flat(like))), Halves(len(flat(like)))
    for visit in range(len(tape.heard) // size):
        for c, msg, said in sorted(tape.heard[visit * size :][:size], key=lambda x: place[x[0]]):
            assert msg["seed"] == seed_of("fwdllm", 0, visit, c) and msg["at"] == 0
            vs = directions("gaussian", msg["seed"], 8, 1, None, like)
            for i, (v, g) in enumerate(zip(vs, said["jvp"].tolist(), strict=True)):
                pool.add(g * v, said["n"], place[c] + visit * 8 + i)
                by_client.add(g * v, said["n"], place[c])
        seen.append(pool.disagreement("relative"))
    assert torch.equal(pool.mean(), run.state["gradient"])
    return run, seen, by_client.disagreement("relative")


def test_more_is_asked_until_the_halves_agree(caplog):
    """Label-skewed clients: where halves of the same ones agree, halves of different ones do not by far."""
    world = softmax_world(1, alpha=0.3)
    run, seen, by_client = paced(world, threshold=1.2, most=60)
    assert 2 < len(seen) < 60 and run.state["forced"] == 0
    assert min(seen[:-1]) > 1.2 >= seen[-1] and by_client > 1.25 * 1.2
    assert run.state["asked"] == [len(seen) * 4 * 8] and run.method.report(run.state)["forced"] == 0
    assert len(paced(world, threshold=1e9)[1]) == 1
    assert not caplog.records


def test_a_step_above_the_threshold_is_committed_at_last_and_said(caplog):
    run, seen, _ = paced(softmax_world(1), threshold=1e-6, most=2)
    assert len(seen) == 3 and min(seen) > 1e-6 and run.state["forced"] == 1
    assert "above 1e-06 after asking 3 times" in caplog.text
    moved = flat(run.state["theta"])  # from 0, by -lr g
    assert torch.equal(moved, -0.01 * run.state["gradient"])


def test_halves_measure_what_the_directions_do():
    """a and b are the weighted means of each half; a client's own gradient, equal in both, takes no part."""
    pool = Halves(2)
    pool.add(torch.tensor([1.0, 0.0]), 2.0, 0)
    assert pool.disagreement("absolute") == math.inf
    pool.add(torch.tensor([3.0, 0.0]), 2.0, 1)
    assert pool.disagreement("absolute") == 1.0  # ((1 - 3)^2 + 0) / 2 / 2
    assert pool.disagreement("relative") == 0.5  # over (2^2 + 0) / 2
    same = Halves(2)
    for i in range(8):
        same.add(torch.tensor([1.0, -1.0]) * (-1) ** (i // 4), 1.0 + i // 4, i)
    assert same.disagreement("absolute") == 0.0 and same.count == 8


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_the_server_remakes_the_clients_directions(begin, monkeypatch, law):
    """Bit for bit what the clients tried, chosen candidates included, with only scalars on the way up."""
    tried = []
    original = ClientCall.probe

    def probe(self, thetas, rows=None, **more):
        tried.append((self.id, [flat(t) for t in thetas], rows))
        return original(self, thetas, rows, **more)

    monkeypatch.setattr(ClientCall, "probe", probe)
    run = begin("fwdllm", perturbations=3, candidates=4, law=law, threshold=1e-6, most=1, lr=1e-2, loopback=True)
    batches = []
    for at in range(2):
        tried.clear()
        last, like, before = run.state["gradient"] if at else None, run.state["theta"], run.up()
        run.go()
        assert len(tried) == 4 * 2
        visits = dict.fromkeys(run.world.federation.clients, 0)
        for c, points, _ in tried:
            vs = directions(law, seed_of("fwdllm", at, visits[c], c), 3, 4, last, like)
            w = flat(like)
            want = [torch.add(w, v.to(w.dtype), alpha=s * 0.01) for v in vs for s in (1, -1)]
            assert all(torch.equal(p, q) for p, q in zip(points, want, strict=True))
            visits[c] += 1
        assert set(visits.values()) == {2}
        assert {c: len({tuple(r) for k, _, r in tried if k == c}) for c in visits} == dict.fromkeys(visits, 1)
        assert run.up() - before < 8 * 200  # three scalars, two numbers and a header
        batches.append({c: tuple(r) for c, _, r in tried})
    assert batches[0]["c3"] != batches[1]["c3"]  # 12 rows, four a batch: the next ones


@pytest.mark.parametrize("knobs", [
    {"h": 0.0}, {"h": 1.0}, {"perturbations": 0}, {"threshold": 0.0}, {"most": -1}, {"candidates": 0}, {"lr": 0.0},
    {"law": "cauchy"}, {"variance": "none"}, {"perturbations": 1.5}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(RecipeError, match="is not allowed; it must be"):
        make_method("fwdllm", **knobs)


def test_an_answer_of_another_length_is_refused(begin):
    class Short(Layer):
        def client(self, fn, msg, client, call):
            said = call(msg)
            return {**said, "jvp": said["jvp"][:1]}

    with pytest.raises(QuorumError, match="allowed is \\(3,\\)"):  # each is refused by name, and nobody is left
        begin("fwdllm", perturbations=3, layers=(Short(),)).go()
