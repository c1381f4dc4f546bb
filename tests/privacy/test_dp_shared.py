"""Noise that clients share under a secure sum: exact sums, the law of the noise whoever drops out, refusals."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from fedllm.attacks.att_byzantine import AttByzantine
from fedllm.core.errors import BudgetSpent, CompositionError, QuorumError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.payload import sub
from fedllm.core.program import drive
from fedllm.local.fit import run_fits
from fedllm.local.private import Private
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.local.summed import on_grid
from fedllm.privacy._discrete import Coins, discrete_gaussian
from fedllm.privacy._shared import terms
from fedllm.privacy.accountant import Ledger, Release, noise_for, spent
from fedllm.privacy.composition import check_stack, clash
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.privacy.dp_ftrl import DPFTRL
from fedllm.privacy.dp_sgd import DPSGD
from fedllm.privacy.he_ckks import HECKKS
from fedllm.privacy.secagg import SecAgg
from fedllm.privacy.secagg_plus import SecAggPlus
from fedllm.privacy.thgs_secagg import THGSSecAgg
from fedllm.wire.codec_quant import CodecQuant
from fedllm.wire.ring_all_reduce import RingAllReduce
from fedllm.wire.server_tree import ServerTree

STEP = LocalSpec(optimizer="sgd", lr=0.5, steps=1, batch_size=64)


def stack_of(k, rounds=1, ring=None, rows=None, **knobs):
    """The bound layer above its secure sum, as `build` binds it."""
    ring = ring or SecAgg()
    below = () if knobs.get("noise") == "central" else (ring,)
    rows = rows or {f"c{i}": 6 + i for i in range(k)}
    layer = DPSGD(**{"noise": "shared", "noise_multiplier": 1.0, "delta": 1e-3, **knobs})
    return [layer.bind(Facts(rows, len(rows), rounds, STEP, below=below)), *below]


def one_round(tiny, layers, k, method="fedavg", engine="vectorized", dtype=torch.float32, states=None, **more):
    e, m, state, world = tiny(method, layers=layers, k=k, engine=engine, dtype=dtype, spec=STEP, **more)
    states = [x.init() for x in layers] if states is None else states
    new = drive(m.round(state, world.infos()), e, layers, states)
    return sub(new["theta"], state["theta"]), world, state, states


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
@pytest.mark.parametrize("space", ["lora", "head"])
def test_the_opened_sum_is_the_clipped_gradient_of_all_rows(tiny, monkeypatch, engine, space):
    """Without noise: against one DP-SGD step in floating point on everybody's rows, at the mean over all of them."""
    monkeypatch.setattr("fedllm.privacy._share.discrete_gaussian", lambda coins, shape, std: np.zeros(shape, np.int64))
    layers = stack_of(4, clip_norm=0.05)
    got, world, state, _ = one_round(tiny, layers, 4, engine=engine, space=space, dtype=torch.float64)
    theta, total = state["theta"], None
    for i in range(4):
        rows = world.encoded(f"c{i}", "train")
        fit = Fit(f"c{i}", world.model, theta, None, rows, [np.arange(len(rows))], STEP,
                  private=Private(0.05, 0.0, 1.0, torch.Generator()))
        step = sub(run_fits([fit], Limits())[0].theta, theta)  # -lr * sum of clipped gradients
        total = step if total is None else {n: total[n] + x for n, x in step.items()}
    for n, x in total.items():
        torch.testing.assert_close(got[n], x / (6 + 7 + 8 + 9), atol=3e-7, rtol=0)
    assert max(float(x.abs().max()) for x in got.values()) > 1e-5


@pytest.mark.parametrize("ring", [SecAgg(), SecAggPlus(degree=4), None])
def test_engines_and_rings_agree(tiny, ring):
    """The same seeded noise whoever computes, under either secure sum; None: the server's own."""
    knobs = {"seed": 3} if ring else {"seed": 3, "noise": "central"}
    ends = [one_round(tiny, stack_of(5, ring=ring, **knobs), 5, engine=e, dtype=torch.float64)[0]
            for e in ("in_process", "vectorized")]
    for n, x in ends[0].items():
        torch.testing.assert_close(ends[1][n], x, atol=1e-10, rtol=0)


