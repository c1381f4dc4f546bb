"""The meter: every joule by hand, no padded token, the same on both engines, and it says what it did not measure."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evidence.pages.composition import examples
from evidence.rigs.energy import dealt
from evidence.rigs.trials import Trial, _chain, _tiny_llama
from fedllm import run
from fedllm.core.ask import Replies
from fedllm.core.client import ClientInfo, Fleet, Profile
from fedllm.core.energy import DEVICES, LINKS, device_of, link_of
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.payload import digest, norm, sub
from fedllm.core.select import Turn
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local import power
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.privacy.composition import check_stack, clash
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.privacy.secagg import SecAgg
from fedllm.runs.build import build, make_layers
from fedllm.runs.folder import RunFolder
from fedllm.runs.profiles import make_profiles
from fedllm.runs.recipe import Recipe, load_recipe
from fedllm.selectors.registry import make_selector
from fedllm.wire.edge_energy import TOLD, EdgeEnergy, heard, joules_of


def trial(*above, kind=Vectorized, fleet=None, profiles=None, method="fedavg", cut=True, **knobs):
    """Two rounds' worth of a tiny Llama; rows of unequal length unless `cut` is false."""
    fed = _chain(0)
    if cut:
        for i, shard in enumerate(fed.clients.values()):
            for j, e in enumerate(shard.train):
                n = 4 + (3 * i + 5 * j) % 12
                shard.train[j] = type(e)(e.ids[:n], e.labels[:n], n - 1)
    model = Model(_tiny_llama(32, 0).double(), None, "generation", make_space_lora(), seed=0, fast_kernels=False)
    spec = LocalSpec(optimizer="sgd", lr=0.1, steps=3, batch_size=4)
    world = World(model, fed, spec, 0, dealt(fed.clients) if profiles is None else profiles, fleet=fleet)
    return Trial(method, world, {}, kind, [*above, EdgeEnergy(**knobs)])


def make_space_lora():
    from fedllm.spaces import make_space

    return make_space("lora", rank=2)


def said(made):
    return made.layers[-1].report(made.states[-1])


def test_every_joule_by_hand():
    """One client, one round, constants in round numbers, time declared."""
    made = trial(profiles={}, fleet=Fleet(step_seconds=2.0), utilization=0.5,
                 device={"flops": 1e9, "active_watts": 7.0, "idle_watts": 2.0},
                 link={"bandwidth": 1000.0, "latency": 0.25, "up": 3e-6, "down": 1e-6},
                 server_device={"flops": 1e9, "active_watts": 100.0, "idle_watts": 30.0},
                 server_link={"up": 4e-7, "down": 2e-7})
    made.rounds(1, made.world.infos()[:1])
    got, wire = said(made), made.engine.record.totals()
    up, down = wire["up"], wire["down"]
    compute, receive, send = 3 * 2.0, 0.25 + down / 1000, 0.25 + up / 1000
    assert (got["bytes_up"], got["bytes_down"]) == (up, down)
    assert (got["compute_seconds"], got["receive_seconds"], got["send_seconds"]) == (compute, receive, send)
    assert got["joules_by"]["client"] == pytest.approx(7 * compute + 2 * (receive + send))
    assert got["joules_by"]["link"] == pytest.approx(8 * (up * (3e-6 + 2e-7) + down * (1e-6 + 4e-7)))
    assert got["joules_by"]["server"] == pytest.approx(30 * (compute + receive + send) + 100 * (up / 2) / 1e9)
    assert got["granularity"] == pytest.approx(compute / (receive + send)) and got["wait_seconds"] == 0
    assert got["mfu"] == pytest.approx(got["flops"] / (compute * 1e9))
    assert got["tokens_per_joule"] * got["joules"] == pytest.approx(got["tokens"], rel=1e-9)
    assert sum(got["shares"].values()) == pytest.approx(1, abs=1e-9) and got["estimated"] is True


