"""Methods that learn prompts of an image-text model, against closed forms on the tiny CLIP, in fp64."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from evidence.rigs.sighted import prompts, sent
from fedllm.core.client import ClientInfo, Profile
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.core.program import drive
from fedllm.methods._class_prompts import own_classes
from fedllm.methods._domains import ByPlace, places
from fedllm.methods.prompt.pfedprompt import PFedPrompt
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.spaces import SPACES
from fedllm.spaces.class_prompt import CONTEXT
from fedllm.spaces.domain_prompt import KEYS, QUERY
from fedllm.spaces.dual_prompt import OWN, SLOT
from fedllm.spaces.prompt_generator import NET
from fedllm.spaces.space import Space
from fedllm.spaces.visual_prompt import FRAME, HEAD, TOKENS
from tests.methods.conftest import begin, pictured, tried

IDS = ("promptfl", "fedtpg", "pfedprompt", "fedapt", "fed_dpt", "tpfl", "pfedpg")


def tree(run):
    """Trainables away from their start, fp64."""
    rng = torch.Generator().manual_seed(3)
    return {n: t.double() + 0.3 * torch.randn(t.shape, generator=rng, dtype=torch.float64)
            for n, t in run.world.model.initial().items()}


def said(run, theta, some=slice(None)):
    """Class logits [N, C] of the global test."""
    rows = run.world.encoded("__global__", "test")[some]
    with torch.no_grad(), run.world.model.using([theta]):
        return run.world.model.class_logits(collate([rows], 0, run.world.model.device))


def scores(run, on="local"):
    return drive(run.method.evaluate(run.state, run.world.infos(), on), run.engine, run.engine.stack[1:])


@pytest.mark.parametrize("name", [n for n in SPACES if SPACES[n].classes is not Space.classes])
def test_every_trainable_of_a_prompt_matters_and_lanes_do_not_touch_each_other(name):
    knobs = {"domain_prompt": {"temperature": 1.0}, "visual_prompt": {"head": True},
             "prompt_generator": {"heads": 2}}.get(name, {})
    model = begin("fedavg", space=name, space_knobs={"length": 3, **knobs}, task="image_text").world.model
    g = torch.Generator().manual_seed(1)
    trees = [{n: (t + 0.3 * torch.randn(t.shape, generator=g)).double() for n, t in model.initial().items()}
             for _ in range(3)]
    rows = [model.read(pictured(random.Random(k), 2)) for k in range(3)]
    params = {n: t[None].clone().requires_grad_() for n, t in trees[0].items()}
    with model.using(trees[:1], None, params):
        model.losses(collate([rows[0]], 0, model.device)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in params.values())
    with torch.no_grad():
        with model.using(trees):
            together = model.losses(collate(rows, 0, model.device))
        for k, tree_k in enumerate(trees):
            with model.using([tree_k]):
                assert torch.allclose(model.losses(collate([rows[k]], 0, model.device))[0], together[k], atol=1e-10)


@pytest.mark.parametrize("name", IDS)
def test_another_space_is_refused_with_one_that_works(name):
    with pytest.raises(CompositionError, match=rf"method '{name}' and space 'feature_attention' do not fit together.* "
                                               r"space = '\w+' works"):
        make_method(name).check(begin("fedclip", **tried("fedclip")).world.model)


@pytest.mark.parametrize("name", [n for n in IDS if n != "fedtpg"])
def test_class_lists_of_their_own_are_refused_where_one_task_is_learned(name):
    some = {"label": 0, "among": [1.0, 1.0, 0.0]}
    rows = {"a": [{"label": 0}], "b": [some]}
    with pytest.raises(DataError, match=r"client 'a' tells pictures among cat, dog, owl, and client 'b' among cat, "
                                        rf"dog: method '{name}' learns one task.*'fedtpg'"):
        make_method(name).check_rows(("cat", "dog", "owl"), rows)
    make_method(name).check_rows(("cat", "dog", "owl"), {"a": [some, some], "b": [some]})  # one list, of some classes
    make_method("fedtpg").check_rows(("cat", "dog", "owl"), rows)


def test_promptfl_sends_the_context_and_nothing_else():
    told = sent("promptfl", 1, space={"name": "class_prompt", "length": 3})
    assert told == {"numbers_beside": 0.0, "rows_sent": 0.0}


def test_fedtpg_makes_one_prompt_of_names_in_any_order_and_of_any_number():
    assert prompts("fedtpg", 1)["off_by_order"] < 1e-5
    run = begin("fedtpg", **tried("fedtpg"))
    d, p, m = 12, 8, 2  # a token, a feature, the context
    sizes = {n: t.numel() for n, t in run.world.model.initial().items()}
    assert sum(sizes.values()) == 14 * d * d + 17 * d + 2 * d * p + 2 * p + m * d  # 16 d^2 + 19 d + m d where p = d
    model, theta = run.world.model, {n.removeprefix(NET): t[None] for n, t in tree(run).items()}
    some = [model.space.prompts(theta, model.net.bare(), torch.tensor([on])) for on in (
        [True, True, False], [True, True, True])]
    assert some[0].shape == some[1].shape == (1, m, d) and float((some[0] - some[1]).abs().max()) > 1e-6
    alone = model.space.prompts(theta, model.net.bare()[:2], torch.tensor([[True, True]]))
    assert torch.allclose(alone, some[0], atol=1e-12)  # of names that are left out it knows nothing


def test_fedtpg_learns_among_the_labels_that_a_client_has():
    """A class that no client has moves nothing: its name stands in no sum."""
    run = begin("fedtpg", engine="in_process", **tried("fedtpg"))
    rows = run.world.encoded("c0", "train")
    two = [r for r in rows if r.labels != 2]
    assert own_classes(two, 3).tolist() == [1.0, 1.0, 0.0]
    run.world._encoded[("c0", "train", id(None))] = two
    first = {n: t.clone() for n, t in run.state["theta"].items()}
    left = run.go(1, ["c0"]).state["theta"]
    again = begin("fedtpg", engine="in_process", **tried("fedtpg"))
    again.world._encoded[("c0", "train", id(None))] = two
    again.world.model.net._names = type(again.world.model.net.names)((1,), ((4,), (5,), (9,)), (2,), (7,), (8, 9))
    other = again.go(1, ["c0"]).state["theta"]
    assert all(torch.allclose(left[n], other[n], atol=1e-12) for n in left)
    assert any(not torch.equal(left[n], first[n]) for n in left)


def test_pfedprompt_without_own_pictures_is_promptfl_and_with_them_says_more():
    space = tried("promptfl")
    plain = begin("promptfl", **space).go(2)
    zero, own = (begin("pfedprompt", **space, alpha=a).go(2) for a in (0.0, 5.0))
    assert torch.equal(zero.state["theta"][CONTEXT], plain.state["theta"][CONTEXT])
    assert own.up() == zero.up() == plain.up()
    assert scores(zero) == scores(plain)
    assert scores(own)["c0"]["loss"] != scores(zero)["c0"]["loss"]
    assert sent("pfedprompt", 1, space={"name": "class_prompt", "length": 3})["rows_sent"] == 0.0


def test_pfedprompt_recalls_by_the_formula():
    f, keys = (torch.nn.functional.normalize(torch.randn(n, 4, dtype=torch.float64), dim=-1) for n in (3, 5))
    y = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1, 0]), 3).double()
    got = PFedPrompt(beta=2.0).recalled(f, keys, y)
    want = np.array([[sum(np.exp(-2.0 * (1 - float(a @ k))) for k, c in zip(keys, y, strict=True) if c[j])
                      for j in range(3)] for a in f])
    assert np.allclose(got.numpy(), want, atol=1e-12)


def test_fedapt_at_a_low_temperature_takes_the_likeliest_domain_and_with_equal_keys_any():
    run = begin("fedapt", **{**tried("fedapt"), "space_knobs": {"length": 2, "domains": 4, "temperature": 1e-6}})
    theta, rows = tree(run), run.world.encoded("__global__", "test")
    with torch.no_grad():
        f = torch.stack([run.world.model.net.images(torch.from_numpy(r.parts["pixels"])[None])[0] for r in rows])
    best = (f @ theta[QUERY].T).argmax(1)
    for i, k in enumerate(best.tolist()):
        alone = said(run, {**theta, KEYS: theta[KEYS][k][None]}, slice(i, i + 1))
        assert torch.allclose(said(run, theta, slice(i, i + 1)), alone, atol=1e-10)
    same = {**theta, KEYS: theta[KEYS][:1].expand(4, -1, -1)}
    assert torch.allclose(said(run, same), said(run, {**same, QUERY: -theta[QUERY]}), atol=1e-3)


def test_fedapt_gives_each_its_own_key_and_gets_none_back():
    run = begin("fedapt", engine="in_process", **tried("fedapt"))
    keys = run.state["keys"].clone()
    run.go(1)
    assert run.state["places"] == {"c0": 0, "c1": 1, "c2": 2, "c3": 3} and torch.equal(run.state["keys"], keys)
    assert set(run.state["theta"]) == {CONTEXT, QUERY}


def test_clients_of_one_domain_share_a_place_and_more_domains_than_places_are_refused():
    clients = [ClientInfo(f"c{i}", 1, Profile(domain=d)) for i, d in enumerate(("photo", "sketch", "photo", None))]
    assert places({}, clients, 3) == {"photo": 0, "sketch": 1, "c3": 2}
    with pytest.raises(RecipeError, match=r"space.domains = 2, and the clients have 3 \(photo, sketch, c3\)"):
        places({}, clients, 2)


def test_fed_dpt_keeps_what_each_made_of_its_own_prompt_bit_for_bit():
    run = begin("fed_dpt", engine="in_process", dtype=torch.float32, **tried("fed_dpt"))
    fold = ByPlace()
    replies = {k: {"own": torch.randn(2, 12), "tokens": torch.randn(4, 16), "place": p, "places": 4, "loss": 1.0}
               for k, p in (("a", 2), ("b", 0))}
    acc = fold.zero()
    for reply in replies.values():
        acc = fold.add(acc, reply)
    done = fold.done(acc)
    for reply in replies.values():
        assert torch.equal(done["own"][reply["place"]], reply["own"])
    assert done["held"].tolist() == [1, 0, 1, 0]
    assert torch.equal(done["tokens"], (replies["a"]["tokens"] + replies["b"]["tokens"]) / 2)
    start = run.state["theta"][CONTEXT].clone()
    run.go(1, ["c0", "c1"])
    assert torch.equal(run.state["theta"][CONTEXT][2:], start[2:])  # of who was not asked nothing changes
    assert all(not torch.equal(run.state["theta"][CONTEXT][i], start[i]) for i in range(2))


def test_fed_dpt_moves_the_own_prompt_alone_and_others_come_slowly():
    run = begin("fed_dpt", engine="in_process", **tried("fed_dpt"), momentum=0.75)
    first = run.state["theta"][CONTEXT].clone()
    run.go(1)
    assert torch.equal(run.engine.memory["c1"]["contexts"], first)
    second = run.state["theta"][CONTEXT].clone()
    run.go(1)
    assert torch.allclose(run.engine.memory["c1"]["contexts"], 0.75 * first + 0.25 * second, atol=1e-12)


def test_fed_dpt_of_one_domain_is_tpfl_with_one_visual_token():
    one = begin("fed_dpt", **{**tried("fed_dpt"), "space_knobs": {"length": 2, "domains": 1}})
    twin = begin("tpfl", **{**tried("tpfl"), "space_knobs": {"length": 2, "visual": 1}, "mu": 0.0})
    theta = tree(one)
    own = {CONTEXT: 0 * theta[CONTEXT], TOKENS: theta[TOKENS], OWN: theta[CONTEXT][0], SLOT: torch.ones(1)}
    want = said(twin, {CONTEXT: theta[CONTEXT][0], TOKENS: theta[TOKENS]})
    assert torch.allclose(said(one, theta), want, atol=1e-10) and torch.allclose(said(one, own), want, atol=1e-10)


def test_tpfl_without_a_visual_prompt_is_promptfl_and_its_contrast_starts_in_the_second_round():
    knobs = {**tried("tpfl"), "space_knobs": {"length": 2, "visual": 0}}
    flat = {**knobs, "mu": 0.0}
    plain = begin("promptfl", **tried("promptfl")).go(2).state["theta"]
    assert torch.allclose(begin("tpfl", **flat).go(2).state["theta"][CONTEXT], plain[CONTEXT], atol=1e-12)
    assert torch.allclose(begin("tpfl", **knobs).go(2).state["theta"][CONTEXT], plain[CONTEXT], atol=1e-12)
    tpfl, atpfl = (begin("tpfl", **{**tried("tpfl"), "mu": mu}).go(1) for mu in (0.0, 1.0))
    assert all(torch.equal(t, atpfl.state["theta"][n]) for n, t in tpfl.state["theta"].items())
    tpfl.go(1), atpfl.go(1)
    assert any(not torch.equal(t, atpfl.state["theta"][n]) for n, t in tpfl.state["theta"].items())


@pytest.mark.parametrize("kind, name", [("tokens", TOKENS), ("pixel_frame", FRAME)])
def test_a_gradient_reaches_both_prompts(kind, name):
    run = begin("tpfl", **{**tried("tpfl"), "space_knobs": {"length": 2, "visual": 2, "kind": kind}, "mu": 0.0})
    first = {n: t.clone() for n, t in run.state["theta"].items()}
    towers = {n: t.clone() for n, t in run.world.model.net.state_dict().items()}
    run.go(1)
    assert set(first) == {CONTEXT, name}
    assert all(float((t - first[n]).norm()) > 0 for n, t in run.state["theta"].items())
    assert all(torch.equal(t, towers[n]) for n, t in run.world.model.net.state_dict().items())


def test_pfedpg_moves_the_prompt_that_it_makes_towards_what_the_client_made_of_it():
    run = begin("pfedpg", **tried("pfedpg"), server_lr=0.01)
    method, phi = run.method, {n: t.double() for n, t in run.state["phi"].items()}
    of, delta = {"c0": method.descriptor(run.state, "c0").double()}, torch.randn(2, 16, dtype=torch.float64)
    new = method.learned(phi, of, {"c0": (1.0, delta)})
    made = [method.prompt(p, d["c0"]) for p, d in ((phi, of), (new["phi"], new["of"]))]
    assert float(torch.cosine_similarity((made[1] - made[0]).flatten(), delta.flatten(), 0)) > 0.5


def test_pfedpg_descends_along_the_jacobian_by_hand():
    """d <delta, P(phi)> / d B_ij by differences, and who was not asked keeps its descriptor."""
    run = begin("pfedpg", **tried("pfedpg"), server_lr=1.0)
    method = run.method
    phi = {n: t.double() for n, t in run.state["phi"].items()}
    of = {c: torch.randn(2, 16, dtype=torch.float64) for c in ("c0", "c1")}
    delta, eps = torch.randn(2, 16, dtype=torch.float64), 1e-6
    new = method.learned(phi, of, {"c0": (0.3, delta)})
    for i, j in ((0, 3), (1, 15)):
        moved = {n: t.clone() for n, t in phi.items()}
        moved["basis"][i, j] += eps
        slope = 0.3 * float((delta * (method.prompt(moved, of["c0"]) - method.prompt(phi, of["c0"]))).sum()) / eps
        assert float(new["phi"]["basis"][i, j] - phi["basis"][i, j]) == pytest.approx(slope, rel=1e-4)
    assert set(new["of"]) == {"c0"} and not torch.equal(new["of"]["c0"], of["c0"])
    begun = run.go(1, ["c0", "c1"]).state["of"]["c1"]
    assert torch.equal(run.go(1, ["c0"]).state["of"]["c1"], begun)  # who was not asked
    flat = begin("pfedpg", **tried("pfedpg"), generate=False).method
    mean = flat.learned(phi, of, {"c0": (0.25, delta), "c1": (0.75, 2 * delta)})
    assert torch.allclose(mean["phi"]["basis"], phi["basis"] + 1.75 * delta, atol=1e-12)


def test_pfedpg_sends_no_head_and_needs_one():
    run = begin("pfedpg", engine="in_process", **tried("pfedpg")).go(2)
    assert set(run.engine.memory["c0"]) == {"head"} and HEAD not in run.state["phi"]
    told = {c: run.method.prompt(run.state["phi"], run.method.descriptor(run.state, c)) for c in ("c0", "c1")}
    assert not torch.equal(told["c0"], told["c1"])
    with pytest.raises(CompositionError, match=r"space.head = true, and it is False"):
        begin("pfedpg", **{**tried("pfedpg"), "space_knobs": {"length": 2}})


def test_fedclip_sends_its_adapter_and_a_scale_of_its_weights_changes_no_answer():
    run = begin("fedclip", **tried("fedclip")).go(1)
    theta, d = run.state["theta"], run.world.model.net.width
    assert sum(t.numel() for t in theta.values()) == 2 * (d * d + d)
    model = run.world.model
    rows = run.world.encoded("__global__", "test")
    batch = collate([rows], 0, model.device)
    with torch.no_grad(), model.using([theta]):
        z = model.class_logits(batch)
        i = model.net.seen(batch)
        scaled = model.net.matched(model.stack, 7.5 * i * model.net.attend(i), model.net.texts(model.stack), batch)
    assert torch.allclose(z, scaled, atol=1e-10)
