"""Consensus graph: what crosses in a step is a vector and its gradient, aligned neurons may come in any order, parts
find each other by id, and what is kept back at one owner is learned at none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import fedllm
from evidence.rigs.parts import NAMES, parted, parts
from fedllm.core.errors import CompositionError, DataError, QuorumError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.program import drive
from fedllm.data.load import load_federation
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import _own_rows
from fedllm.methods._consensus import Consensus, sinkhorn, stepped
from fedllm.methods._owners import drawn, mark
from fedllm.methods.registry import make_method
from fedllm.runs.recipe import load_recipe
from tests.methods.conftest import tried

OURS = tried("consensus_graph")


class Heard(Layer):
    """Keeps what was told and answered, by client function."""

    def __init__(self):
        self.said = []

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.said.append((fn.__name__ if callable(fn) else fn, client.id, msg, reply))
        return reply


def net_of(how, d=5, classes=3):
    net = how.start(d, classes, 0, torch.float64)
    draw = torch.Generator().manual_seed(0)
    return {n: t + 0.3 * torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in net.items()}


def wired(align="linear", graph="learned", missing="drop", **more):
    return Consensus(("a", "b", "c"), align, graph, 1, missing, **more)


def test_the_answer_in_closed_form():
    how, h = wired(), torch.rand(3, 2, 5, dtype=torch.float64)
    has = torch.tensor([[True, True], [True, False], [True, True]])
    net = net_of(how)
    z = how.logits(net, h, has)
    x = [5**0.5 * net[f"A/{k}"] @ h[i, 1] for i, k in enumerate("abc")]
    e = net["E"][:, [0, 2]].softmax(-1)  # of the second thing b has no part
    out = [x[i] + torch.relu((e[i, 0] * x[0] + e[i, 1] * x[2]) @ net["W/0"]) for i in (0, 2)]
    assert torch.allclose(z[1], (out[0] + out[1]) / 2 @ net["head"] + net["bias"], atol=1e-12)
    assert torch.allclose(wired(missing="zero").logits(net, h, ~has & has), net["bias"].expand(2, 3))
    given = wired(graph="given", edges=frozenset({frozenset("ab")}))
    assert given.adjacency(net).tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    mean = wired(missing="mean", graph="none").logits(net, h, has)
    assert torch.allclose(mean[1], (x[0] + x[2]) / 2 @ net["head"] + net["bias"], atol=1e-12)


def test_gradients_that_cross_are_autograds():
    how, h, g = wired(), torch.rand(3, 4, 5, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    net, has = net_of(how), torch.rand(3, 4) < 0.8
    live = {n: t.clone().requires_grad_() for n, t in net.items()}
    leaf = h.clone().requires_grad_()
    (how.logits(live, leaf, has) * g).sum().backward()
    slopes, down = how.slopes(net, h, has, g)
    assert torch.allclose(down, leaf.grad) and all(torch.allclose(slopes[n], live[n].grad) for n in net)
    assert not down[~has].any()  # who has no part learns nothing of a thing


def test_adam_is_torchs():
    net = {"w": torch.rand(3, dtype=torch.float64)}
    theirs, kept = net["w"].clone().requires_grad_(), {}
    optimizer = torch.optim.Adam([theirs], 0.1)
    for g in torch.rand(4, 3, dtype=torch.float64):
        theirs.grad = g.clone()
        optimizer.step()
        net, kept = stepped(net, {"w": g}, kept, 0.1)
    assert torch.allclose(net["w"], theirs.detach(), atol=1e-12)


def test_matching_finds_neurons_that_were_permuted():
    h, order = torch.rand(40, 6, dtype=torch.float64), torch.randperm(6, generator=torch.Generator().manual_seed(1))
    seen, has = torch.stack([h, h[:, order]]), torch.ones(2, 40, dtype=torch.bool)
    how = Consensus(("a", "b"), "hungarian", "none", 0, "drop")
    net = how.matched(how.start(6, 2, 0, torch.float64), seen, has, 0)
    assert torch.equal(net["A/b"] @ seen[1].T, h.T) and torch.equal(net["A/a"], torch.eye(6, dtype=torch.float64))
    assert not how.learns("A/b") and how.learns("head")
    p = sinkhorn(torch.rand(4, 4), 50)
    assert torch.allclose(p.sum(0), torch.ones(4)) and torch.allclose(p.sum(1), torch.ones(4), atol=1e-4)


def test_a_step_crosses_as_a_vector_and_its_gradient(begin):
    ear = Heard()
    run = begin("consensus_graph", layers=(ear,), engine="in_process", **OURS).go(1)
    shown = [(c, m, r) for fn, c, m, r in ear.said if fn == "show"]
    assert len(shown) == 2 * 4 and all(set(r) == {"h", "has"} and r["h"].shape == (len(m["ids"]), 8)
                                       for _, m, r in shown)
    assert all(torch.allclose(r["h"][r["has"]].norm(dim=1), torch.ones(()).double()) for _, _, r in shown)
    turned = [m for fn, _, m, _ in ear.said if fn == "turn"]
    assert len(turned) == 2 * 4 and all(set(m) == {"g"} and m["g"].shape[1] == 8 for m in turned)
    judged = [(c, m, r) for fn, c, m, r in ear.said if fn == "judge"]
    assert {c for c, _, _ in judged} == {"c0"}  # the labels' holder; and what it sends tells them:
    rows = {mark(r["id"]): r["label"] for r in run.world.federation.clients["c0"].train}
    assert all(r["g"].argmin(1).tolist() == [rows[i] for i in m["ids"]] for _, m, r in judged)


def test_encoders_rest_or_follow(begin, gap):
    first = begin("consensus_graph", **{**OURS, "steps": 1, "encoders": "frozen"}).go(1)
    before = {c: m["theta"] for c, m in first.engine.memory.items() if "theta" in m}
    first.go(1)
    assert len(before) == 4 and all(gap(first.engine.memory[c]["theta"], t) == 0 for c, t in before.items())
    moved = begin("consensus_graph", **{**OURS, "steps": 1}).go(1)
    before = {c: m["theta"] for c, m in moved.engine.memory.items() if "theta" in m}
    moved.go(1)
    apart = [gap(moved.engine.memory[c]["theta"], t) for c, t in before.items()]
    assert min(apart) > 0 and gap(*[m["theta"] for m in list(moved.engine.memory.values())[:2]]) > 0.01


def test_an_encoder_follows_the_things_of_which_it_has_a_part(begin, gap):
    ear = Heard()
    left = [begin("consensus_graph", layers=(ear,), engine=e, sizes=(9, 5), **OURS).go(2).engine.memory
            for e in ("in_process", "vectorized")]
    assert any(0 < r["has"].sum() < len(r["has"]) for fn, c, _, r in ear.said if fn == "show" and c == "c1")
    assert all(gap(left[0][c]["theta"], left[1][c]["theta"]) < 1e-10 for c in ("c0", "c1"))


def test_a_bridged_step_is_a_step_through_the_whole(begin):
    """theta_k - lr J^T dL/dh_k by the wire, and by autograd through owner and server at once."""
    from fedllm.local.objectives.prototypes import representation
    from fedllm.models.batch import collate

    knobs = {**OURS, "steps": 1, "own_rounds": 0, "batch": 4}
    ear = Heard()
    run = begin("consensus_graph", layers=(ear,), engine="in_process", **knobs).go(1)
    ids = next(m["ids"] for fn, _, m, _ in ear.said if fn == "show")
    z0 = {c: r["h"] for fn, c, _, r in ear.said if fn == "show"}
    model, how = run.world.model, run.method.wiring(("c0", "c1", "c2", "c3"))
    net = how.start(8, 3, model.seed, torch.float64)
    start = run.method.encoder(type("C", (), {"memory": {}, "model": model, "id": "c1"})())
    leaf = {n: t.double().requires_grad_() for n, t in start.items()}
    rows = run.world.rows("c1", "train")
    at = [next(i for i, r in enumerate(rows) if mark(r["id"]) == one) for one in ids]
    batch = collate([[run.world.encoded("c1", "train")[i] for i in at]], model.pad, "cpu")
    with model.using([{}], stacked={n: t[None] for n, t in leaf.items()}):
        model.stack.rows = len(at)
        h = representation(model, batch)
    has = torch.ones(4, len(ids), dtype=torch.bool)
    z = how.logits(net, torch.stack([z0["c0"], h, z0["c2"], z0["c3"]]), has)
    y = torch.tensor([next(r["label"] for r in run.world.rows("c0", "train") if mark(r["id"]) == i) for i in ids])
    torch.nn.functional.cross_entropy(z, y).backward()
    got = run.engine.memory["c1"]["theta"]
    for n, t in leaf.items():
        want = t.detach() - 0.1 * (t.grad if t.grad is not None else 0)
        assert torch.allclose(got[n].double(), want, atol=1e-6), n


def test_what_the_joint_answer_is_worth():
    got = parts("consensus_graph", 0, rounds=2, train=128, tests=128)
    assert got["over_best"] > 0 and got["permuted"] < 1e-4 and got["numbers_beside"] == 0
    assert parts("consensus_graph", 0, rounds=2, train=128, tests=128,
                 knobs={"align": "none"})["accuracy"] < got["accuracy"]


def test_a_silent_owner_is_a_missing_part_and_one_without_labels_ends_the_round(begin):
    run = begin("consensus_graph", **OURS).go(1)
    run.engine.infos["c3"] = replace(run.engine.infos["c3"], profile=replace(run.engine.infos["c3"].profile,
                                                                             availability=0.0))
    before = run.state["net"]["A/c3"]
    run.go(1)
    assert torch.isfinite(run.state["net"]["head"]).all() and run.state["net"]["A/c3"].shape == before.shape
    run.engine.infos["c0"] = replace(run.engine.infos["c0"], profile=run.engine.infos["c3"].profile)
    with pytest.raises(QuorumError):
        run.go(1)


def test_a_question_is_an_id(begin):
    run = begin("consensus_graph", **{**OURS, "encoders": "frozen"})
    with pytest.raises(QuorumError, match="once the server has learned"):
        asked(run, "x1")
    run.go(1)
    got = asked(run, "x11")
    assert got.clients == ("c3",) and got.answer in ("one", "two", "three") and 0 < got.confidence <= 1
    assert asked(run, "x1").clients == ("c0", "c1", "c2", "c3") and asked(run, "nobody's").answer is None


def asked(run, query):
    run.engine.begin(9)
    return drive(run.method.answer(query, run.world.infos(), state=run.state), run.engine, run.engine.stack[1:])


def test_batches_take_each_thing_once_before_any_again():
    marks = [mark(i) for i in range(5)]
    got = drawn(marks, 2, 5, np.random.default_rng(0))
    assert got == [sorted(marks)] * 2 and all(len(set(b)) == len(b) for b in drawn(marks, 3, 4,
                                                                                   np.random.default_rng(0)))


def rows_file(tmp_path, count=24):
    each = parted(0, count, False)
    file = tmp_path / "parts.jsonl"
    rows = [{"site": c, "patient": r["id"], "text": r["text"], "label": "wxyz"[r["label"]]}
            for c in NAMES[:3] for r in each[c]]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def recipe(tmp_path, **data):
    return {"model": {"name": "embedded"}, "space": {"name": "mlp_head", "size": 4}, "rounds": 1,
            "local": {"optimizer": "adamw", "lr": 0.01, "steps": 2}, "method": {"name": "consensus_graph", "steps": 2},
            "data": {"source": str(rows_file(tmp_path)), "task": "classification", "entity": "patient",
                     "client_test": 0.4, "partition": {"kind": "by_key", "key": "site"}, **data}}


def test_what_is_kept_back_at_one_owner_is_learned_at_none(tmp_path):
    fed = load_federation(recipe(tmp_path)["data"], 3)
    test, train = ([{r["id"] for r in getattr(s, part)} for s in fed.clients.values()] for part in ("test", "train"))
    assert len(fed.clients) == 3 and not fed.test and test == [test[0]] * 3 and train == [train[0]] * 3
    assert test[0] and not test[0] & train[0] and len(test[0] | train[0]) == 24
    assert test[0] != {r["id"] for r in load_federation(recipe(tmp_path)["data"], 4).clients["site-0"].test}


def test_a_site_keeps_back_what_the_same_client_of_a_simulation_does(tmp_path):
    told = {**recipe(tmp_path), "seed": 3}
    fed, file = load_federation(told["data"], 3), tmp_path / "own.jsonl"
    lines = [one for one in rows_file(tmp_path).read_text().splitlines() if json.loads(one)["site"] == "site-1"]
    file.write_text("\n".join(lines))
    told["data"] = {**told["data"], "source": str(file), "labels": list("wxyz")}
    found = _own_rows(load_recipe(told), "site-1", SiteSettings(data=str(file), store=str(tmp_path / "s")))
    for part in ("train", "test"):
        assert [r["id"] for r in getattr(found.clients["site-1"], part)] == [
            r["id"] for r in getattr(fed.clients["site-1"], part)]


def test_a_recipe_runs_answers_and_is_tested_by_its_own_labels(tmp_path):
    result = fedllm.run(recipe(tmp_path), root=tmp_path / "runs")
    assert set(result.evaluation["clients"]) == {"site-0"} and result.evaluation["global"] is None
    assert {"accuracy", "alone", "loss"} <= set(result.evaluation["clients"]["site-0"])


@pytest.mark.parametrize("data, why", [
    ({"test": 0.1}, r"data\.test = 0\.1: with data\.entity a thing's parts stay with their owners"),
    ({"fields": {"id": "site"}}, r"data\.fields\.id = 'site': data\.entity = 'patient' is the id"),
    ({"source": "grouped:x"}, r"data\.entity: allowed with rows as they are")])
def test_rows_that_are_no_parts_are_refused(tmp_path, data, why):
    with pytest.raises((RecipeError, DataError), match=why):
        load_federation({**recipe(tmp_path)["data"], **data}, 0)


@pytest.mark.parametrize("knobs, why", [
    ({"labels_at": "x"}, r"method\.labels_at = 'x' is no client; allowed are a, b"),
    ({"graph": "given"}, r"method\.edges = \[\]: allowed are edges with graph 'given'"),
    ({"graph": "given", "edges": ("a c",)}, r"method\.edges: 'a c' is not two clients")])
def test_owners_that_are_not_there_are_refused(knobs, why):
    with pytest.raises(RecipeError, match=why):
        make_method("consensus_graph", **knobs).check_clients(["a", "b"], 2)
    with pytest.raises(RecipeError, match=r"clients\.per_round = 1 of 2 clients"):
        make_method("consensus_graph").check_clients(["a", "b"], 1)


def test_what_does_not_fit_is_refused(begin):
    method = make_method("consensus_graph")
    with pytest.raises(CompositionError, match="what owners tell is a hidden layer"):
        method.check(begin("fedavg").world.model)
    with pytest.raises(DataError, match="client 'b' has rows without 'id'"):
        method.check_rows((), {"a": [{"id": 1}], "b": [{}]})
    with pytest.raises(DataError, match="client 'a' holds the labels, and no other has a part"):
        method.check_rows((), {"a": [{"id": 1}], "b": [{"id": 2}]})
    with pytest.raises(CompositionError, match=r"method\.batch = 32 and local\.batch_size = 8"):
        make_method("consensus_graph", encoders="trained").check_work(type("L", (), {"batch_size": 8}), 1)
    run = begin("consensus_graph", **OURS)
    run.world.federation.clients["c1"].train.append(run.world.federation.clients["c1"].train[0])
    with pytest.raises(Exception, match="client 'c1' has two rows of id 'x0'"):
        run.go(1)
    with pytest.raises(DataError, match="rows of the global test are nobody's"):
        drive(run.method.evaluate(run.state, run.world.infos(), "global"), run.engine)