def test_clients_wait_for_the_last_at_idle_power():
    slow = {"client-1": Profile(speed=0.5)}
    made = trial(profiles=slow, fleet=Fleet(step_seconds=1.0), link={"bandwidth": 1e12, "up": 0, "down": 0})
    made.rounds(1, made.world.infos()[:2])
    assert said(made)["wait_seconds"] == pytest.approx(3.0, abs=1e-5) and said(made)["compute_seconds"] == 9.0
    assert said(made)["server_seconds"] == pytest.approx(6.0, abs=1e-5)


def test_padding_is_no_token():
    made = trial()
    seen = []
    fit = made.engine.answers
    from fedllm.local.requests import Fit

    def watched(jobs):
        from fedllm.engines import carry

        before = carry.RUNNERS[Fit]
        carry.RUNNERS[Fit] = lambda requests, limits: seen.extend(requests) or before(requests, limits)
        try:
            yield from fit(jobs)
        finally:
            carry.RUNNERS[Fit] = before

    made.engine.answers = watched
    made.rounds(1)
    tokens = sum(len(r.rows[i].ids) for r in seen for at in r.plan for i in at)
    assert said(made)["tokens"] == tokens < 16 * 4 * 3 * 4


def test_both_engines_book_the_very_same_and_training_is_untouched():
    plain = trial()
    plain.layers, plain.states = [], []
    plain.engine = Vectorized((plain.method,), plain.world)
    one, other = (trial(kind=k).rounds(2) for k in (InProcess, Vectorized))
    assert said(one) == said(other)
    assert digest(plain.rounds(2).state) == digest(other.state)


def test_half_the_bandwidth_is_half_the_granularity():
    g = []
    for bandwidth in (2e5, 1e5):
        made = trial(profiles={}, link={"bandwidth": bandwidth, "up": 1e-7, "down": 1e-7}).rounds(1)
        g.append(said(made)["granularity"])
    assert g[1] / g[0] == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("name", sorted(examples()))
def test_it_meters_every_layer_and_stands_last(name):
    layer, meter = examples()[name], EdgeEnergy()
    why = clash(layer, meter)
    assert (layer.algebra.kind == "dp") == bool(why and "without noise; use no energy section" in why)
    assert "it counts what is sent; list layer" in clash(meter, layer)


def test_it_runs_under_secure_aggregation():
    made = trial(SecAgg()).rounds(1)
    plain = trial().rounds(1)
    assert norm(sub(made.state["theta"], plain.state["theta"])) < 1e-4
    wire = made.engine.record.totals()
    assert (said(made)["bytes_up"], said(made)["bytes_down"]) == (wire["up"], wire["down"])


def test_silent_clients_are_counted_as_unheard():
    profiles = {c: Profile(availability=0.0) for c in ("client-0", "client-1")}
    assert said(trial(profiles=profiles).rounds(2))["unheard"] == 4


def test_asynchronous_clients_do_not_wait():
    from fedllm.methods.registry import make_method

    made = trial(fleet=Fleet(), profiles={"client-1": Profile(speed=0.1)})
    made.method = make_method("fedbuff", buffer_size=2, concurrency=3)
    made.engine = Vectorized((made.method, *made.layers), made.world)
    made.state = made.method.init(made.world.model)
    assert said(made.rounds(3))["wait_seconds"] == 0


def test_counters_that_cannot_be_read_are_skipped_with_the_reason_and_not_faked(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "POWERCAP", tmp_path)
    monkeypatch.setattr(power, "_nvml", lambda: ({}, "NVML: no library"))
    got = said(trial(kind=InProcess, measure=True).rounds(1))
    assert got["estimated"] is True and got["measured"] == 0
    assert got["not_measured"] == f"not measured: RAPL: {tmp_path} lists no processor package; NVML: no library"
    plain = said(trial(kind=InProcess).rounds(1))  # whose replies do not have the reason to carry
    assert got["joules_by"]["client"] == pytest.approx(plain["joules_by"]["client"], rel=1e-3)
    assert got["compute_seconds"] == plain["compute_seconds"]
    assert said(trial())["not_measured"] == "energy.measure is off"


