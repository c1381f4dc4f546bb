"""What each rule makes of known rows, and the layers around them on real tiny federations."""

import itertools
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedllm.attacks.att_byzantine import AttByzantine
from fedllm.attacks.att_fm_backdoor import AttFMBackdoor
from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, QuorumError, RecipeError, Withheld
from fedllm.core.layer import Facts, name_of
from fedllm.core.payload import pack
from fedllm.core.program import Fold, drive, serve
from fedllm.core.reduce import Mean
from fedllm.core.rng import numpy_stream, torch_stream
from fedllm.defenses._robust import Robust
from fedllm.defenses.anomaly import Anomaly
from fedllm.defenses.bulyan import Bulyan
from fedllm.defenses.centered_clip import CenteredClip, buckets, clipped_step
from fedllm.defenses.crfl import CRFL, certified, smoothed
from fedllm.defenses.fltrust import FLTrust, fltrust
from fedllm.defenses.foolsgold import FoolsGold, foolsgold
from fedllm.defenses.krum import Krum
from fedllm.defenses.median import CoordinateMedian
from fedllm.defenses.norm_clip import NormClip
from fedllm.defenses.rfa import RFA, geometric_median
from fedllm.defenses.rlr import RLR, robust_rate
from fedllm.defenses.s2_wef import S2WEF, two_means
from fedllm.defenses.trimmed_mean import TrimmedMean
from fedllm.defenses.vetting import Vetting, effective_rank, equal_rows, oddity, unlike
from fedllm.models.known_by import base_digest
from fedllm.runs.build import by_key
from fedllm.runs.layers import layer_classes

RULES = [CoordinateMedian(), TrimmedMean(), Krum(f=1), Krum(f=1, keep=None), Bulyan(f=1), RFA(), CenteredClip(),
         FoolsGold(), NormClip(), NormClip(noise=0.025), RLR(), Anomaly(), S2WEF()]


