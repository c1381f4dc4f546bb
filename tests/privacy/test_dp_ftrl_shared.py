"""A tree of noise that clients share over rows in turn: exact sums, its law whoever drops out, its price, refusals."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import kstest, norm

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import BudgetSpent, CompositionError, PayloadError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.method import Star
from fedllm.core.payload import Kept, pack, sub
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.local.fit import run_fits
from fedllm.local.private import Private
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.local.summed import Clipped
from fedllm.privacy._shared import terms
from fedllm.privacy._turns import Tree
from fedllm.privacy.composition import check_stack, clash
from fedllm.privacy.dp_ftrl import DPFTRL
from fedllm.privacy.dp_sgd import DPSGD
from fedllm.privacy.he_ckks import HECKKS
from fedllm.privacy.secagg import SecAgg
from fedllm.privacy.secagg_plus import SecAggPlus
from fedllm.wire.codec_quant import CodecQuant

STEP = LocalSpec(optimizer="sgd", lr=0.5, steps=1, batch_size=64)


def stack_of(k, rounds=4, ring=None, rows=None, **knobs):
    """The bound layer above its secure sum, as `build` binds it."""
    ring = ring or SecAgg()
    rows = rows or {f"c{i}": 6 + i for i in range(k)}
    layer = DPFTRL(**{"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3, "clip_norm": 1.0, **knobs})
    return [layer.bind(Facts(rows, len(rows), rounds, STEP, below=(ring,))), ring]


def rounds_of(tiny, layers, k, rounds, method="fedavg", engine="vectorized", dtype=torch.float32):
    e, m, state, world = tiny(method, layers=layers, k=k, engine=engine, dtype=dtype, spec=STEP)
    states, thetas = [x.init() for x in layers], [state["theta"]]
    for r in range(rounds):
        e.begin(r)
        state = drive(m.round(state, world.infos()), e, layers, states)
        e.commit()
        thetas.append(state["theta"])
    return thetas, world, states


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
def test_each_round_is_the_clipped_gradient_of_its_part_of_the_rows(tiny, monkeypatch, engine):
    """Without noise: against DP-SGD's step in floating point, and after a span every row was read once."""
    monkeypatch.setattr("fedllm.privacy._share.discrete_gaussian", lambda coins, shape, std: np.zeros(shape, np.int64))
    layers = stack_of(3, clip_norm=0.05, restart_every=2)
    thetas, world, _ = rounds_of(tiny, layers, 3, 2, engine=engine, dtype=torch.float64)
    turns = layers[0].turns
    for t in (1, 2):
        total, count = None, 0
        for i in range(3):
            mine = turns.rows(f"c{i}", 6 + i, t)
            count += len(mine)
            rows = [world.encoded(f"c{i}", "train")[j] for j in mine]
            fit = Fit(f"c{i}", world.model, thetas[t - 1], None, rows, [np.arange(len(rows))], STEP,
                      private=Private(0.05, 0.0, 1.0, torch.Generator()))
            step = sub(run_fits([fit], Limits())[0].theta, thetas[t - 1])
            total = step if total is None else {n: total[n] + x for n, x in step.items()}
        for n, x in total.items():
            torch.testing.assert_close(thetas[t][n] - thetas[t - 1][n], x / count, atol=3e-7, rtol=0)


@pytest.mark.parametrize("n,span", [(7, 7), (20, 3), (100, 8)])
def test_every_row_is_read_once_in_a_span(n, span):
    turns = Tree(span)
    for first in (1, span + 1):
        parts = [turns.rows("a", n, t) for t in range(first, first + span)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))
        assert [len(p) for p in parts] == [turns.count(n, t) for t in range(first, first + span)]
    assert turns.rows("a", n, 1).tolist() != turns.rows("b", n, 1).tolist()