def test_counters_that_can_be_read_are_used(tmp_path, monkeypatch):
    """A folder like the kernel's, whose counter goes up by 5 J with every reading."""
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("1000000000\n")
    state = {"uj": 0}
    read = power._rapl

    def ticking(root):
        state["uj"] += 5_000_000
        (package / "energy_uj").write_text(f"{state['uj']}\n")
        return read(tmp_path)

    monkeypatch.setattr(power, "_rapl", ticking)
    monkeypatch.setattr(power, "_nvml", lambda: ({}, ""))
    made = trial(kind=InProcess, measure=True, profiles={}, link={"up": 0.0},
                 device={"flops": 1e12, "active_watts": 7.0, "idle_watts": 0.0}).rounds(1)
    got = said(made)
    assert got["measured"] == 4 and got["estimated"] is False and got["joules_by"]["client"] == pytest.approx(20.0)


def test_thrifty_clients_are_asked_more():
    told = torch.zeros(len(TOLD), dtype=torch.float64)
    told[TOLD.index("compute_joules")], told[TOLD.index("radio_joules")] = 3.0, 1.0
    told[TOLD.index("idle_watts")], told[TOLD.index("send_seconds")] = 2.0, 0.5
    assert joules_of(dict(zip(TOLD, told.tolist(), strict=True))) == 5.0
    odd = ("a lot", told[:3], -told, told.int(), {"x": 1})
    out = Replies(notes={"c0": {"energy": told}, **{f"c{i}": {"energy": v} for i, v in enumerate(odd, 1)}})
    assert set(heard(out)) <= {"c0", "c4"}  # what is no bill is passed over
    infos, chooser = [ClientInfo(f"c{i}", 5) for i in range(20)], make_selector("by_energy", {"alpha": 1.0})
    state = {"joules": {f"c{i}": 1.0 if i < 10 else 9.0 for i in range(20)}}
    count = dict.fromkeys((c.id for c in infos), 0)
    for r in range(300):
        for c in chooser.pick(Turn(infos, 2, r, np.random.default_rng(r), state, None, {})):
            count[c] += 1
    thrifty = sum(count[f"c{i}"] for i in range(10))
    assert 0.85 < thrifty / 600 < 0.93  # 0.9 with replacement
    kinds = [ClientInfo(f"c{i}", 5, Profile(device="phone" if i % 2 else "laptop")) for i in range(4)]
    few, seen = {"joules": {"c0": 99.0, "c1": 1.0}}, []  # c2 and c3 were never heard: c3 is a phone, as c1
    for r in range(200):
        seen += chooser.pick(Turn(kinds, 1, r, np.random.default_rng(r), few, None, {}))
    assert seen.count("c3") > 80 and seen.count("c2") < 10
    with pytest.raises(RecipeError, match="alpha"):
        make_selector("by_energy", {"alpha": -1.0})


RECIPE = {"rounds": 2, "local": {"lr": 0.02}, "evaluate": {"max_new_tokens": 4, "samples": 0, "clients": False}}


@pytest.fixture
def recipe(tmp_path, tiny_llama_folder):
    rows = [{"prompt": f"say the word {w}", "response": w} for w in ("red", "green", "cat", "dog") * 10]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"source": str(source), "partition": {"kind": "iid", "clients": 4}}
    return {**RECIPE, "name": "metered", "model": tiny_llama_folder, "data": data}