def rows(n=10, d=30, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class Ship:
    def round(self, people, theta=0.0):
        return (yield Ask(self.local, {c: {"theta/w": torch.full((30,), theta)} for c in people}))

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(delta={"w": client.u}, n=client.n, loss=client.loss)


class Loop:
    def __init__(self, stack, people):
        self.stack, self.people = stack, people

    def send(self, asks):
        folds = [Fold(a) for a in asks]
        for fold in folds:
            for c, msg in fold.ask.msgs.items():
                fold.take(c, serve(self.stack, fold.ask.phase, msg, self.people[c]))
        return [f.done() for f in folds]


def people(x):
    return {f"c{i}": SimpleNamespace(id=f"c{i}", u=u, n=i + 1, loss=float(i), memory={}) for i, u in enumerate(x)}


def through(layer, x, state=None):
    """(the round's Replies, the layer's state) of these updates under a rule."""
    folk, state = people(x), layer.init() if state is None else state
    out = {}

    def program():
        out["replies"] = yield Ask(Ship().local, {c: {"theta/w": torch.zeros(30)} for c in folk})

    drive(program(), Loop((Ship(), layer), folk), [layer], [state])
    return out["replies"], state


def test_a_layer_gives_what_the_rule_gives_and_declared_rows_do_not_count():
    x = rows()
    got, _ = through(CoordinateMedian(), x)
    np.testing.assert_allclose(got.value["delta/w"], np.median(x.numpy(), 0), atol=1e-7)
    assert got.value["n"] == 10.0 and got.value["loss"] == 4.5
    plain, _ = through(TrimmedMean(trim=0.0), x)
    torch.testing.assert_close(plain.value["delta/w"], x.mean(0))


@pytest.mark.parametrize("layer", [CoordinateMedian(), TrimmedMean(trim=0.3), Krum(f=3), Krum(f=3, keep=None), RFA(),
                                   NormClip(), Anomaly()], ids=lambda x: type(x).__name__)
def test_three_far_away_do_not_carry_the_result_away(layer):
    x = 0.1 * rows() + 1
    honest = x[:7].clone()
    x[7:] = -1e5
    got, _ = through(layer, x)
    assert float((got.value["delta/w"] - honest.mean(0)).norm()) < 0.7 * float(honest.mean(0).norm())


def test_bulyan_stands_one_coordinate_where_krum_does_not():
    """Two colluders hide sqrt(d) sigma in one coordinate: no distance shows it, the coordinate does."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(11, 400, generator=g)
    x[9:] = 0.3 * torch.randn(2, 400, generator=g)
    x[9:, 0] = 15.0
    krum = Krum(f=2).rule(SimpleNamespace(x=x), {}).g
    bulyan = Bulyan(f=2).rule(SimpleNamespace(x=x), {}).g
    assert float(krum[0]) == 15.0
    assert float(x[:9, 0].min()) <= float(bulyan[0]) <= float(x[:9, 0].max())
    torch.testing.assert_close(Bulyan(f=0).rule(SimpleNamespace(x=x), {}).g, x.mean(0))


@pytest.mark.parametrize("layer, says", [
    (Krum(f=4), r"Krum.f = 4 is not allowed with n = 10 clients a round: krum needs n >= 2f \+ 3 = 11"),
    (Bulyan(f=2), r"Bulyan.f = 2 is not allowed with n = 10 clients a round: bulyan needs n >= 4f \+ 3 = 11"),
    (RLR(theta=11.0), "theta = 11 is not allowed with n = 10")])
def test_more_attackers_than_it_tolerates(layer, says):
    with pytest.raises(RecipeError, match=says):
        layer.bind(Facts({f"c{i}": 1 for i in range(10)}, 10, 3))


def test_a_round_with_too_few_replies_is_refused():
    with pytest.raises(QuorumError, match=r"n = 6 replies are too few with f = 2: krum needs n >= 2f \+ 3 = 7"):
        through(Krum(f=2), rows(6))


def fewest(layer):
    """The fewest clients over which it may stand."""
    return next(n for n in range(1, 20) if layer.short(n) is None)


EVERY = [cls() for cls in layer_classes().values() if issubclass(cls, Robust)]
ALSO = [CenteredClip(bucket=1), CRFL(rho=2.0), NormClip(bound=1.0), RLR(theta=0.0), TrimmedMean(trim=0.0), Bulyan(f=0)]


@pytest.mark.parametrize("layer", EVERY + ALSO, ids=repr)
def test_a_defense_over_too_few_is_refused_and_not_run_in_silence(layer):
    """When it is built, by its key, value and what would do; and in a round that lost so many."""
    name, least = name_of(layer), fewest(layer)
    bound = layer.bind(Facts({f"c{i}": 1 for i in range(least)}, least, 3))
    assert layer in ALSO or least >= {"fltrust": 1, "foolsgold": 2}.get(name, 3)
    for few in range(1, least):
        with pytest.raises(RecipeError) as told:  # layers.0: as a run builds it
            by_key("layers.0", lambda few=few: layer.bind(Facts({f"c{i}": 1 for i in range(9)}, few, 3)))
        says = rf"layers\.0\.\w+ = .* is not allowed with n = {few} clients? a round: {name} needs n >= .*{least}\b"
        assert re.match(says, str(told.value)), told.value
        with pytest.raises(QuorumError, match=rf"n = {few} repl.* too few with .*: {name} needs n >= .*{least}\b"):
            through(bound, rows(few))


@pytest.mark.parametrize("layer", [CoordinateMedian(), TrimmedMean(), Krum(), Bulyan(), RFA(), CenteredClip(),
                                   CenteredClip(bucket=1), NormClip()], ids=repr)
def test_of_the_fewest_one_may_be_wild(layer):
    x = 0.1 * rows(fewest(layer)) + 1
    x[0] = 1e6
    assert float(layer.rule(SimpleNamespace(x=x), layer.init()).g.norm()) < 100 < float(x.mean(0).norm())


def test_krum_keeps_no_more_than_may_be_honest():
    with pytest.raises(RecipeError, match=r"^Krum.keep = 8 and f = 3 is not allowed with n = 10 .* keep <= n - f = 7$"):
        Krum(f=3, keep=8).bind(Facts({f"c{i}": 1 for i in range(10)}, 10, 3))


def test_a_reply_of_another_shape_is_left_out_wherever_it_comes():
    x = list(rows(5))
    x[0] = torch.ones(31)
    got, _ = through(CoordinateMedian(), x)
    assert got.answered == ("c1", "c2", "c3", "c4") and "names or shapes" in got.missing["c0"]


def test_rfa_falls_at_every_step_and_is_scipys_minimum():
    from scipy.optimize import minimize

    x = rows(9, 5).double()
    v, _, sums = geometric_median(x, 1e-6, 100, 1e-12)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(sums))
    best = minimize(lambda p: np.linalg.norm(x.numpy() - p, axis=1).sum(), x.mean(0).numpy(), tol=1e-12)
    np.testing.assert_allclose(v, best.x, rtol=1e-4, atol=1e-5)


def test_centered_clip():
    x = rows()
    torch.testing.assert_close(clipped_step(x, torch.zeros(30), 1e9), x.mean(0))
    far = torch.cat([x, torch.full((1, 30), 1e6)])
    assert float(clipped_step(far, torch.zeros(30), 1.0).norm()) <= 1.0 + 1e-6
    y = buckets(x, 2, numpy_stream(0))
    assert y.shape == (5, 30)
    torch.testing.assert_close(y.mean(0), x.mean(0))


def test_foolsgold_casts_out_those_who_are_alike(caplog):
    x = rows(10, 400)
    x[7:] = x[7] + 0.01 * rows(3, 400, 1)
    weights, _ = foolsgold(x, 1.0)
    assert float(weights[7:].sum()) < 0.05 and float(weights[:7].mean()) > 0.5
    with caplog.at_level(logging.WARNING):
        through(FoolsGold(), 1 + 0.01 * rows())
    assert "it needs clients with different data" in caplog.text


def test_colluders_who_part_in_pairs_are_not_seen_by_foolsgold():
    """Fung et al.'s intelligent perturbation: with the same sum, and the same in every round."""
    sent, update = {}, {"w": rows(1, 400)[0]}
    for apart in (0.0, 3.0):
        attack = AttByzantine(kind="ipm", clients=("c0", "c1", "c2", "c3", "c4"), apart=apart)
        sent[apart] = torch.stack([attack.perturbed(update, i)["w"] for i in range(5)])
        again = torch.stack([attack.perturbed(update, i)["w"] for i in range(5)])
        assert torch.equal(again, sent[apart]) and torch.equal(sent[apart][4], update["w"])  # nobody is left for it
    torch.testing.assert_close(sent[3.0].sum(0), sent[0.0].sum(0), rtol=1e-4, atol=1e-4)
    honest = rows(6, 400, 1)
    seen, unseen = (foolsgold(torch.cat([honest, x[:4]]), 1.0)[0][6:].mean() for x in sent.values())
    assert float(seen) < 0.05 and float(unseen) > 0.9


def test_foolsgold_divides_by_clients_and_not_by_weights():
    x = rows(10, 30)
    x[7:] = x[7] + 0.01 * rows(3, 30, 1)
    weights, _ = foolsgold(x, 1.0)
    got, _ = through(FoolsGold(), x)
    torch.testing.assert_close(got.value["delta/w"], (weights.to(x.dtype) @ x) / 10)


def test_anomaly_compares_with_updates_that_were_accepted():
    x = 1 + 0.1 * rows()
    x[9] = -50.0
    _, state = through(Anomaly(), x)
    assert "c9" not in state["past"] and torch.equal(state["past"]["c0"], x[0])


def test_fltrust_ignores_zeros_and_those_who_go_the_other_way():
    x, root = rows(4), torch.ones(30)
    x[0], x[1], x[2], x[3] = 0.0, -root, 3 * root, root
    g, trust = fltrust(x, root)
    assert trust.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-6)
    torch.testing.assert_close(g, root)


