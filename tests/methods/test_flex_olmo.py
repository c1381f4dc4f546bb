"""FlexOlmo: the public model where nobody is, exact leaving, what crosses, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.errors import CompositionError, ModelError, PayloadError, RecipeError
from fedllm.methods.pretraining.flex_olmo import FlexOlmo
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.spaces.experts import names_of

LOCAL = {"local": {"steps": 2}}


def said(run, theta):
    model = run.world.model
    batch = collate([run.world.encoded("c1", "train", model)], model.pad, "cpu")
    with torch.no_grad(), model.using([theta]):
        return model.losses(batch)


def test_an_owner_that_leaves_was_never_there(begin):
    run = begin("flex_olmo", space="experts", **LOCAL).go(1)
    whole = said(run, run.method.served(run.state)[0])
    never = {**run.state, "experts": {c: e for c, e in run.state["experts"].items() if c != "c1"}}
    left = FlexOlmo(without=("c1",)).served(run.state)[0]
    assert left.keys() == run.method.served(never)[0].keys()
    assert said(run, left).equal(said(run, run.method.served(never)[0])) and not said(run, left).equal(whole)


def test_without_closed_experts_it_is_the_public_model(begin):
    run = begin("flex_olmo", space="experts", **LOCAL).go(1)
    nobody = FlexOlmo(without=tuple(run.state["experts"])).served(run.state)[0]
    assert nobody == {} and said(run, nobody).equal(said(run, {}))
    assert torch.allclose(said(run, run.world.model.initial()), said(run, {}))  # a copy beside itself


def test_an_owner_is_asked_once_and_a_late_one_joins(begin):
    run = begin("flex_olmo", space="experts", **LOCAL).go(1, ["c0", "c1"])
    first = dict(run.state["experts"]["c0"])
    run.go(2)
    assert list(run.state["experts"]) == ["c0", "c1", "c2", "c3"]
    assert all(run.state["experts"]["c0"][n].equal(t) for n, t in first.items())
    expert = first.values()
    assert sum(t.numel() for t in expert) == 2 * (3 * 16 * 24 + 16 + 1)  # layers (3 d f + d + 1)


def test_top_k_of_one_sends_each_token_through_one_expert(begin):
    run = begin("flex_olmo", space="experts", **LOCAL).go(1)
    theta = run.method.served(run.state)[0]
    one, all_ = (begin("fedavg", space="experts", space_knobs={"top_k": k}) for k in (1, 0))
    assert not torch.allclose(said(one, theta), said(all_, theta))


def test_other_models_half_experts_and_unknown_owners_are_refused(begin):
    run = begin("flex_olmo", space="experts", **LOCAL).go(1)
    fits, method = FlexOlmo.local.__dict__["fits"], run.method
    msg = {"of": "a" * 64, **{f"like/{n}": s for n, s in run.state["like"].items()}}
    good = {f"expert/{n}": t for n, t in run.state["experts"]["c0"].items()}
    fits(method, msg, {**good, "of": "a" * 64})
    with pytest.raises(PayloadError, match="experts of other models cannot be merged"):
        fits(method, msg, {**good, "of": "b" * 64})
    wide = {n: torch.zeros(3, 3) for n in good}
    with pytest.raises(PayloadError, match="no tensor of this model's experts"):
        fits(method, msg, {**wide, "of": "a" * 64})
    half = {n: t for n, t in method.served(run.state)[0].items() if not n.endswith("c2.down_proj")}
    with pytest.raises(ModelError, match=r"expert 'c2' of model\.layers\.0\.mlp lacks down_proj: nobody trained"):
        names_of(half)
    with pytest.raises(RecipeError, match=r"method\.without.*'c9' owns no expert; allowed are c0, c1"):
        FlexOlmo(without=("c9",)).check_clients(["c0", "c1"], 2)
    with pytest.raises(RecipeError, match="that name is taken"):
        FlexOlmo().check_clients(["own", "c1"], 2)
    with pytest.raises(CompositionError, match="use the space 'experts'"):
        make_method("flex_olmo").check(begin("fedavg").world.model)


def test_a_model_without_gated_parts_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedllm.spaces import make_space

    with pytest.raises(ModelError, match="GPT2LMHeadModel has no feed-forward parts of gate_proj"):
        make_space("experts").sites(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2)))
