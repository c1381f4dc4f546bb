"""Sparse sums: the places are open, every value is masked, and what stays behind comes back."""

import math

import pytest
import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, QuorumError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.payload import pack, part
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.privacy._ring import chi_square
from fedllm.privacy.composition import check_stack
from fedllm.privacy.thgs_secagg import THGSSecAgg
from fedllm.wire.codec_powersgd import CodecPowerSGD

NAMES = [["delta/model.layers.0.w", 30], ["delta/model.layers.2.w", 10]]


class Ship:
    """Each client sends its vector, cut into two blocks, at a weight of its own."""

    def round(self, state, clients):
        out = yield Ask(self.local, {c: {} for c in clients})
        return out

    @on_client(reduce=Mean())
    def local(self, msg, client):
        x = client.x
        return pack(delta={"model.layers.0.w": x[:30], "model.layers.2.w": x[30:]}, n=client.n, loss=1.5)


def flat(out):
    d = part(out.value, "delta")
    return torch.cat([d["model.layers.0.w"], d["model.layers.2.w"]])


def mean(clients, pick=lambda x: x):
    n = sum(c.n for c in clients.values())
    return sum(pick(c.n * c.x) for c in clients.values()) / n


def test_at_full_density_it_is_the_plain_mean(loop, people):
    clients, layer = people(5), THGSSecAgg(density=1.0)
    out = drive(Ship().round(None, clients), loop((Ship(), layer), clients), [layer])
    torch.testing.assert_close(flat(out), mean(clients), atol=2e-5, rtol=0)
    assert out.value["n"] == 15 and out.value["loss"] == pytest.approx(1.5, abs=1e-5)
    assert out.answered == tuple(clients) and not out.missing


def test_the_sum_is_right_at_the_union_of_the_places_and_zero_elsewhere(loop, people):
    clients, layer = people(5), THGSSecAgg(density=0.1, density_min=0.1)
    out = drive(Ship().round(None, clients), loop((Ship(), layer), clients), [layer])
    union = sorted({i for c in clients.values()
                    for i in layer.largest(c.n * c.x, NAMES, 0.1).tolist()})
    want = torch.zeros(40)
    want[union] = mean(clients)[union]
    torch.testing.assert_close(flat(out), want, atol=2e-5, rtol=0)
    assert 4 <= len(union) <= 20


def test_what_stays_behind_comes_back(loop, people):
    """sum of what was delivered over rounds + what clients still hold = sum of all updates."""
    clients, layer = people(4), THGSSecAgg(density=0.05, density_min=0.01)
    engine, states = loop((Ship(), layer), clients), [layer.init()]
    got = sum(flat(drive(Ship().round(None, clients), engine, [layer], states)) for _ in range(6))
    held = sum(c.memory["_thgs/Ship.local"]["u"].index_fill(0, c.memory["_thgs/Ship.local"]["at"].long(), 0.0)
               for c in clients.values()) / 10
    torch.testing.assert_close(got + held, 6 * mean(clients), atol=1e-4, rtol=0)
    assert held.norm() > 0.1
    forget = THGSSecAgg(density=0.05, density_min=0.01, error_feedback=False)
    once = [flat(drive(Ship().round(None, clients), loop((Ship(), forget), clients), [forget])) for _ in range(2)]
    assert torch.equal(once[0] != 0, once[1] != 0)  # nothing is remembered


def test_a_lost_reply_comes_back_whole(loop, people):
    clients, layer = people(5), THGSSecAgg(density=0.2, density_min=0.01)
    states, first = [layer.init()], {"calls": 0}

    def spoil(phase, cid, reply):  # c04's masked vector never arrives in the first round
        if cid == "c04" and "ring" in reply and not first["calls"]:
            first["calls"] = 1
            return {"refused": "lost on the way"}
        return reply

    engine = loop((Ship(), layer), clients, spoil=spoil)
    out = drive(Ship().round(None, clients), engine, [layer], states)
    assert "c04" in out.missing and out.value["n"] == 10
    before = clients["c04"].memory["_thgs/Ship.local"]
    assert len(before["at"]) > 0
    drive(Ship().round(None, clients), engine, [layer], states)
    torch.testing.assert_close(clients["c04"].memory["_thgs/Ship.local"]["u"], 2 * 5 * clients["c04"].x)


def test_the_server_sees_places_and_noise(loop, people):
    clients, layer = people(5, size=40_000), THGSSecAgg(density=0.3)

    class Big(Ship):
        @on_client(reduce=Mean())
        def local(self, msg, client):
            return pack(delta={"w": client.x}, n=client.n)

    engine = loop((Big(), layer), clients)
    drive(Big().round(None, clients), engine, [layer])
    rings = [r["ring"] for _, _, r in engine.seen if "ring" in r]
    assert len(rings) == 5 and all(abs(chi_square(r) - 1) < 0.35 for r in rings)
    floats = [(p, k) for p, _, r in engine.seen for k, v in r.items()
              if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert not floats
    sent, whole = sum(4 * len(r) for r in rings), 5 * 4 * 40_000
    assert sent < whole


def test_thirty_percent_fall_silent(loop, people):
    clients, layer = people(10), THGSSecAgg(density=1.0, threshold=0.5)
    engine = loop((Ship(), layer), clients, silent={"consent": ["c01"], "unmask": ["c02"], "share": ["c03"]})
    out = drive(Ship().round(None, clients), engine, [layer])
    alive = {c: v for c, v in clients.items() if c in out.answered}
    assert set(clients) - set(alive) == {"c03"}
    torch.testing.assert_close(flat(out), mean(alive), atol=3e-5, rtol=0)


def test_too_few_places_open_nothing(loop, people):
    clients, layer = people(5), THGSSecAgg()
    engine = loop((Ship(), layer), clients, silent={"local": ["c00", "c01"]})
    with pytest.raises(QuorumError):
        drive(Ship().round(None, clients), engine, [layer])
    assert not [r for _, _, r in engine.seen if "ring" in r]


def test_shares_fall_with_depth_and_time():
    layer = THGSSecAgg(density=0.4, density_min=0.1, depth_decay=0.5, time_floor=0.25)
    layer.bind(Facts({f"c{i}": 4 for i in range(4)}, 4, 5))
    assert [round(layer.at(t), 3) for t in range(5)] == [0.4, 0.325, 0.25, 0.175, 0.1]
    at = layer.largest(torch.arange(40.0), NAMES, 0.4)
    assert int((at < 30).sum()) == math.ceil(0.4 * 30) and int((at >= 30).sum()) == math.ceil(0.1 * 10)


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
def test_on_a_real_model_both_engines_give_the_dense_sum(tiny, engine):
    ends = []
    for layers in ((), (THGSSecAgg(density=1.0),)):
        run, method, state, world = tiny(layers=layers, engine=engine)
        run.begin(0)
        ends.append(drive(method.round(state, world.infos()), run, layers)["theta"])
    for name, t in ends[0].items():
        torch.testing.assert_close(ends[1][name], t, atol=1e-4, rtol=0)


def test_bad_knobs_and_stacks_are_refused():
    with pytest.raises(RecipeError, match="density = 0 is not allowed"):
        THGSSecAgg(density=0)
    with pytest.raises(CompositionError, match="would drop what the first has coded; use secagg"):
        check_stack(Ship(), [CodecPowerSGD(), THGSSecAgg()], {"local": Mean()})
    with pytest.raises(CompositionError, match="hides a client among at least 3"):
        THGSSecAgg().bind(Facts({"a": 1, "b": 1}, 2, 3))