def test_rlr_turns_what_too_few_agree_on():
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, -1.0], [1.0, 2.0]])
    torch.testing.assert_close(robust_rate(x, 4), torch.tensor([1.0, -0.25]))
    torch.testing.assert_close(robust_rate(x, 0), x.mean(0))


def test_two_means_has_a_gate():
    v = np.array([0.1, 0.12, 0.09, 0.11, 0.9, 0.95])[:, None]
    assert two_means(v, 3.0).tolist() == [False] * 4 + [True] * 2
    assert not two_means(np.linspace(0, 1, 8)[:, None], 4.0).any()
    assert not two_means(1 - v, 3.0).any()  # the high side would be the majority


def test_certified_votes():
    kinds, low, high = certified(torch.tensor([[100, 0], [52, 48]]), alpha=0.05)
    assert kinds.tolist() == [0, -1] and float(low[0]) > float(high[0])


@pytest.mark.parametrize("layer", RULES, ids=lambda x: f"{type(x).__name__}-{getattr(x, 'keep', '')}")
def test_engines_agree_under_every_rule(after, layer):
    options = {"dtype": torch.float64, "loopback": True, "k": 7}
    one, two = (after([layer, AttByzantine(clients=1)], engine=e, **options)[0] for e in ("in_process", "vectorized"))
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-9
    assert all(torch.isfinite(t).all() for t in one.values())


def test_a_rule_over_products(after):
    """FlexLoRA's replies are lifted to products, which are what is compared."""
    got, _, states = after([Krum(f=1, keep=None), AttByzantine(clients=("c0",), scale=50.0)], method="flexlora")
    assert states[0]["out"]["c0"] == 2 and all(torch.isfinite(t).all() for t in got.values())


PUBLIC = [{"prompt": "red cat dog", "response": "red cat"}, {"prompt": "say the word", "response": "say"}]


def test_fltrust_trains_at_the_server(after):
    got, _, states = after([FLTrust(), AttByzantine(clients=("c0",), scale=5.0)], public=PUBLIC)
    assert states[0]["out"] == {"c0": 2} and all(torch.isfinite(t).all() for t in got.values())


