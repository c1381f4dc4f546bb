"""Clients that differ: prototypes, shared centroids, one head under many designs, two adapters, sub-models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedllm.core.errors import CompositionError, ModelError, PayloadError, RecipeError
from fedllm.core.payload import pack, part, tensor_bytes
from fedllm.engines import InProcess
from fedllm.local.fit import run_fits
from fedllm.local.objectives.beside import DOWN
from fedllm.local.objectives.prototypes import Prototypes
from fedllm.local.requests import Fit, Limits
from fedllm.methods.personalization.fedpcl import mean_of
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.spaces import make_space
from fedllm.spaces.order import ordered, units_of
from tests.methods.conftest import begin as start
from tests.methods.conftest import llama

RNG = torch.Generator().manual_seed(0)
TEXTS = {"task": "classification"}
HEAD = {**TEXTS, "space": "mlp_head", "space_knobs": {"size": 6}}
DUAL = {**TEXTS, "space": "dual_adapter", "space_knobs": {"size": 4}}


def test_fedpcl_sends_a_vector_a_class_and_nothing_else(begin):
    run = begin("fedpcl", least=1, **HEAD).go(2)
    for c, mine in run.state["sets"].items():
        have = {str(r["label"]) for r in run.world.federation.clients[c].train}
        assert mine.keys() == have and all(v.shape == (6,) for v in mine.values())
    few = begin("fedpcl", least=4, **HEAD).go(1)
    for c, mine in few.state["sets"].items():  # a class of one row would be the row
        labels = [r["label"] for r in few.world.federation.clients[c].train]
        assert mine.keys() == {str(y) for y in set(labels) if labels.count(y) >= 4}
    told = mean_of({"a": {"0": torch.ones(2)}, "b": {"0": torch.zeros(2), "1": torch.ones(2)}})
    assert told["0"].tolist() == [0.5, 0.5] and told["1"].tolist() == [1, 1]  # clients weigh alike, whatever their rows


def test_a_contrast_by_hand(begin):
    """L_g + mean_p L_p, classes that nobody has left out, rows of such a class counting nothing."""
    run = begin("fedpcl", **HEAD)
    model = run.world.model
    rows = run.world.encoded("c3", "train")[:5]
    sets = torch.nn.functional.normalize(torch.randn(3, 3, 6, generator=RNG, dtype=torch.float64), dim=-1)
    known = torch.tensor([1.0, 1.0, 0.0])
    batch, theta = collate([rows], model.pad, torch.device("cpu")), model.initial()
    with torch.no_grad(), model.using([theta]):
        got, count = Prototypes(0.5).losses(model, batch, {"sets": sets.expand(5, -1, -1, -1),
                                                           "known": known.expand(5, -1)})
        r = model.net.pool(model.hidden(batch), batch.mask)
    z = torch.nn.functional.normalize((r @ theta["classifier.inner.weight"].T.double()
                                       + theta["classifier.inner.bias"]).relu(), dim=-1)
    for i, row in enumerate(rows):
        y = int(row.labels)
        if y == 2:
            assert count[i] == 0 and got[i] == 0
            continue
        ce = [-torch.log_softmax(s[:2] @ z[i] / 0.5, 0)[y] for s in sets]
        assert float(got[i]) == pytest.approx(float(ce[0] + (ce[1] + ce[2]) / 2), abs=1e-9)


def test_fedkc_without_agreement_is_fedavg_bit_for_bit(begin, gap):
    assert gap(begin("fedkc", lambda_cons=0.0, **TEXTS).go(2).state["theta"],
               begin("fedavg", **TEXTS).go(2).state["theta"]) == 0
    assert begin("fedkc", sizes=(8,), **TEXTS).go(1).state["theta"]  # one client alone: nobody to agree with
    assert gap(begin("fedkc", sizes=(8,), **TEXTS).go(1).state["theta"],
               begin("fedavg", sizes=(8,), **TEXTS).go(1).state["theta"]) == 0


def test_fedkc_sends_no_document(begin, monkeypatch):
    """No centroid is a row's state, and clusters that are too small stay at home."""
    run = begin("fedkc", n_clusters=3, least=3, **TEXTS)
    heard = {}
    tell = type(run.method).tell

    def noted(method, msg, client):
        heard[client.id] = (tell(method, msg, client), method.states(msg, client))
        return heard[client.id][0]

    noted.__dict__.update(tell.__dict__)
    noted.__name__ = "tell"
    monkeypatch.setattr(type(run.method), "tell", noted)
    run.go(1)
    assert len(heard) == 4
    for reply, (h, p) in heard.values():
        assert all(n >= 3 for n in reply["count"]) and len(reply["c"]) == len(reply["count"])
        assert all(np.abs(h - c).max(1).min() > 1e-9 for c in reply["c"].numpy())
        assert torch.allclose(reply["y"].sum(1), torch.ones(len(reply["y"])).double()) and p.shape[1] == 3
    with pytest.raises(PayloadError, match="fewer than 3"):
        run.method.fits({"wide": [2, 3]}, {"c": torch.zeros(1, 2), "y": torch.zeros(1, 3), "count": [1]})
    with pytest.raises(PayloadError, match=r"'y' has shape \(1, 4\), allowed is \(any, 3\)"):
        run.method.fits({"wide": [2, 3]}, {"c": torch.zeros(1, 2), "y": torch.zeros(1, 4), "count": [3]})