def test_engines_agree(tiny):
    """Over rounds whose noise hangs together, under either secure sum."""
    for ring in (SecAgg(), SecAggPlus(degree=4)):
        ends = [rounds_of(tiny, stack_of(5, ring=ring, seed=3, restart_every=4), 5, 5, engine=e,
                          dtype=torch.float64)[0][-1] for e in ("in_process", "vectorized")]
        for n, x in ends[0].items():
            torch.testing.assert_close(ends[1][n], x, atol=1e-10, rtol=0)


@dataclass
class Trains:
    """A client whose training gives no gradient: what it sends is its noise."""

    id: str
    size: int
    n: int = 40
    memory: dict = field(default_factory=dict)
    round: int = 0
    spent: list = field(default_factory=list)

    def spend(self, release, count=1):
        self.spent.append(release)

    def through(self, change, closed, heard):
        from contextlib import nullcontext

        start = {"w": torch.zeros(self.size)}
        none = Kept({"w": torch.zeros(self.size, dtype=torch.int64)})
        self.train = lambda: heard(Clipped(start, 0.0, 1, 5, 0, 0.5, start=start, sums=none))
        return nullcontext()


@dataclass(frozen=True)
class Plain(Star):
    @on_client(reduce=Mean(), gives="delta: tree, n: rows")
    def local(self, msg, client):
        client.train()
        return pack(delta={"w": torch.zeros(client.size)}, n=client.n)

    def round(self, state, clients):
        size = len(state["theta"]["w"])
        return (yield Ask(self.local, {c: pack(theta={"w": torch.zeros(size)}) for c in clients}, quorum=1))


@pytest.mark.parametrize("gone", [0, 3])
def test_the_opened_sums_carry_the_trees_noise_whoever_drops_out(loop, gone):
    """Of ten clients, with none and with 30 % silent in each round (others each time): what the sum of all rounds so
    far carries, against the law of the nodes that are live in it."""
    size, span, z = 150, 6, 2.0
    rows = {f"c{i:02}": 40 for i in range(10)}
    layer, ring = stack_of(10, rounds=span, rows=rows, colluding=2, noise_multiplier=z)
    want = terms(layer, layer._facts, list(rows))
    assert want.least == 7 and layer.restart_every == span
    method, seen = Plain(), []
    for trial in range(3):
        clients, states = {c: Trains(c, size) for c in rows}, [layer.init(), ring.init()]
        held = {c: [] for c in rows}  # nodes that each client has in the sums, by their ends
        prefix = torch.zeros(size, dtype=torch.float64)
        for i in range(1, span + 1):
            silent = [sorted(rows)[(trial + 3 * i + j) % 10] for j in range(gone)]
            engine = loop((method, layer, ring), clients, silent={"local": silent})
            out = drive(method.round({"theta": {"w": torch.zeros(size)}}, list(rows)), engine, [layer, ring], states)
            assert len(out.answered) == 10 - gone
            prefix += out.value["delta/w"].double() * -(want.scale * (10 - gone) * layer.turns.count(40, i)) / 0.5
            for c in out.answered:
                held[c] = [e for e in held[c] if e <= i - (i & -i)] + [i]
            live = sum(map(len, held.values()))
            if not gone:
                assert live == 10 * i.bit_count()
            seen.append(prefix / (z * want.scale / math.sqrt(7 - 2)) / math.sqrt(live))
    noise = torch.cat(seen).numpy()
    assert noise.std() == pytest.approx(1.0, rel=0.06)
    for i in range(span):  # each prefix by itself: those of one trial share noise
        assert kstest(torch.cat(seen[i::span]).numpy(), norm.cdf).pvalue > 0.001


