"""Teachers at the server, several for a student's start or one that sets rare classes right; rows without labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedllm.core.errors import CompositionError, QuorumError, RecipeError
from fedllm.core.payload import digest
from fedllm.local.objectives.apart import Apart
from fedllm.local.objectives.features import Features, maps, shares
from fedllm.local.objectives.two_views import TwoViews, guessed, predictor, viewed
from fedllm.methods._written import balanced, named
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.endpoint import Completion
from fedllm.models.shelf import Shelf

WHOLE = {"task": "classification", "space": "full"}
MANY = {"teachers": ("first", "second"), "pretrain_steps": 2}


def test_several_teachers_are_weighed_and_none_is_changed(begin, gap):
    run = begin("multi_fm_kd", **WHOLE, **MANY)
    nets = [run.world.models[n].net for n in MANY["teachers"]]
    before = [digest(dict(net.state_dict())) for net in nets]
    run.go(2)
    assert [digest(dict(net.state_dict())) for net in nets] == before
    assert not any("teacher" in n for n in run.state["theta"])  # the maps are dropped
    alone = begin("multi_fm_kd", **WHOLE, **{**MANY, "weights": (1.0, 0.0)}).go(2)
    assert gap(alone.state["theta"], run.state["theta"]) > 1e-6
    none = begin("multi_fm_kd", **WHOLE, teachers=("first",), pretrain_steps=0)
    assert none.method.server_asks_for() == none.method.public_at() == ()
    assert gap(none.go(2).state["theta"], begin("fedavg", **WHOLE).go(2).state["theta"]) < 1e-10


@pytest.mark.parametrize("loss", ["l1cos", "mse"])
def test_a_second_teacher_of_weight_0_and_none_are_one(begin, loss):
    """Row by row, and against the formula."""
    run = begin("fedavg", **WHOLE)
    model, rows = run.world.model, run.world.encoded("c0", "train")
    theta, heads = model.initial(), maps(16, (5, 3), torch.Generator().manual_seed(0))
    t = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(1)).double()
    batch = collate([rows], model.pad, model.device)
    with torch.no_grad(), model.using([{**theta, **heads}]):
        two, _ = Features((5, 3), (1.0, 0.0), loss).losses(model, batch, {"target": t})
        one, count = Features((5,), (1.0,), loss).losses(model, batch, {"target": t[:, :5]})
        r = model.net.pool(model.hidden(batch), batch.mask)
        said = r @ heads["teacher0.weight"].double().T + heads["teacher0.bias"].double()
    far = (said - t[:, :5]).pow(2).mean(1) if loss == "mse" else (
        (said - t[:, :5]).abs().mean(1) + 1 - F.cosine_similarity(said, t[:, :5]))
    assert torch.allclose(two, one) and torch.allclose(one, far) and count.tolist() == [1.0] * len(rows)


def test_teachers_and_weights_that_do_not_fit_are_refused(begin):
    assert shares((), ("a", "b"), "X") == (0.5, 0.5) and shares((3, 1), ("a", "b"), "X") == (0.75, 0.25)
    with pytest.raises(RecipeError, match=r"MultiFMKD.weights = \[1.0\] is not allowed"):
        make_method("multi_fm_kd", teachers=("a", "b"), weights=(1.0,))
    with pytest.raises(RecipeError, match=r"MultiFMKD.teachers = \['a', 'a'\] is not allowed"):
        make_method("multi_fm_kd", teachers=("a", "a"))
    run = begin("multi_fm_kd", **WHOLE, **MANY)
    run.world.models = Shelf(dict.fromkeys(MANY["teachers"], lambda: Speaks("x")))
    with pytest.raises(CompositionError, match=r"models.first: method 'multi_fm_kd' needs a row's pooled state"):
        run.go(1)


class Speaks:
    """A big model that says always the same."""

    def __init__(self, text):
        self.text = text

    def complete(self, prompts, max_new_tokens, temperature=0.0, seed=0):
        return [Completion(self.text, None, 1, 1) for _ in prompts]


def test_without_stages_1_and_3_it_is_fedavg_and_clients_do_the_same(begin, gap):
    plain, own = begin("fedavg", **WHOLE).go(2), begin("mllm_fl", **WHOLE, stages="2")
    assert own.method.server_asks_for() == () and gap(own.go(2).state["theta"], plain.state["theta"]) < 1e-10
    whole = begin("mllm_fl", **WHOLE, stages="1,2,3", pretrain_steps=4, align_steps=2)
    assert whole.go(2).up() == plain.up() and gap(whole.state["theta"], plain.state["theta"]) > 1e-6


def test_the_big_model_s_labels_count_and_never_the_rows_own(begin, gap):
    """Public rows with other labels end in the same model."""
    one, other = (begin("mllm_fl", **WHOLE, align_steps=2) for _ in range(2))
    fed = other.world.federation
    other.world.federation = replace(fed, public=[{**r, "label": (r["label"] + 1) % 3} for r in fed.public])
    assert gap(one.go(2).state["theta"], other.go(2).state["theta"]) == 0


def test_a_model_that_speaks_names_a_class(begin, gap):
    run = begin("mllm_fl", **WHOLE, align_steps=2)
    run.world.models = Shelf({"teacher": lambda: Speaks("It is Two, and not one.")})
    run.go(1)
    assert gap(run.state["theta"], begin("fedavg", **WHOLE).go(1).state["theta"]) > 1e-6
    run = begin("mllm_fl", **WHOLE, align_steps=2)
    run.world.models = Shelf({"teacher": lambda: Speaks("who knows")})
    with pytest.raises(QuorumError, match=r"models.teacher names no class of one, two, three in more than half"):
        run.go(1)
    assert named("a two or one", ["one", "two", "tw"]) == 1 and named("none", ["x"]) == -1


def test_classes_are_balanced_and_rare_ones_drawn_again():
    rng = np.random.default_rng(0)
    assert sorted(balanced(np.arange(3), 5, 0.0, rng)) == [0, 1, 2]
    assert len(balanced(np.arange(3), 5, 0.5, rng)) == 4 and len(balanced(np.arange(9), 5, 1.0, rng)) == 5
    assert len(balanced(np.arange(3), 5, 1.0, rng)) == 5


AFFECT = {"shots": 2, "u_steps": 2, "l_steps": 2}


def test_without_phase_u_it_is_fedavg_on_the_labelled_rows(begin, gap):
    run = begin("fedaffect", **WHOLE, shots=100, u_steps=3, l_steps=2, freeze_encoder=False)
    plain = begin("fedavg", **WHOLE, local={"steps": 2})
    start = dict(run.state["theta"])
    assert gap(run.go(1).state["theta"], plain.go(1).state["theta"]) < 1e-10  # nobody has a row without label
    assert gap(run.state["theta"], start) > 1e-4


def test_a_client_without_labels_shapes_the_encoder_and_not_the_head(begin, gap):
    run = begin("fedaffect", **WHOLE, **{**AFFECT, "shots": 0})
    with pytest.raises(QuorumError, match=r"client 'c0' has no row with a label"):
        run.go(1)  # nobody has any
    run = begin("fedaffect", **WHOLE, **AFFECT)
    counts = {"unlabelled": 0, "local": 0}
    kept = type(run.engine).cross

    def cross(self, way, job, payload):
        if way == "up":
            counts[job.fold.ask.fn.__name__] += payload["n"]
            names = {n.partition("/")[2] for n in payload if n.startswith(("body/", "delta/"))}
            assert all(n.startswith("classifier.") == ("delta/" + n in payload) for n in names)
        return kept(self, way, job, payload)

    type(run.engine).cross = cross
    try:
        run.go(1)
    finally:
        type(run.engine).cross = kept
    assert counts["local"] <= 4 * 3 * 2 and sum(counts.values()) == sum(c.n for c in run.world.infos())


@pytest.mark.parametrize("ssl", ["byol", "simclr"])
def test_both_losses_are_what_they_say(begin, ssl):
    run = begin("fedavg", **WHOLE)
    model, rows = run.world.model, run.world.encoded("c0", "train")
    draw = torch.Generator().manual_seed(0)
    guess = predictor(16, draw)
    t, others = (torch.randn(len(rows), *s, generator=draw).double() for s in ((16,), (4, 16)))
    batch = collate([rows], model.pad, model.device)
    with torch.no_grad(), model.using([{**model.initial(), **guess}]):
        p = guessed(model, batch)
        if ssl == "byol":
            got, _ = TwoViews().losses(model, batch, {"target": t})
            want = (p - F.normalize(t, dim=1)).pow(2).sum(1)
        else:
            got, _ = Apart(0.5).losses(model, batch, {"target": t, "others": others})
            z = torch.stack([F.cosine_similarity(p, x) for x in (t, *others.unbind(1))], 1) / 0.5
            want = F.cross_entropy(z, torch.zeros(len(rows)).long(), reduction="none")
    assert torch.allclose(got, want)
    run = begin("fedaffect", **WHOLE, **AFFECT, ssl=ssl)
    assert run.go(1).state["predictor"].keys() == guess.keys()


def test_a_view_lacks_tokens_and_never_all(begin):
    row = begin("fedavg", **WHOLE).world.encoded("c0", "train")[0]
    rng = np.random.default_rng(0)
    sizes = [len(viewed(row, 0.5, rng).ids) for _ in range(50)]
    assert min(sizes) >= 1 and max(sizes) < len(row.ids) + 1 and len(set(sizes)) > 1
    assert len(viewed(row, 0.0, rng).ids) == len(row.ids) and len(viewed(row, 0.999, rng).ids) == 1
