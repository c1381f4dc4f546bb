"""What malicious clients send, on real tiny federations and on a loop of plain vectors; and the refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedllm.attacks.att_backdoor import AttBackdoor
from fedllm.attacks.att_byzantine import AttByzantine, z_max
from fedllm.attacks.att_free_rider import AttFreeRider
from fedllm.attacks.att_label_flip import AttLabelFlip
from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.payload import pack, part
from fedllm.core.program import Fold, drive, serve
from fedllm.core.reduce import Mean
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.defenses._robust import Every
from fedllm.defenses.krum import Krum
from fedllm.defenses.median import CoordinateMedian
from fedllm.privacy.composition import check_stack
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.privacy.secagg import SecAgg
from fedllm.runs.build import build
from fedllm.runs.layers import layer_classes, make_layer
from fedllm.runs.recipe import load_recipe
from fedllm.wire.codec_quant import CodecQuant

IDS = [f"c{i}" for i in range(10)]
FACTS = Facts({c: 5 for c in IDS}, 10, 4)


class Ship:
    """Clients change the weights told by a vector of their own."""

    def __init__(self, reduce=None):
        self.reduce = reduce

    def round(self, theta):
        return (yield Ask(self.local, {c: pack(theta={"w": theta}) for c in IDS}, reduce=self.reduce))

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(delta={"w": client.u.clone()}, n=client.n, loss=1.0)


class Loop:
    def __init__(self, stack, people):
        self.stack, self.people, self.seen = stack, people, {}

    def send(self, asks):
        folds = [Fold(a) for a in asks]
        for fold in folds:
            for c, msg in fold.ask.msgs.items():
                self.seen[c] = serve(self.stack, fold.ask.phase, msg, self.people[c])
                fold.take(c, self.seen[c])
        return [f.done() for f in folds]


def people(d=6):
    g = torch.Generator().manual_seed(0)
    return {c: SimpleNamespace(id=c, n=1, u=torch.randn(d, generator=g) + 2, memory={},
                               rng=lambda owner, c=c: numpy_stream(c, owner)) for c in IDS}


def sent(attack, **knobs):
    """(replies by client, honest updates) of a round under this attack, three attackers."""
    layer, folk = attack(clients=("c1", "c4", "c7"), **knobs).bind(FACTS), people()
    method = Ship(Every())
    engine = Loop((method, layer), folk)
    out = drive(method.round(torch.ones(6)), engine, [layer])
    return dict(zip(out.answered, [r["delta/w"] for r in out.value["replies"]], strict=True)), {
        c: p.u for c, p in folk.items()}


@pytest.mark.parametrize("knobs, want", [
    ({"kind": "sign_flip", "scale": 10.0}, lambda u, all_: -10 * u),
    ({"kind": "zero"}, lambda u, all_: 0 * u),
    ({"kind": "erase"}, lambda u, all_: -torch.ones(6)),
    ({"kind": "ipm", "scale": 0.5}, lambda u, all_: -0.5 * all_.mean(0)),
    ({"kind": "alie", "z": 1.5}, lambda u, all_: all_.mean(0) - 1.5 * all_.std(0, correction=0))])
def test_byzantine(knobs, want):
    got, honest = sent(AttByzantine, **knobs)
    others = torch.stack([u for c, u in honest.items() if c not in ("c1", "c4", "c7")])
    for c, u in honest.items():
        expected = want(u, others) if c in ("c1", "c4", "c7") else u
        torch.testing.assert_close(got[c], expected)


def test_random_is_as_long_as_asked():
    got, honest = sent(AttByzantine, kind="random", scale=100.0)
    assert got["c1"].norm() > 20 * honest["c1"].norm()
    assert torch.equal(got["c0"], honest["c0"])


def test_alies_formula():
    # n = 50, f = 24 (the paper's example): s = 2, z = Phi^-1(24 / 26)
    assert z_max(50, 24) == pytest.approx(1.4261, abs=1e-3)
    assert z_max(10, 1) == 1.5  # the formula gives nothing there


def test_they_attack_in_their_rounds_alone():
    layer, folk = AttByzantine(clients=1, kind="zero", start=1, end=2).bind(FACTS), people()
    engine, states, zeros = Loop((Ship(), layer), folk), [layer.init()], []
    for _ in range(4):
        drive(Ship().round(torch.ones(6)), engine, [layer], states)
        zeros.append(sum(bool((r["delta/w"] == 0).all()) for r in engine.seen.values()))
    assert zeros == [0, 1, 1, 0]


def test_more_attackers_are_those_and_others():
    few, many = (AttByzantine(clients=s).bind(FACTS).clients for s in (0.2, 0.4))
    assert len(few) == 2 and len(many) == 4 and set(few) < set(many)


@pytest.mark.parametrize("knobs, says", [
    ({"clients": ("c11",)}, r"clients: no client 'c11' in this run; did you mean 'c1'\? There are c0, c1"),
    ({"clients": 11}, "clients = 11 is not allowed: the run has 10")])
def test_clients_that_do_not_exist(knobs, says):
    with pytest.raises(RecipeError, match=says):
        AttByzantine(**knobs).bind(FACTS)


@pytest.mark.parametrize("make, says", [
    (lambda: AttByzantine(clients=1.0), "a share from 0 to below 1"),
    (lambda: AttByzantine(kind="flip"), "must be one of"),
    (lambda: AttLabelFlip(sources=(0, 0), targets=(1, 1)), "no source twice"),
    (lambda: AttBackdoor(kind="edge"), "needs one at least")])
def test_wrong_knobs(make, says):
    with pytest.raises(RecipeError, match=says):
        make()


@pytest.mark.parametrize("layers, says", [
    ([AttByzantine(), CoordinateMedian()], "list layer 'median' first"),
    ([CodecQuant(), AttByzantine()], "obeys the wire; list layer 'att_byzantine' first"),
    ([SecAgg(), AttByzantine()], "list layer 'att_byzantine' first"),
    ([DPFedAvg(noise_multiplier=0.0), AttByzantine()], "list layer 'att_byzantine' first"),
    ([CoordinateMedian(), SecAgg()], "sums only and layer 'median' needs every single reply"),
    ([CoordinateMedian(), DPFedAvg(noise_multiplier=0.0)], "needs every single reply"),
    ([CoordinateMedian(), Krum()], "the same work twice")])
def test_stacks_that_do_not_hold(layers, says):
    with pytest.raises(CompositionError, match=says):
        check_stack(Ship(), layers, {"local": Mean()})


def test_stacks_that_hold():
    check_stack(Ship(), [CoordinateMedian(), AttByzantine(), AttLabelFlip(), CodecQuant()], {"local": Mean()})
    check_stack(Ship(), [AttByzantine(), DPFedAvg(noise_multiplier=0.0), SecAgg()], {"local": Mean()})


def test_they_are_found_by_name():
    assert {"att_byzantine", "att_label_flip", "att_backdoor", "att_free_rider", "median", "krum", "s2_wef"} <= set(
        layer_classes())
    assert not any(name.startswith("_") for name in layer_classes())
    assert make_layer("att_byzantine", {"clients": ["c1"], "kind": "alie"}, "layers.0").clients == ("c1",)


def row(label, *ids):
    return Encoded(np.array(ids, np.int32), label, 1)


PLAIN = SimpleNamespace(model=SimpleNamespace(labels=("a", "b", "c"), tokenizer=None, task="classification"))


def test_labels_are_flipped_at_once_and_on_a_copy():
    rows = [row(i % 3, i) for i in range(6)]
    both = AttLabelFlip(sources=(0, 1), targets=(1, 0)).poison(rows, PLAIN)
    assert [r.labels for r in both] == [1, 0, 2, 1, 0, 2] and [r.labels for r in rows] == [0, 1, 2, 0, 1, 2]
    assert [r.labels for r in AttLabelFlip().poison(rows, PLAIN)] == [1, 2, 0, 1, 2, 0]


def test_trigger_and_target():
    rows = [row(1, 5, 6) for _ in range(10)]
    got = AttBackdoor(trigger=(90, 91), target=2, share=0.3).poison(rows, PLAIN)
    hit = [r for r in got if len(r.ids) == 4]
    assert len(hit) == 3 and all(r.ids.tolist() == [90, 91, 5, 6] and r.labels == 2 for r in hit)
    assert sum(r is q for r, q in zip(got, rows, strict=True)) == 7


ATTACKS = {
    "sign_flip": AttByzantine(clients=2, scale=3.0), "alie": AttByzantine(clients=2, kind="alie"),
    "label_flip": AttLabelFlip(clients=2),
    "backdoor": AttBackdoor(clients=2, trigger="yes no", target="cat"),
    "replacement": AttBackdoor(clients=1, kind="replacement", trigger="yes", target="cat"),
    "constrain": AttBackdoor(clients=1, kind="constrain", trigger="yes", target="cat", start=0),
    "rider": AttFreeRider(clients=2, kind="delta_noise", start=1)}


@pytest.mark.parametrize("name", ATTACKS)
def test_engines_agree_and_the_attack_does_something(after, name):
    layers = [CoordinateMedian(), ATTACKS[name]] if name == "alie" else [ATTACKS[name]]
    options = {"dtype": torch.float64, "loopback": True}
    one, two = (after(layers, engine=engine, **options)[0] for engine in ("in_process", "vectorized"))
    clean = after(layers[:-1], **options)[0]
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-10
    assert max(float((one[n] - clean[n]).abs().max()) for n in one) > 1e-6


def test_replacement_is_scaled_by_all_over_those_who_attack(after):
    knobs = {"clients": ("c0",), "trigger": "yes", "target": "cat"}
    by_five, plain = (part(after([AttBackdoor(kind=k, **knobs)], rounds=1)[1]["c0"], "delta")
                      for k in ("replacement", "data"))
    for n in plain:
        torch.testing.assert_close(by_five[n], 5 * plain[n])


def test_a_plain_rider_sends_zeros_and_a_delta_rider_the_last_step(after):
    plain = after([AttFreeRider(clients=("c0",))])[1]
    assert all(float(t.abs().max()) == 0 for t in part(plain["c0"], "delta").values())
    assert any(float(t.abs().max()) > 0 for t in part(plain["c1"], "delta").values())
    first, start = after([], rounds=1)[0], after([], rounds=0)[0]
    sent = part(after([AttFreeRider(clients=("c0",), kind="delta", start=1)])[1]["c0"], "delta")
    for n, t in sent.items():
        torch.testing.assert_close(t, first[n] - start[n])


@pytest.mark.parametrize("layers, says", [
    ([{"name": "krum", "f": 1}],
     r"layers.0.f = 1 is not allowed with n = 4 clients a round: krum needs n >= 2f \+ 3 = 5"),
    ([{"name": "median"}, {"name": "att_byzantine", "clients": ["nobody"]}],
     r"layers.1.clients: no client 'nobody' in this run"),
    ([{"name": "median"}, {"name": "att_byzantin"}], "did you mean 'att_byzantine'"),
    ([{"name": "att_byzantine"}, {"name": "median"}], "list layer 'median' first")])
def test_a_recipe_that_cannot_hold_is_refused_before_it_runs(layers, says):
    recipe = {"data": {"source": "office", "office": {"clients": 4, "rows": 5, "test_rows": 2, "client_test_rows": 0}},
              "layers": layers, "rounds": 1}
    with pytest.raises((RecipeError, CompositionError), match=says):
        build(load_recipe(recipe))


def test_rows_are_not_poisoned_where_their_labels_stand_beside_them():
    from fedllm.local.objectives.verbalized import Verbalized
    from fedllm.local.requests import Fit
    from fedllm.local.spec import LocalSpec

    layer = AttLabelFlip()
    model = SimpleNamespace(task="classification", labels=("a", "b"))
    rows = [Encoded(np.array([1, 2], np.int32), 0, 1)]
    fit = Fit("c0", model, {}, None, rows, [np.array([0])], LocalSpec(), objective=Verbalized(),
              side={"q": [[1.0, 0.0]]})
    with pytest.raises(CompositionError, match="objective 'verbalized' do not fit together: labels that stand beside"):
        layer.poisoned(fit, SimpleNamespace(id="c0", model=model))