def prices(turns, k, there, lost=0.0, undone=0.0, rng=None):
    """What a round's rows pay, by linear algebra from what clients really add: of noise with covariance S, a row that
    moves all later prefix sums by 1 costs v' S^-1 v. `there(t)` answers; `lost`: chance that a client has lost its
    store; `undone`: that its memory is rolled back although its sum was opened."""
    rng = rng or np.random.default_rng(0)
    books, last, rows, drawn = [{} for _ in range(k)], [0] * k, [], 0
    for t in range(1, turns.span + 1):
        row = np.zeros(k * turns.span)
        for c in there(t):
            books[c] = {} if rng.random() < lost else books[c]
            fresh, kept = {"w": torch.zeros(k * turns.span, dtype=torch.int64)}, {**books[c]}
            fresh["w"][drawn], drawn, told, last[c] = 1, drawn + 1, last[c], t
            row += turns.noise(books[c], t, told, fresh)["w"].numpy()
            books[c] = kept if rng.random() < undone else books[c]
        rows.append(row)
    prefix = np.cumsum(rows, 0)
    after = np.triu(np.ones((turns.span, turns.span)))  # row i: the prefix sums that a row of round i is in
    return np.einsum("ij,ij->i", after, np.linalg.solve(prefix @ prefix.T, after.T).T)


@pytest.mark.parametrize("span", [1, 6, 8, 15, 16])
def test_where_all_are_there_a_row_pays_for_each_node_that_holds_it(span):
    turns = Tree(span)
    held = [sum(e - (e & -e) < i <= e for e in range(1, span + 1)) for i in range(1, span + 1)]
    assert prices(turns, 4, lambda t: range(4)) == pytest.approx(np.array(held) / 4)
    assert max(held) == turns.depth


@pytest.mark.parametrize("seed", range(6))
def test_a_row_pays_no_more_whoever_is_missing_and_whatever_is_forgotten(seed):
    rng = np.random.default_rng(seed)
    turns, k, least = Tree(int(rng.integers(5, 17))), 6, 3
    some = {t: rng.permutation(k)[: int(rng.integers(least, k + 1))] for t in range(1, turns.span + 1)}
    for lost, undone in ((0, 0), (0.1, 0), (0, 0.3), (0.1, 0.1)):
        assert prices(turns, k, some.__getitem__, lost, undone, rng).max() <= turns.depth / least + 1e-9


def test_epsilon_against_an_independent_computation():
    """zCDP of the nodes that hold a row, over the spans of a run, by Bun and Steinke's conversion: to 1 %."""
    for z, rounds, every, delta in ((8.0, 40, 20, 1e-5), (20.0, 64, 0, 1e-5), (6.0, 30, 7, 1e-4)):
        layer, _ = stack_of(4, rounds=rounds, restart_every=every, noise_multiplier=z, delta=delta,
                            rows=dict.fromkeys("abcd", 100))
        span = every or rounds
        nodes = math.floor(math.log2(span)) + 1
        rho = math.ceil(rounds / span) * nodes / (2 * z * z)
        own = minimize_scalar(lambda a, rho=rho, delta=delta: rho * a + math.log1p(-1 / a) - (
            math.log(delta) + math.log(a)) / (a - 1), bounds=(1.01, 500), method="bounded").fun
        assert layer.foresee(layer._facts)["epsilon"] == pytest.approx(own, rel=0.01)
        again, _ = stack_of(4, rounds=rounds, restart_every=every, noise_multiplier=None, epsilon=own, delta=delta,
                            rows=dict.fromkeys("abcd", 100))
        assert again.noise_multiplier == pytest.approx(z, rel=0.01)


