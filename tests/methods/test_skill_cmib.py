"""Skill-CMIB: a card holds shared words and no value, the latent costs what the card does not say, neither leaves but
the card, and what is learned is what both are worth."""

import json

import pytest
import torch

import fedllm
from evidence.rigs.trials import Trial
from evidence.rigs.two_cues import ACTIONS, SIDE, encoder, trials, two_cues
from fedllm.core.errors import CompositionError, DataError, FedLLMError
from fedllm.core.layer import Layer
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods import _bottleneck as ib
from fedllm.methods._cards import CARD, drafted, picked
from fedllm.methods.registry import make_method
from tests.methods.conftest import begin


def small(kind=Vectorized, layers=(), clients=2, **knobs):
    rng = numpy_stream(0, "small")
    shards = {f"c{k}": Shard([r for s in (k, k + 1) for r in trials(rng, s, s % 2, 8)], trials(rng, k, k % 2, 4))
              for k in range(clients)}
    world = World(encoder(0), Federation(shards, (), "classification", ACTIONS), LocalSpec(
        optimizer="adamw", lr=0.01, steps=2, batch_size=8), 0)
    return Trial("skill_cmib", world, {"least": 2, **knobs}, kind, layers)


class Heard(Layer):
    def __init__(self):
        self.said = []

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.said.append((client.id, reply))
        return reply


def test_the_bottleneck_in_closed_form():
    mu, log = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.1, -0.3]])
    q, p = (torch.distributions.Normal(m, s.exp()) for m, s in ((mu, log), (torch.zeros(2), torch.zeros(2))))
    assert torch.allclose(ib.kl(mu, log), torch.distributions.kl_divergence(q, p).sum(-1), atol=1e-6)
    net = {n: t + 0.2 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
           for n, t in ib.start(6, 4, 2, 5, 3, 0).items()}
    x, c, v, w = torch.rand(2, 4), torch.rand(2, 4), torch.rand(2, 6), torch.rand(2, 2)
    m, s = c @ net["p/mu"].T, (c @ net["p/log"].T).exp()
    h = torch.relu(x @ net["x"].T + (m + s * w) @ net["u"].T + net["b"])
    assert torch.allclose(ib.logits(net, x, c, w), h @ net["head"].T + net["bias"], atol=1e-6)
    mu, log = ib.posterior(net, v, c)  # in z the divergence is the same
    z = torch.distributions.Normal(m + s * mu, s * log.exp())
    prior = torch.distributions.Normal(m, s)
    assert torch.allclose(torch.distributions.kl_divergence(z, prior).sum(-1), ib.kl(mu, log), atol=1e-5)
    total, rate = ib.loss(net, x, c, v, torch.tensor([0, 2]), torch.zeros(2, 2), 0.5, True)
    want = torch.nn.functional.cross_entropy(ib.logits(net, x, c, mu), torch.tensor([0, 2])) + 0.5 * rate
    assert torch.allclose(total, want) and ib.loss(net, x, c, v, torch.tensor([0, 2]), w, 0.5, False)[1] == 0


def test_a_card_has_shared_words_and_no_value():
    traces = ["please swap 4711 now", "swap it for ann@b.org now", "now swap the zebra"]
    got = drafted(traces, 3, 8)
    assert got == ["now swap", "now", "swap"] and all(CARD.fullmatch(t) for t in got)
    assert not any("zebra" in t or "4711" in t for t in drafted(traces, 2, 8))
    assert drafted(["a b c"], 2, 8) == [""]


def test_the_cheapest_card_is_taken_and_before_anything_is_learned_the_longest():
    rows = [{"skill": "s", "trace": "x"}]
    drafts = lambda some: ["one two", "one", "two"]  # noqa: E731
    assert picked(rows, {}, drafts, None) == ({"s": "one two"}, [0.0])
    price = lambda some, name, card: (0.1 if "two" in card else 1.0) + 0.01 * len(card.split())  # noqa: E731
    mine, worth = picked(rows, {"s": "three"}, drafts, price)
    assert mine == {"s": "two"} and worth == [pytest.approx(-0.11)]
    assert picked(rows, {"s": "two"}, lambda some: [], price)[0] == {"s": "two"}  # between two choices


def test_what_leaves_is_a_net_and_words():
    ear = Heard()
    run = small(layers=(ear,), kind=InProcess).rounds(2)
    for _, reply in ear.said:
        assert {k.partition("/")[0] for k in reply} == {"delta", "n", "loss", "kl", "names", "texts", "worth"}
        assert all(CARD.fullmatch(t) for t in reply["texts"]) and "code" not in " ".join(reply["texts"])
        assert {tuple(t.shape) for k, t in reply.items() if k.startswith("delta/")} == {
            tuple(t.shape) for t in run.state["theta"].values()}  # a net's shapes: no trial's picture or latent
    assert set(run.state["cards"]) == {"skill-0", "skill-1", "skill-2"}


def test_a_reply_with_something_else_than_words_is_refused():
    method, msg = make_method("skill_cmib"), {"names": [], "texts": [], "round": 0}
    good = {"names": ["s"], "texts": ["now swap"], "worth": [0.1]}
    method.fits(msg, good)
    for bad in ({"texts": ["call 4711"]}, {"names": ["../x"]}, {"worth": []}, {"texts": ["a" * 700]}):
        with pytest.raises(FedLLMError):
            method.fits(msg, {**good, **bad})


def test_engines_agree_and_the_merge_is_by_rows(gap):
    one, other = small(kind=InProcess).rounds(3), small().rounds(3)
    assert gap(one.state["theta"], other.state["theta"]) < 1e-4 and one.state["cards"] == other.state["cards"]
    alone = small(share="nothing").rounds(2)
    assert not alone.state["cards"] and gap(alone.state["theta"], alone.method.init(alone.world.model)["theta"]) == 0
    assert gap(*(alone.engine.memory[c]["skills"]["theta"] for c in ("c0", "c1"))) > 0
    assert alone.scores("local").keys() == {"c0", "c1"}


@pytest.mark.slow
def test_a_latent_that_costs_too_much_is_empty_and_what_both_are_worth():
    both = two_cues("skill_cmib", 0)
    assert both["accuracy"] > 0.6 and both["secrets"] == 0
    assert two_cues("skill_cmib", 0, knobs={"use": "card"})["accuracy"] < both["accuracy"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(CompositionError, match=r"'skill_cmib' and data\.task = 'generation' do not fit together"):
        begin("skill_cmib")
    run = small(pixels=9)
    with pytest.raises(DataError, match=r"client 'c0', trial 1: .* method\.pixels = 9 numbers"):
        run.rounds(1)


def test_a_recipe_reads_trials_from_a_file(tmp_path):
    rng = numpy_stream(0, "file")
    rows = [{**r, "label": ACTIONS[r["label"]], "who": s % 2} for s in range(3) for r in trials(rng, s, s % 2, 12)]
    (tmp_path / "trials.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {"model": {"name": "embedded"}, "method": {"name": "skill_cmib", "pixels": SIDE**2}, "rounds": 1,
              "local": {"steps": 1, "batch_size": 4}, "space": {"name": "head"},
              "data": {"source": str(tmp_path / "trials.jsonl"), "task": "classification", "test": 0.1,
                       "fields": {"skill": "skill", "trace": "trace", "glyph": "glyph"},
                       "partition": {"kind": "by_key", "key": "who"}}}
    result = fedllm.run(recipe, root=tmp_path)
    assert {"accuracy", "card_accuracy", "agree", "kl"} <= set(result.evaluation["global"])
