"""FedPepTAO: a layer without a prefix sees none, the closed form is what each client's step averages to, bytes fall."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedllm.core.ask import Replies
from fedllm.core.errors import CompositionError
from fedllm.core.payload import add, pack, scale, sub, zeros_like
from fedllm.data.encode import encode_rows
from fedllm.local.generate import run_generates
from fedllm.local.requests import Generate, Limits
from fedllm.methods._lanczos import curvature, share_above, spectrum
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.by_layer import MeanStates, told_apart
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.spaces.layer_prefix import LayerPrefix, name_of
from fedllm.spaces.space import Prompt
from tests.methods.conftest import llama, rows, tokenizer

HERE = {"space": "layer_prefix", "space_knobs": {"length": 3}}


def model_with(space):
    return Model(llama(), tokenizer(), "generation", make_space(space, length=3), fast_kernels=False)


def losses(model, *trees):
    import random

    coded = encode_rows(rows(random.Random(3), 5), model.tokenizer, "generation", 32)
    with torch.no_grad(), model.using(trees):
        return model.losses(collate([coded] * len(trees), model.pad, model.device))


def wide(tree):
    return {n: t.double() * 40 for n, t in tree.items()}


def test_all_layers_are_the_prefix_space_and_none_is_the_plain_model():
    here, there = model_with("layer_prefix"), model_with("prefix")
    mine, theirs = wide(here.initial()), wide(there.initial())
    assert torch.equal(losses(here, mine), losses(there, theirs))
    assert torch.equal(losses(here, {}), losses(there, {})) and not torch.equal(losses(here, {}), losses(here, mine))
    _, tree = here.space.to_peft(here.net, "generation", mine)
    assert torch.equal(tree["prompt_embeddings"], theirs["prompt_embeddings"])
    assert here.space.to_peft(here.net, "generation", {name_of(0): mine[name_of(0)]}) is None


@pytest.mark.parametrize("kept", [0, 1])
def test_a_layer_without_a_prefix_sees_none(kept, monkeypatch):
    """What lies in the cache of the other layer is of no consequence, in lanes, padded, and as a text is generated."""
    model = model_with("layer_prefix")
    full = wide(model.initial())
    one = {name_of(kept): full[name_of(kept)]}
    prompts = [np.arange(5, 9, dtype=np.int32), np.arange(9, 16, dtype=np.int32)]
    say = lambda: run_generates([Generate("c", model, one, None, prompts, 6)], Limits())[0]  # noqa: E731
    got, said, plain = losses(model, one, one), say(), LayerPrefix.before
    assert torch.allclose(got[0], got[1], atol=1e-12) and torch.allclose(got[:1], losses(model, one), atol=1e-12)
    assert all(float((got - losses(model, t)[0]).abs().min()) > 1e-4 for t in ({}, full))

    def noisy(space, net, stack, rows):
        prompt = plain(space, net, stack, rows)
        cache = list(prompt.cache)
        cache[1 - kept] = tuple(torch.randn_like(t) * 30 for t in cache[1 - kept])
        return Prompt(prompt.length, cache=cache)

    monkeypatch.setattr(LayerPrefix, "before", noisy)
    assert torch.allclose(losses(model, one, one), got, atol=1e-12)
    assert all(np.array_equal(a, b) for a, b in zip(say(), said, strict=True))


def test_the_closed_form_is_the_mean_of_each_clients_momentum_step(gap):
    method = make_method("fedpeptao", server_lr=0.2)
    rng = torch.Generator().manual_seed(0)
    tree = lambda: {"a": torch.randn(3, 4, generator=rng).double()}  # noqa: E731
    theta, v, d, c, ck = tree(), tree(), tree(), tree(), {"x": tree(), "y": tree()}
    replies = {k: {**pack(delta=tree()), "n": n, "steps": s, "rates": 0.1 * s}
               for k, n, s in (("x", 3, 2), ("y", 5, 4))}
    state = {"theta": theta, "layers": [0], "round": 2, "c": c, "v": v, "d": d, "ck": ck, "seen": ["x", "y", "z"]}
    got = method.merge(state, Replies(each=replies))
    # one by one, as the algorithm has it
    theta_k = {k: add(theta, {"a": r["delta/a"]}) for k, r in replies.items()}
    w, s = {"x": 3 / 8, "y": 5 / 8}, {"x": 2 / 6, "y": 4 / 6}
    bar = add(scale(theta_k["x"], w["x"]), scale(theta_k["y"], w["y"]))
    new_ck = {k: add(sub(ck[k], c), sub(theta, theta_k[k]), 1 / replies[k]["rates"]) for k in ck}
    new_c = c
    for k in ck:
        new_c = add(new_c, sub(new_ck[k], ck[k]), 2 / 3 * s[k])
    g = sub(d, sub(theta, bar))
    end, vs = zeros_like(theta), zeros_like(theta)
    for k in ck:
        v_k = sub(add(add(scale(v, 0.9), scale(g, 0.1)), new_c), new_ck[k])
        end, vs = add(end, add(bar, v_k, -0.2 * 0.99**2), w[k]), add(vs, v_k, w[k])
    assert gap(got["theta"], end) < 1e-12 and gap(got["v"], vs) < 1e-12 and gap(got["c"], new_c) < 1e-12
    assert all(gap(got["ck"][k], new_ck[k]) < 1e-12 for k in ck)


def test_without_a_step_it_is_fedavg_on_the_chosen_layers(begin):
    mine = begin("fedpeptao", layer_ratio=0.5, server_lr=0.0, **HERE)
    theirs = begin("fedavg", **HERE)
    mine.go(3)
    theirs.state = {"theta": {n: theirs.state["theta"][n] for n in mine.state["theta"]}}
    theirs.go(3)
    assert len(mine.state["theta"]) == 1 and mine.method.report(mine.state)["layers"] == mine.state["layers"]
    assert all(torch.equal(t, theirs.state["theta"][n]) for n, t in mine.state["theta"].items())


def test_scores_choose_and_the_lowest_are_the_others(begin):
    high = begin("fedpeptao", layer_ratio=0.5, **HERE).go()
    low = begin("fedpeptao", layer_ratio=0.5, order="lowest", **HERE).go()
    assert sorted([*high.state["layers"], *low.state["layers"]]) == [0, 1]
    assert begin("fedpeptao", layer_ratio=1.0, **HERE).go().state["layers"] == [0, 1]
    spread = told_apart(np.eye(4))
    assert spread == pytest.approx(4 * (np.log(1 + 1e-5) + 1 / (1 + 1e-5))) and told_apart(np.ones((4, 3))) > 1e5


def test_the_ratio_is_measured_after_the_warm_up(begin):
    run = begin("fedpeptao", warmup=1, lanczos=4, **HERE).go()
    assert run.state["layers"] == [] and len(run.state["theta"]) == 2
    run.go()
    assert 1 <= len(run.state["layers"]) <= 2 and run.state["theta"].keys() == run.state["v"].keys()


def test_lanczos_finds_the_eigenvalues_and_their_share_above():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    e = np.array([-1.0, 0.5, 1, 2, 3, 9])
    values, weights = spectrum(lambda v: q @ (e * (q.T @ v)), rng.normal(size=6), 20)
    assert values == pytest.approx(e, abs=1e-8) and weights.sum() == pytest.approx(1)
    a = torch.tensor([1.0, 2.0, 4.0])
    values, _ = curvature(lambda t: {"w": a * t["w"]}, {"w": torch.ones(3)}, rng, 3)
    assert values == pytest.approx([1, 2, 4], abs=1e-3)
    even = np.full(10, 0.1)
    assert share_above(np.arange(10) - 4.5, even) == pytest.approx(0.5)  # still from 0 on
    assert share_above(np.full(10, -1.0), even) == 0


def test_what_each_layer_makes_of_a_text_does_not_hang_on_padding(begin):
    run = begin("fedavg", **HERE)
    model = run.world.model
    two = run.world.tokenized([{"prompt": "w1 w2 w3 w4 w5", "response": "w6"}, {"prompt": "w1", "response": "w2"}],
                              True, model)
    with torch.no_grad(), model.using([{}]):
        both = MeanStates()(model, collate([two], model.pad, model.device))
        alone = MeanStates()(model, collate([two[1:]], model.pad, model.device))
    assert both.shape == (2, 32) and torch.allclose(both[1], alone[0], atol=1e-9)


def test_other_spaces_are_refused(begin):
    with pytest.raises(CompositionError, match="'fedpeptao' and space 'prefix' do not fit together"):
        begin("fedpeptao", space="prefix", space_knobs={"length": 3})