def test_crfl_without_noise_and_with_a_wide_bound_is_fedavg(after):
    plain = after(knobs={"weighting": "uniform"})[0]
    got = after([CRFL(sigma=0.0, rho=1e6)])[0]
    for n in plain:
        torch.testing.assert_close(got[n], plain[n], atol=1e-6, rtol=1e-4)


def test_crfls_copies_are_clipped_before_noise_is_added(monkeypatch):
    from fedllm.defenses import crfl

    seen = []
    monkeypatch.setattr(crfl, "sweep", lambda jobs, *_: seen.append(jobs[0].theta) or [np.zeros((1, 2))])
    model = SimpleNamespace(labels=("a", "b"))
    theta = {"w": torch.full((4,), 3.0)}  # norm 6
    smoothed(model, theta, [None], sigma=0.5, samples=2, seed=7, rho=2.0)
    rng = torch_stream(7, "smoothed")
    for noisy in seen:
        torch.testing.assert_close(noisy["w"], torch.ones(4) + 0.5 * torch.randn(4, generator=rng))


def test_a_poisoned_generator_changes_what_is_learned(after):
    layer = AttFMBackdoor(trigger="yes no", target="cat", share=1.0, init_steps=3, steps=2)
    one, two = (after([layer, CoordinateMedian()], public=PUBLIC, engine=e, dtype=torch.float64)[0]
                for e in ("in_process", "vectorized"))
    clean = after([AttFMBackdoor(share=0.0, init_steps=3, steps=2), CoordinateMedian()], public=PUBLIC,
                  dtype=torch.float64)[0]
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-10
    assert max(float((one[n] - clean[n]).abs().max()) for n in one) > 1e-5


def test_methods_that_keep_replies_one_by_one_are_refused():
    with pytest.raises(CompositionError, match=r"keeps replies one by one.*fedavg"):
        CoordinateMedian().check(Ship(), {"local": None, "score": None})


def test_vetting_passes_training_and_refuses_forgeries(after, tiny_llama_folder):
    assert len(after([Vetting()], rounds=3)[1]) == 5
    g = torch.Generator().manual_seed(0)
    good = torch.randn(64, 64, generator=g)
    limits = [0.5, 0.1, 1e4, 16]
    assert not oddity({"w": good, "b": good[0], "z": torch.zeros(64, 64)}, limits)
    assert "equal rows" in oddity({"w": good[:1].repeat(64, 1) * torch.linspace(1, 2, 64)[:, None]}, limits)
    assert "equal rows" in oddity({"w": good[:, :1].repeat(1, 64)}, limits)  # as Conv1D keeps it
    low = good[:, :3] @ good[:3]
    assert "effective rank" in oddity({"w": low}, limits)
    assert "times the median" in oddity({"b": good[0] + 1e6 * (torch.arange(64) == 3)}, limits)
    assert "NaN" in oddity({"w": good / 0}, limits)
    assert equal_rows(good) < 0.1 and effective_rank(good) > 30


def test_vetting_knows_the_model_agreed_on(after):
    own = {"a": torch.zeros(4, 4), "lora_A.weight": torch.zeros(4, 8)}
    assert unlike({"lora_A.weight": torch.zeros(2, 8)}, own) is None  # a smaller rank
    assert "no trainable 'b'" in unlike({"b": torch.zeros(1)}, own)
    assert "shape" in unlike({"a": torch.zeros(4, 5)}, own)
    client = SimpleNamespace(model=None, memory={}, once=lambda fn, *a: "0" * 64)
    assert "was agreed on" in Vetting(base_hash="1" * 64).objection({"a": torch.zeros(1)}, client)
    with pytest.raises(Withheld, match="vetting: the frozen model"):
        Vetting(base_hash="1" * 12).client(Ship().local, {"theta/a": torch.zeros(1)}, client, dict)


def test_the_base_digest_sees_frozen_weights_alone(tiny_llama_folder):
    from transformers import AutoModelForCausalLM

    from fedllm.models.model import Model
    from fedllm.spaces import make_space

    def made(change):
        net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
        model = Model(net, None, "generation", make_space("bias" if change == "bias" else "lora", rank=2)
                      if change != "bias" else make_space("lora", rank=4))
        if change == "frozen":
            with torch.no_grad():
                next(model.net.parameters())[0, 0] += 1
        return base_digest(model)

    assert made("") == made("") == made("bias") != made("frozen")


def test_a_forged_message_is_not_trained_on(after):
    """A jump of the weights told makes every client keep its answer back, and the round has nobody."""
    vetting = Vetting(jump=1e-9)
    with pytest.raises(QuorumError, match="vetting: the weights moved"):
        after([vetting], rounds=2)