def test_no_row_moves_the_sum_by_more_than_the_clip():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 37, generator=g) * torch.logspace(-6, 30, 200)[:, None]
    rows[7] = math.inf
    for clip, scale in ((1.0, 64.0), (0.3, 2.0**20), (1e-3, 2.0**25)):
        cut = on_grid({"a": rows[:, :20].clone(), "b": rows[:, 20:].clone()}, clip, scale)
        whole = torch.cat(list(cut.values()), 1)
        assert whole.equal(whole.trunc()) and not whole[7].any()
        exact = [sum(int(v) ** 2 for v in row) for row in whole.long().tolist()]
        assert max(exact) <= (clip * scale) ** 2
        assert max(exact) > 0.9 * (clip * scale - 6) ** 2


@pytest.mark.parametrize("std", [0.7, 3.0, 1e4])
def test_discrete_noise_follows_its_law(std):
    """Chi-square on the mass function where it is coarse, and the moments where it is fine."""
    x = discrete_gaussian(Coins.of("law", std), (40_000,), std)
    if std < 100:
        at = np.arange(-int(6 * std) - 1, int(6 * std) + 2)
        p = np.exp(-(at**2) / (2 * std**2))
        keep = (p := p / p.sum()) * len(x) > 8
        seen = np.array([(x == k).sum() for k in at])
        chi = ((seen - p * len(x)) ** 2 / (p * len(x)))[keep].sum()
        assert chi < keep.sum() + 4 * math.sqrt(2 * keep.sum())
    assert abs(x.mean()) < 4 * std / 200 and x.std() == pytest.approx(std, rel=0.02)
    assert kstest(x + np.random.default_rng(0).uniform(-0.5, 0.5, len(x)), norm(scale=std + (std < 3) * 0.05).cdf
                  ).statistic < 0.05


@pytest.mark.parametrize("gone", [0, 3])
def test_the_opened_sum_has_its_noise_whoever_drops_out(people, loop, gone):
    """Of ten clients, with 0 and with 30 % silent: the noise of many opened sums against the law that the statement
    says, N_Z(0, answers (z C s)^2 / (least - t))."""
    from dataclasses import dataclass, field

    from fedllm.core.ask import Ask, on_client
    from fedllm.core.method import Star
    from fedllm.core.payload import Kept, pack
    from fedllm.core.reduce import Mean
    from fedllm.local.summed import Clipped

    rows = {f"c{i:02}": 50 for i in range(10)}
    layer, ring = stack_of(10, rows=rows, colluding=2, noise_multiplier=2.0)
    want = terms(layer, layer._facts, list(rows))
    assert want.least == 7
    start = {"w": torch.zeros(60)}
    sums = Kept({"w": torch.arange(60) * 1000})

    @dataclass(frozen=True)
    class Plain(Star):
        @on_client(reduce=Mean(), gives="delta: tree, n: rows")
        def local(self, msg, client):
            client.train()
            return pack(delta={"w": torch.zeros(60)}, n=50)

        def round(self, state, clients):
            return (yield Ask(self.local, {c: pack(theta=start) for c in clients}, quorum=1))

    @dataclass
    class Trains:
        """A client whose training gives these sums."""

        id: str
        n: int = 50
        memory: dict = field(default_factory=dict)
        round: int = 0

        def spend(self, release, count=1):
            assert release == Release(2.0, law="discrete")

        def through(self, change, closed, heard):
            from contextlib import nullcontext

            self.train = lambda: heard(Clipped(start, 0.0, 1, 50, 0, 0.5, start=start, sums=sums))
            return nullcontext()

    clients = {c: Trains(c) for c in rows}
    method, seen = Plain(), []
    for r in range(15):
        engine = loop((method, layer, ring), clients, silent={"local": sorted(rows)[r % 5 :][:gone]})
        out = drive(method.round({}, list(rows)), engine, [layer, ring])
        alive = 10 - gone
        assert len(out.answered) == alive
        total = out.value["delta/w"].double() * -(want.scale * alive * 50) / 0.5
        seen.append(total - alive * sums["w"])
    noise = torch.cat(seen).numpy() / math.sqrt(alive * (2.0 * want.scale) ** 2 / (7 - 2))
    assert kstest(noise, norm.cdf).pvalue > 0.001
    assert noise.std() == pytest.approx(1.0, rel=0.08)  # and never less than z C


