"""Trees of servers: equal to the flat sum in every shape, with secure aggregation on either side."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from fedllm.core.ask import Ask
from fedllm.core.errors import CompositionError, QuorumError, RecipeError
from fedllm.core.program import drive
from fedllm.core.tree import check_tree, climb, groups, plant, servers
from fedllm.methods.registry import make_method
from fedllm.privacy.composition import clash
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.privacy.secagg import SecAgg
from fedllm.privacy.thgs_secagg import THGSSecAgg
from fedllm.spaces.lora import factors
from fedllm.wire import codec
from fedllm.wire.codec_topk_ef import CodecTopKEF
from fedllm.wire.server_tree import ServerTree

SIZES = (5, 7, 9, 12, 6, 8, 5)
IDS = [f"c{i}" for i in range(7)]
SHAPES = [{"fan_out": (2,)}, {"fan_out": (3, 2), "deal": "turns"}, {"fan_out": ()}, {"fan_out": (9,)},
          {"tree": ("c0", ("c1", ("c2", "c3")), (), ((("c4",), "c5"), "c6"))}]


@pytest.fixture(name="run")
def run_fixture(begin):
    return functools.partial(begin, sizes=SIZES)


def products(run):
    """B A of every module: factors themselves may differ by a sign."""
    theta, base = run.method.served(run.state)
    return {path: b @ a for path, (b, a) in factors(theta).items()} | (base or {})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["fedavg", "flexlora", "fedex_lora"])
def test_any_sum_on_any_tree_is_the_flat_sum(run, gap, name, shape):
    flat, tree = run(name).go(2), run(name, layers=(ServerTree(**shape),)).go(2)
    assert gap(products(flat), products(tree)) < 1e-10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hierfavg_with_one_edge_round_is_fedavg(run, gap, shape):
    flat, tree = run("fedavg").go(2), run("hierarchical", **shape).go(2)
    assert gap(flat.state["theta"], tree.state["theta"]) < 1e-12


@pytest.mark.parametrize("kappa", [1, 3])
def test_hierfavg_runs_alike_on_both_engines(run, gap, kappa):
    knobs = {"kappa_2": kappa, "fan_out": (3,)}
    one, other = (run("hierarchical", engine=e, **knobs).go(2) for e in ("in_process", "vectorized"))
    assert gap(one.state["theta"], other.state["theta"]) < 1e-10
    assert one.state["wide_area"] == other.state["wide_area"]


def test_edge_rounds_are_fedavg_within_the_edge(run, gap):
    """One edge with kappa_2 = 3 is three rounds of FedAvg, but for the draws of batches: with full batches none."""
    whole = {"local": {"batch_size": 16, "epochs": 1}}
    edge, flat = run("hierarchical", kappa_2=3, fan_out=(1,), **whole).go(1), run("fedavg", **whole).go(3)
    assert gap(edge.state["theta"], flat.state["theta"]) < 1e-12


@pytest.mark.parametrize("above", [True, False])
def test_secure_aggregation_on_either_side(run, gap, above):
    layers = (SecAgg(), ServerTree(fan_out=(2,))) if above else (ServerTree(fan_out=(2,)), SecAgg())
    plain, masked = run("fedavg", dtype=torch.float32).go(2), run("fedavg", dtype=torch.float32, layers=layers)
    masked.go(2)
    assert gap(plain.state["theta"], masked.state["theta"]) < 1e-4
    phases = {e["phase"] for e in masked.engine.record.events if e["kind"] == "wire"}
    assert "SecAgg.unmask" in phases


def test_an_edge_of_two_cannot_hide_its_clients(run):
    with pytest.raises(CompositionError, match="secagg hides a client among at least 3 and 2 take part"):
        run("fedavg", layers=(ServerTree(fan_out=(3,)), SecAgg())).go(1)


def test_bytes_between_servers_fall_by_the_fan_out(begin):
    r, layer = begin("fedavg", sizes=(5,) * 8), ServerTree(fan_out=(2,))
    r.engine.stack = (r.method, layer)
    states = [layer.init()]
    drive(r.method.round(r.state, r.world.infos()), r.engine, (layer,), states)
    assert states[0]["flat_up"] == 4 * states[0]["up"] > 0 and states[0]["flat_down"] == 4 * states[0]["down"] > 0
    assert states[0]["flat_down"] == 8 * codec.size({f"theta/{k}": v for k, v in r.state["theta"].items()})


def test_a_silent_edge_is_left_out_and_the_quorum_counts_all(run, gap):
    r = run("fedavg", layers=(ServerTree(tree=(("c0", "c1"), tuple(IDS[2:]))),))
    for c in ("c0", "c1"):
        profile = dataclasses.replace(r.engine.infos[c].profile, availability=0.0)
        r.engine.infos[c] = dataclasses.replace(r.engine.infos[c], profile=profile)
    r.go(1)
    want = run("fedavg").go(1, IDS[2:])
    assert gap(r.state["theta"], want.state["theta"]) < 1e-12
    for c in r.engine.infos:
        profile = dataclasses.replace(r.engine.infos[c].profile, availability=0.0)
        r.engine.infos[c] = dataclasses.replace(r.engine.infos[c], profile=profile)
    with pytest.raises(QuorumError, match="0 of 7 clients answered under the servers of the tree, 1 needed"):
        r.go(1)


def test_a_tree_climbs_deepest_first():
    node = plant([str(i) for i in range(8)], (2, 2))
    assert [p for p, _ in servers(node)] == [(), (0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1)]
    assert groups(node, ["0", "7"]) == {(0, 0): ["0"], (1, 1): ["7"]}
    total, sent = climb({p: sum(map(int, c)) for p, c in groups(node, "01234567").items()},
                        lambda acc, x: x if acc == {} else acc + x)
    assert total == 28 and sent == {(0, 0): 1, (0, 1): 5, (1, 0): 9, (1, 1): 13, (0,): 6, (1,): 22}


@pytest.mark.parametrize("make, says", [
    (lambda: ServerTree(fan_out=(0,)), r"fan_out = \[0\]: allowed are whole numbers from 1"),
    (lambda: ServerTree(tree=("c0", 3)), "a tree holds 3: allowed are client ids"),
    (lambda: check_tree(("c0", ("c0",)), ["c0"], "tree"), "'c0' stands at 2 places"),
    (lambda: check_tree(("c0", ("c9",)), ["c0"], "tree"), "'c9' is no client"),
    (lambda: make_method("hierarchical", tree=("c0",)).check_clients(["c0", "c1"], 2), "c1 hang under no server"),
    (lambda: make_method("hierarchical", kappa_2=0), "kappa_2 = 0 is not allowed"),
])
def test_trees_that_cannot_be(make, says):
    with pytest.raises(RecipeError, match=says):
        make()


@pytest.mark.parametrize("above, below, says", [
    (ServerTree(), CodecTopKEF(), "list layer 'codec_topk_ef' first"),
    (ServerTree(), DPFedAvg(noise_multiplier=1.0), "list layer 'dp_fedavg' first"),
    (CodecTopKEF(), ServerTree(), "do not add up"),
    (THGSSecAgg(), ServerTree(), "use secagg, whose masked sum")])
def test_what_does_not_add_up_is_refused(above, below, says):
    assert says in (clash(above, below) or "")


def test_single_replies_and_medians_are_refused():
    with pytest.raises(CompositionError, match="needs every single reply"):
        ServerTree().check(make_method("fedkseed"), {"local": None})
    with pytest.raises(CompositionError, match="use fedavg with the layers dp_fedavg, server_tree"):
        make_method("hierarchical").check_layers([DPFedAvg(noise_multiplier=1.0)])


def test_an_ask_may_need_no_answer():
    ask = Ask(make_method("fedavg").local, {"a": {}, "b": {}})
    assert [dataclasses.replace(ask, quorum=q).needed(5) for q in (None, 0, 1, 0.1, 1.0)] == [5, 0, 1, 1, 2]