def test_a_recipe_meters_its_run_in_record_and_report(tmp_path, recipe):
    bare = run(recipe, root=tmp_path)
    done = run({**recipe, "energy": {"device": ["phone", "jetson_orin"], "link": "lte"}, "select": "by_energy",
                "engine": {"kind": "in_process"}}, root=tmp_path)
    got = done.reports["EdgeEnergy"]
    assert done.bytes["up"] > bare.bytes["up"] and done.state_digest
    each = [json.loads(line) for line in (done.folder / "events.jsonl").read_text().splitlines()]
    rounds = [e["energy"] for e in each if e["kind"] == "round"]
    assert len(rounds) == 2 and sum(r["joules"] for r in rounds) == pytest.approx(got["joules"])
    kept = RunFolder.open(done.folder).load()[1]["layers"]
    assert [set(s) for s in kept] == [{"joules"}, {"total", "round", "skipped"}]
    assert kept[1]["total"]["tokens"] == got["tokens"] and set(kept[0]["joules"]) <= {f"client-0{i}" for i in range(4)}
    assert got["bytes_up"] == done.bytes["by_phase"]["FedAvg.local"]["up"]
    page = (done.folder / "report.html").read_text()
    assert "tokens a joule" in page and "energy.measure is off" in page
    assert "tokens a joule" not in (bare.folder / "report.html").read_text()
    assert got["constants"]["devices"]["phone"]["active_watts"] == DEVICES["phone"].active_watts
    assert done.joules_from.startswith("not measured: RAPL") or done.joules is not None


def test_links_and_devices_are_dealt_and_give_way_to_what_is_declared(recipe):
    spec = Recipe.model_validate({"energy": {"device": ["phone", "laptop"], "link": ["wifi", "lte"]},
                                  "clients": {"profiles": {"c": {"link": "5g"}, "d": {"bandwidth": 7.0}}}})
    made = make_profiles(spec, ["a", "b", "c", "d"])
    assert [made[c].device for c in "abcd"] == ["phone", "laptop", "phone", "laptop"]
    assert [made[c].link for c in "abcd"] == ["wifi", "lte", "5g", "lte"]
    assert made["c"].bandwidth == LINKS["5g"].bandwidth and made["d"].bandwidth == 7.0
    assert made["b"].latency == LINKS["lte"].latency
    custom = Recipe.model_validate({"energy": {"link": {"bandwidth": 5.0}}})
    assert make_profiles(custom, ["a"])["a"].bandwidth == 5.0 and make_profiles(custom, ["a"])["a"].link is None
    assert make_profiles(Recipe(), ["a"])["a"].bandwidth is None


@pytest.mark.parametrize(("energy", "says"), [
    ({"link": "wfi"}, "energy.link = 'wfi' is unknown; did you mean 'wifi'? Allowed: wifi, lte, 5g, lan, or a mapping"),
    ({"device": ["phone", "fridge"]}, "energy.device = 'fridge' is unknown"), ({"device": []}, "energy.device"),
    ({"device": {"watts": 3.0}}, "energy.device.watts: unknown key"),
    ({"device": {"active_watts": 1.0, "idle_watts": 2.0}}, "idle_watts = 2.0 is not allowed; it must be <= active"),
    ({"link": {"bandwidth": 0.0}}, "bandwidth = 0.0"), ({"utilization": 1.5}, "utilization"),
    ({"measure": True}, "energy.measure = true: the clients of engine.kind = 'vectorized'"),
    ({"joules": 1}, "energy.joules: unknown key")])
def test_bad_input_is_named(recipe, energy, says):
    with pytest.raises(RecipeError) as caught:
        build(load_recipe({**recipe, "energy": energy}))
    assert says in str(caught.value)


def test_what_does_not_fit_is_refused(recipe):
    with pytest.raises(CompositionError, match="no meter tells it; give the recipe an energy section"):
        make_layers(load_recipe({**recipe, "select": "by_energy"}))
    with pytest.raises(CompositionError, match="lets out is read from rows without noise; use no energy section"):
        check_stack(None, [DPFedAvg(noise_multiplier=1.0), EdgeEnergy()], {})
    profiles = {"client-0": {"device": "fridge"}}
    with pytest.raises(RecipeError, match=r"clients.profiles.client-0.device = 'fridge' is not allowed"):
        make_profiles(Recipe.model_validate({"clients": {"profiles": profiles}}), ["client-0"])
    assert link_of("lan", "x") is LINKS["lan"] and device_of({"flops": 2.0}, "x").flops == 2.0