def test_too_few_answers_open_nothing(people, tiny):
    """Below the noise's threshold the round is given up, and it is paid all the same."""
    layers = stack_of(5)
    e, m, state, world = tiny(layers=layers, k=5, spec=STEP)
    assert terms(layers[0], layers[0]._facts, ["c0"] * 5).least == 4
    sent = e.send

    def half_silent(asks):
        asks = [a if a.phase != "FedAvg.local" else
                type(a)(**{**a.__dict__, "msgs": dict(list(a.msgs.items())[:3])}) for a in asks]
        return sent(asks)

    e.send, states = half_silent, [x.init() for x in layers]
    with pytest.raises(QuorumError, match=r"masked input.*3 of 5 clients are left and 4 are needed"):
        drive(m.round(state, world.infos()), e, layers, states)
    assert layers[0].statement(states[0])["epsilon"] > 0


def test_a_client_opens_no_sum_with_less_noise_than_it_was_told(tiny):
    """Though the ring's own threshold would let it."""
    from fedllm.core.errors import Withheld
    from fedllm.wire._keys import Session

    ring = SecAgg(threshold=0.5)
    seat = ring._seat("a")
    seat.session = Session("s", None, None, b"")
    seat.session.roster = {c: [b"", b"", b""] for c in "bcd"}
    seat.session.got = {c: (b"1", b"1") for c in "bcd"}
    ask = {"sid": "s", "alive": ["a", "b", "c"]}
    client = type("C", (), {"id": "a"})()
    assert "signature" in ring.consent(ask, client)
    seat.session.alive, seat.session.least = None, 4
    with pytest.raises(Withheld, match="3 survive, and the noise of 4"):
        ring.consent(ask, client)


def test_epsilon_against_an_independent_computation():
    """Bun and Steinke's conversion of zCDP, minimized here (Canonne et al. 2020), to 1 %."""
    from scipy.optimize import minimize_scalar

    for z, rounds, delta in ((4.0, 20, 1e-5), (12.0, 40, 1e-5), (1.5, 3, 1e-4)):
        rho = rounds / (2 * z * z)

        def bound(a, rho=rho, delta=delta):
            return rho * a + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1)

        own = minimize_scalar(bound, bounds=(1.01, 500), method="bounded").fun
        assert spent(((z, "none", 1.0, 0, "discrete", rounds),), delta) == pytest.approx(own, rel=0.01)
        assert spent(((z, "none", 1.0, 0, rounds),), delta) < own * 1.001  # the Gaussian's own, tight
        z_for = noise_for(own, delta, rounds, law="discrete")
        assert z_for == pytest.approx(z, rel=0.01)


def test_the_ledger_the_statement_and_what_colluders_see(tiny):
    layers = stack_of(5, rounds=2, colluding=1, epsilon=6.0, noise_multiplier=None)
    states = None
    for _ in range(2):
        _, _, _, states = one_round(tiny, layers, 5, states=states)
    says = layers[0].statement(states[0])
    assert 5.5 < says["epsilon"] <= 6.0 and set(says["clients"].values()) == {says["epsilon"]} and not says["void"]
    assert says["sees"]["1"] == pytest.approx(says["epsilon"]) and says["noise"] == "shared"
    assert says["sees"]["0"] < says["sees"]["1"] < says["sees"]["2"] <= says["sees"]["3"]
    assert layers[0].foresee(layers[0]._facts)["epsilon"] == pytest.approx(says["epsilon"])
    with pytest.raises(BudgetSpent, match="budget is 6"):
        one_round(tiny, layers, 5, states=states)
    assert Ledger({"releases": states[0]["clients"]["c0"]}).count == 2


@pytest.mark.parametrize("method", ["fedavgm", "fedadam", "ffa_lora", "fedit"])
def test_methods_that_send_what_they_trained(tiny, method):
    moved, *_ = one_round(tiny, stack_of(4), 4, method=method)
    assert max(float(x.abs().max()) for x in moved.values()) > 0


@pytest.mark.parametrize("method,why", [("scaffold", "sends something else"), ("fedprox", "penalties"),
                                        ("fed_sb", "fit together|sends something else")])
def test_methods_that_send_more_are_refused(tiny, method, why):
    from fedllm.methods.registry import make_method

    layers = stack_of(4)
    with pytest.raises(CompositionError, match=why):
        m = make_method(method)
        reducers = {n: f.__dict__.get("reduce") for n in dir(type(m)) if callable(f := getattr(type(m), n))
                    and getattr(f, "__dict__", {}).get("runs_on_client") and "on_server" not in f.__dict__}
        check_stack(m, layers, reducers)
        one_round(tiny, layers, 4, method=method, space="lora_sb" if method == "fed_sb" else "lora")


def test_shares_without_a_secure_sum_are_refused():
    with pytest.raises(CompositionError, match=r"share of the noise only.*secagg or secagg_plus.*noise: local"):
        check_stack(type("M", (), {"only_fits": True})(), [DPSGD(noise_multiplier=1.0, noise="shared")], {})