@pytest.mark.parametrize("sizes", [(8, 2), (2, 2), (8, 2, 8)])
def test_fedkc_goes_on_where_a_client_has_no_cluster_that_is_large_enough(begin, sizes):
    """It says nothing, and whom nobody told anything trains as in FedAvg."""
    run = begin("fedkc", n_clusters=2, least=5, sizes=sizes, **TEXTS).go(1)
    assert all(torch.isfinite(t).all() for t in run.state["theta"].values())


def test_fedkc_composes_what_is_near():
    method = make_method("fedkc", neighbors=2, tau=2.0)
    h, c = np.array([[0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    y = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    w = np.exp([-0.5, -2.0])
    assert np.allclose(method.composed(h, c, y), [w / w.sum()])


def test_pfedlora_with_mu_0_is_local_training(begin, gap):
    ours = begin("pfedlora", mu=0.0, adapter_rank=4, space="full", **TEXTS).go(2)
    alone = begin("local_only", space="full", **TEXTS).go(2)
    for c in alone.engine.memory:
        assert gap(ours.engine.memory[c]["theta"], alone.engine.memory[c]["theta"]) == 0


def test_pfedlora_sends_the_shared_head_alone(begin):
    run = begin("pfedlora", adapter_rank=4, space="full", **TEXTS)
    before = run.method.down(run.state, run.world.infos()[0])
    assert tensor_bytes(before) == 4 * (16 * 4 + 4 + 4 * 3 + 3)  # d a + a + a C + C, whatever the network
    after = run.go(1).state["theta"]
    assert all(n.startswith("adapter.") for n in after) and any(bool((after[n] != x).any()) for n, x in
                                                                part(before, "theta").items())


def test_pfedlora_refuses_another_width_and_too_large_a_rank(begin):
    with pytest.raises(CompositionError, match=r"adapter_rank = 17 .* must be <= 16"):
        begin("pfedlora", adapter_rank=17, space="full", **TEXTS)
    run = begin("pfedlora", adapter_rank=4, space="full", **TEXTS)
    wide = {n: torch.zeros(4, 20) if n == f"{DOWN}.weight" else x for n, x in run.state["theta"].items()}
    run.state = {"theta": wide}
    with pytest.raises(CompositionError, match="two designs without a shared adapter"):
        run.go(1)


class Watched(InProcess):
    """Notes how far a frozen copy has moved in each fit that has one."""

    def work(self, job, submit):
        def noted(request):
            out = submit(request)
            if isinstance(request, Fit) and "shared/*" in request.freeze:
                moved = [out.theta[n] - x for n, x in request.theta.items() if n.startswith("shared/")]
                self.moved = [*getattr(self, "moved", []), max(float(m.abs().max()) for m in moved)]
            return out

        return super().work(job, noted)


def test_feddat_keeps_the_own_adapter_and_freezes_the_copy(begin):
    run = begin("feddat", kind=Watched, local={"steps": 2}, **DUAL).go(2)
    assert len(run.engine.moved) == 4 * 2 * 2 and set(run.engine.moved) == {0.0}  # clients, steps, rounds
    assert all(".adapter_" in n and "/" not in n for n in run.state["theta"])
    own = run.engine.memory["c0"]["own"]
    assert any(n.startswith("own/") for n in own) and any("classifier" in n for n in own)


def test_feddat_without_distillation_is_an_adapter_by_itself(begin, gap):
    """One client, distill_weight 0: its shared adapter and head learn from labels alone, step by step as a fit does."""
    run = begin("feddat", distill_weight=0.0, sizes=(4,), local={"steps": 1}, **DUAL).go(1)
    model = run.world.model
    first = model.initial()
    head = {n: x for n, x in first.items() if "/" not in n}
    theta = {**{n: x for n, x in first.items() if n.startswith("shared/")}, **head}
    rows = run.world.encoded("c0", "train")
    fit = Fit("c0", model, theta, None, rows, [np.arange(4)], run.world.local)
    assert gap(part(run_fits([fit], Limits())[0].theta, "shared"), run.state["theta"]) < 1e-12


def test_two_adapters_are_half_and_half(begin):
    """h + u_own / 2 + u_shared / 2 where both are there, the one alone where one is."""
    run = begin("feddat", **DUAL)
    model, first = run.world.model, run.world.model.initial()
    theta = {n: (x + torch.randn(x.shape, generator=RNG)).double() for n, x in first.items()}
    batch = collate([run.world.encoded("c0", "train")], model.pad, torch.device("cpu"))

    def said(tree):
        with torch.no_grad(), model.using([tree]):
            return model.class_logits(batch)

    head = {n: x for n, x in theta.items() if "/" not in n}
    own = pack(own=part(theta, "own")) | head
    twice = pack(own=part(theta, "own"), shared=part(theta, "own")) | head
    assert torch.allclose(said(own), said(twice), atol=1e-10)  # two equal halves are the whole
    assert not torch.allclose(said(own), said(theta), atol=1e-3)


def test_reordering_changes_nothing_that_is_said():
    """A rotary network with grouped keys; the heavy units stand in front."""
    net = llama()
    space = make_space("full")
    theta = space.start(net, torch.Generator(), None)
    moved = ordered(theta, units_of(net, theta))
    assert any(not torch.equal(theta[n], moved[n]) for n in theta)
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        before = net(input_ids=ids).logits
        net.load_state_dict(moved, strict=False)
        after = net(input_ids=ids).logits
    assert float((before - after).abs().max()) < 1e-10
    up = next(n for n in moved if n.endswith("up_proj.weight"))
    gate, down = up.replace("up_proj", "gate_proj"), up.replace("up_proj", "down_proj")
    size = moved[up].abs().sum(1) + moved[gate].abs().sum(1) + moved[down].abs().sum(0)
    assert bool((size[:-1] >= size[1:] - 1e-12).all())
    part_ = {n: x for n, x in theta.items() if "up_proj" not in n}
    with pytest.raises(ModelError, match="is not among the trainables and belongs to units"):
        units_of(net, part_)


def test_raffm_leaves_alone_what_nobody_held_and_takes_what_one_did(begin):
    run = begin("raffm", n_blocks=2, widths=(1,), spp=False, space="full")
    before = run.state["theta"]
    after = run.go(1).state["theta"]
    up = next(n for n in before if n.endswith("up_proj.weight"))
    half = before[up].shape[0] // 2
    assert torch.equal(after[up][half:], before[up][half:]) and not torch.equal(after[up][:half], before[up][:half])
    assert run.method.deal(0, 4)[:2] == [1, 1]
    assert make_method("raffm", widths=(1, 2, 4)).deal(3, 2) == [4, 1]  # the largest, then the smallest


def test_raffm_whole_width_is_fedavg(begin, gap):
    whole = begin("raffm", n_blocks=2, widths=(2,), spp=False, space="full").go(2)
    assert gap(whole.state["theta"], begin("fedavg", space="full").go(2).state["theta"]) < 1e-12


@pytest.mark.parametrize(("name", "knobs", "says", "space"), [
    ("raffm", {"n_blocks": 2, "widths": (3,)}, "no device trains more than the whole width", "full"),
    ("raffm", {}, "use the space 'full' or 'layers'", "lora"),
    ("fedpcl", {}, "use data.task = 'classification' and the space 'mlp_head'", "lora"),
    ("feddat", {}, "the space 'dual_adapter'", "lora"),
    ("fedkc", {}, "use data.task = 'classification'", "lora"),
    ("pfedlora", {}, "use data.task = 'classification'", "lora")])
def test_what_does_not_fit_is_refused(name, knobs, says, space):
    with pytest.raises((CompositionError, RecipeError)) as error:
        start(name, space=space, **knobs)
    assert says in str(error.value)