def test_a_span_is_paid_once_by_the_run_and_by_each_site(loop):
    rows = {f"c{i}": 40 for i in range(4)}
    layer, ring = stack_of(4, rounds=6, rows=rows, restart_every=3, epsilon=6.0, noise_multiplier=None, colluding=1)
    clients, states, method = {c: Trains(c, 5) for c in rows}, [layer.init(), ring.init()], Plain()
    engine = loop((method, layer, ring), clients)
    for _ in range(6):
        drive(method.round({"theta": {"w": torch.zeros(5)}}, list(rows)), engine, [layer, ring], states)
    says = layer.statement(states[0])
    assert 5.5 < says["epsilon"] <= 6.0 and set(says["clients"].values()) == {says["epsilon"]} and not says["void"]
    assert says["unit"] == "example" and says["sees"]["0"] < says["sees"]["1"] == pytest.approx(says["epsilon"])
    assert layer.foresee(layer._facts) == {**layer.foresee(layer._facts), "epsilon": pytest.approx(says["epsilon"]),
                                           "rounds_that_fit": 6, "layer": "dp_ftrl"}
    assert all(len(c.spent) == 2 and c.spent[0] == layer.turns.release(layer.noise_multiplier)
               for c in clients.values())
    with pytest.raises(BudgetSpent, match="budget is 6"):
        drive(method.round({"theta": {"w": torch.zeros(5)}}, list(rows)), engine, [layer, ring], states)


def test_a_site_reads_no_row_twice_in_a_span():
    turns, book = Tree(4), {}
    assert turns.begin(book, 1)
    turns.noise(book, 1, 0, {})
    assert not turns.begin(book, 3)
    turns.noise(book, 3, 1, {})
    for again in (1, 3):
        with pytest.raises(PayloadError, match=f"round {again} of dp_ftrl is asked for after round 3"):
            turns.begin(book, again)
    assert turns.begin(book, 5)


@pytest.mark.parametrize("knobs,local,why", [
    ({"mechanism": "banded"}, {}, "DPFTRL.mechanism = 'banded' is not allowed with unit 'example'"),
    ({"cohort": 3}, {}, "DPFTRL.cohort = 3 is not allowed with unit 'example'"),
    ({"unit": "client", "colluding": 1}, {}, "DPFTRL.colluding = 1 is not allowed with unit 'client'"),
    ({"restart_every": 12}, {}, r"DPFTRL.restart_every = 12 .* has 6 rows.*set it to 6 or less"),
    ({"restart_every": 4, "colluding": 3}, {}, r"DPFTRL.colluding = 3 .*opens when 3 of 4"),
    ({"restart_every": 4, "delta": 0.2}, {}, r"delta = 0.2 is not allowed with 30 units"),
    ({"restart_every": 4}, {"batch_size": 2}, r"batch_size = 2 .*a client has 9 rows.*set it to 3 or more"),
    ({"restart_every": 4}, {"steps": 3}, "3 steps a round.*set steps: 1"),
    ({"restart_every": 4}, {"optimizer": "adamw"}, "local.optimizer = 'adamw'.*'sgd'"),
    ({"restart_every": 4, "epsilon": 0.5, "noise_multiplier": 0.5}, {}, "DPFTRL.epsilon = 0.5 .*no number of rounds"),
])
def test_what_cannot_be_done_right_is_refused_before_training(knobs, local, why):
    spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.5, "steps": 1, "batch_size": 64, **local})
    with pytest.raises(RecipeError, match=why):
        DPFTRL(**{"unit": "example", "noise_multiplier": 1.0, **knobs}).bind(
            Facts({f"c{i}": 6 + i for i in range(4)}, 4, 12, spec, below=(SecAgg(),)))


def test_what_it_may_stand_over_and_under():
    layer = DPFTRL(unit="example", noise_multiplier=1.0)
    with pytest.raises(CompositionError, match=r"share of the noise only.*secagg or secagg_plus"):
        check_stack(SimpleNamespace(only_fits=True), [layer], {})
    with pytest.raises(CompositionError, match="'dp_ftrl' lets a client function learn"):
        check_stack(SimpleNamespace(only_fits=False), [layer, SecAgg()], {})
    assert clash(layer, SecAgg()) is clash(layer, SecAggPlus()) is None
    assert "last bit" in clash(layer, CodecQuant()) and "secagg_plus" in clash(layer, HECKKS())
    assert "same work twice" in clash(layer, DPSGD(noise_multiplier=1.0, noise="shared"))
    assert layer.algebra.whole and not DPFTRL(noise_multiplier=1.0).algebra.whole