@pytest.mark.parametrize("below,why", [
    (CodecQuant(), "to the last bit; leave layer 'codec_quant' out"), (HECKKS(), "use secagg or secagg_plus"),
    (RingAllReduce(), "use secagg or secagg_plus"), (THGSSecAgg(), "thgs_"), (ServerTree(), None), (SecAgg(), None),
    (DPFedAvg(noise_multiplier=1.0), "the same work twice"), (SecAggPlus(), None)])
def test_what_may_stand_below(below, why):
    said = clash(DPSGD(noise_multiplier=1.0, noise="shared"), below)
    assert said is None if why is None else why in said
    assert "last bit" in (clash(DPSGD(noise_multiplier=1.0, noise="central"), CodecQuant()) or "")
    assert "attacker" in (clash(AttByzantine(), DPSGD(noise_multiplier=1.0, noise="shared")) or "")


@pytest.mark.parametrize("knobs,local,why", [
    ({"delta": 0.2}, {}, r"delta = 0.2 is not allowed with 30 units.*1/30"),
    ({"colluding": 3}, {}, r"colluding = 3 .*opens when 3 of 4"),
    ({"colluding": 1, "noise": "central"}, {}, "colluding = 1 is for noise: shared"),
    ({}, {"batch_size": 4}, r"batch_size = 4 .*a client has 9 rows.*does not cover.*set it to 9"),
    ({}, {"steps": 3}, "3 steps a round.*set steps: 1"),
    ({}, {"optimizer": "adamw"}, "local.optimizer = 'adamw'.*'sgd'"),
    ({}, {"momentum": 0.5}, "local.momentum = 0.5"),
    ({}, {"clip_norm": 1.0}, "local.clip_norm = 1.0"),
    ({"epsilon": 0.5, "noise_multiplier": 0.5}, {}, r"epsilon = 0.5 .*single round costs 1.*no number of rounds"),
])
def test_what_cannot_be_done_right_is_refused_before_training(knobs, local, why):
    layer = DPSGD(**{"noise": "shared", "noise_multiplier": 1.0, **knobs})
    spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.5, "steps": 1, "batch_size": 64, **local})
    rows = {f"c{i}": 6 + i for i in range(4)}
    with pytest.raises(RecipeError, match=why):
        layer.bind(Facts(rows, 4, 3, spec, below=(SecAgg(),)))


def test_noise_that_the_ring_has_no_grid_for_is_refused():
    layer = DPSGD(noise="shared", noise_multiplier=1e-3, delta=1e-8)
    spec = LocalSpec(optimizer="sgd", steps=1, batch_size=10**6)
    with pytest.raises(RecipeError, match=r"noise_multiplier = 0.001 .*over 4000000 rows.*quanta wide"):
        layer.bind(Facts({f"c{i}": 10**6 for i in range(4)}, 4, 3, spec, below=(SecAgg(),)))


@pytest.mark.parametrize("noise", [1e-4, 1e-9, 1e7])
def test_noise_that_no_ledger_holds_is_refused_before_training(noise):
    """It ran, and all of its rounds were refused at the end, in words that did not name the key."""
    with pytest.raises(RecipeError, match=r"DPSGD.noise_multiplier = .* is not allowed"):
        DPSGD(noise_multiplier=noise)


@pytest.mark.parametrize("layer", [DPSGD, DPFedAvg, DPFTRL])
def test_a_budget_that_no_round_keeps_to_is_refused_by_every_layer(layer):
    with pytest.raises(RecipeError, match=rf"{layer.__name__}.epsilon = 0.5 .*a single round costs"):
        layer(epsilon=0.5, noise_multiplier=0.5).bind(Facts({f"c{i}": 20 for i in range(4)}, 4, 3, STEP))


def test_sampling_under_discrete_noise_is_not_covered():
    with pytest.raises(CompositionError, match="no accountant covers"):
        Release(1.0, "poisson", 0.1, law="discrete")
    with pytest.raises(CompositionError, match="discrete noise"):
        spent(((1.0, "none", 1.0, 0, "discrete", 3),), 1e-5, "pld")


def test_a_seed_voids_the_claim(tiny):
    layers = stack_of(4, seed=1)
    *_, states = one_round(tiny, layers, 4)
    says = layers[0].statement(states[0])
    assert says["epsilon"] == math.inf and re.search("seed", says["void"][0])
