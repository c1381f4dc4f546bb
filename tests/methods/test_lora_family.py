"""Exact and inexact averages of LoRA products, ranks of any size, and what travels."""

from __future__ import annotations

import pytest
import torch

from evidence.rigs.trials import RIGS, Scripted, best_of_rank, off, update, wanted
from fedllm.core.ask import Replies
from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.payload import pack, part, tensor_bytes
from fedllm.core.program import drive
from fedllm.methods._factors import Padded, Products, first_ranks, svds
from fedllm.methods._linalg import cut, dense_svd, factored_svd, product_norm
from fedllm.methods.heterogeneity.hetlora import Tail, masks
from fedllm.spaces.lora import factors, names_of

RNG = torch.Generator().manual_seed(0)
SHARED = {"scaling": "shared"}


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=RNG, dtype=dtype)


@pytest.mark.parametrize(("name", "limit"), [
    ("flora_stacking", 1e-12), ("fedex_lora", 1e-12), ("rolora", 1e-12), ("ffa_lora", 1e-12)])
def test_exact_methods_are_exact(name, limit):
    """Random factors, modules 8 x 32 to 56 x 32, two rounds (RoLoRA: a B turn and an A turn), fp64."""
    assert RIGS["exactness"](name, 1, dtype="float64")["error"] < limit


def test_averaging_the_factors_is_not():
    assert RIGS["exactness"]("fedit", 1)["error"] > 0.1


def test_flexlora_is_the_best_of_its_rank():
    got = RIGS["exactness"]("flexlora", 2, dtype="float64")
    assert got["error"] == pytest.approx(got["spectrum"], abs=1e-6)  # Eckart and Young
    naive = RIGS["exactness"]("fedit", 2, dtype="float64")
    assert got["error"] < naive["error"]


def test_late_joiners_hold_the_same_base(begin, gap):
    for name in ("flora_stacking", "fedex_lora"):
        run = begin(name, kind=Scripted, ranks=(1, 2, 4, 8) if name == "flora_stacking" else ())
        run.go(2, ["c0", "c1"]).go(1)  # c2 and c3 come in round 2
        bases = [fit.base for fit in run.engine.took.values()]
        assert all(gap(b, bases[0]) < 1e-12 for b in bases) and len(bases) == 4
        space = run.world.model.space
        assert off(update(space, *run.method.served(run.state)), wanted(run, space)) < 1e-9
        run.go(1, ["c3"])  # away for none
        assert run.engine.took["c3"].base is not None


def test_the_deployed_flora_model_is_the_one_that_clients_go_on_from(begin, gap):
    """Merging and starting a new LoRA leaves the function as it was: B is zero."""
    run = begin("flora_stacking").go(1)
    theta, base = run.method.served(run.state)
    model, encoded = run.world.model, run.world.encoded("c0", "train")
    from fedllm.local.forward import run_losses
    from fedllm.local.requests import Limits, Losses

    merged = run_losses([Losses("c0", model, theta, base, encoded)], Limits())[0].mean
    fresh = run_losses([Losses("c0", model, model.initial(2), base, encoded)], Limits())[0].mean
    assert merged == pytest.approx(fresh, abs=1e-12)
    scores = drive(run.method.evaluate(run.state, run.world.infos(), "global"), run.engine)
    assert len({round(s["loss"], 12) for s in scores.values()}) == 1


def test_clients_of_one_process_share_one_drift(begin):
    run = begin("flora_stacking").go(2)
    first = [next(iter(m["drift"].values())) for m in run.engine.memory.values()]
    assert len({id(t) for t in first}) == 1


def test_flora_downlink_is_the_stack(begin):
    run = begin("flora_stacking", dtype=torch.float32, ranks=(1, 2, 4, 8)).go(1)
    msg = run.method.down(run.state, run.world.infos()[0])
    sizes = {p: b.shape[0] + a.shape[1] for p, (b, a) in factors(run.world.model.initial()).items()}
    assert tensor_bytes(msg) == 4 * (1 + 2 + 4 + 8) * sum(sizes.values())


def test_fedex_on_conv1d(gap):
    """GPT-2 keeps its weights as (in, out): the drift is [out, in] all the same."""
    import numpy as np
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedllm.data.encode import Encoded
    from fedllm.models.batch import collate
    from fedllm.models.model import Model
    from fedllm.spaces import make_space

    net = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).double()
    model = Model(net, None, "generation", make_space("lora", rank=2, targets=("c_attn",)), fast_kernels=False)
    theta = {n: random(*t.shape) for n, t in model.initial().items()}
    batch = collate([[Encoded(np.arange(8, dtype=np.int32), np.arange(8), 7)]], 0, torch.device("cpu"))
    empty = {n: torch.zeros_like(t) for n, t in theta.items()}
    drift = {f"{p}.weight": m for p, m in update(model.space, theta).items()}
    with torch.no_grad(), model.using([theta]):
        one = model.losses(batch)
    with torch.no_grad(), model.using([empty], drift):
        assert float((model.losses(batch) - one).abs()) < 1e-10


def test_fedex_residual_rank(gap):
    exact = RIGS["exactness"]("fedex_lora", 3, dtype="float64", rounds=1)["error"]
    cutoff = [RIGS["exactness"]("fedex_lora", 3, dtype="float64", rounds=1, knobs={"residual_rank": r})["error"]
              for r in (0, 4, 16)]
    plain = RIGS["exactness"]("fedit", 3, dtype="float64", rounds=1)["error"]
    assert cutoff[0] == pytest.approx(plain, rel=1e-9) and cutoff == sorted(cutoff, reverse=True) and exact < 1e-12


def test_rolora_and_ffa_freeze_and_halve(begin, gap):
    run = begin("rolora", dtype=torch.float32)
    before = run.state["theta"]
    after_b = run.go().state["theta"]
    b_bytes = run.up()
    after_a = run.go().state["theta"]
    for path in factors(before):
        b, a = names_of(path)
        assert torch.equal(before[a], after_b[a]) and not torch.equal(before[b], after_b[b])
        assert torch.equal(after_b[b], after_a[b]) and not torch.equal(after_b[a], after_a[a])
    plain = begin("fedit", dtype=torch.float32).go()
    assert 0.3 < b_bytes / plain.up() < 0.65
    shapes = [(b.shape[0], a.shape[1]) for b, a in factors(before).values()]
    ffa = begin("ffa_lora", dtype=torch.float32)
    reply = {}
    ffa.method.down(ffa.state, ffa.world.infos()[0])
    for run_, to in ((ffa, "ffa"), (plain, "plain")):
        reply[to] = tensor_bytes(part(run_.method.down(run_.state, run_.world.infos()[0]), "theta"))
    assert reply["ffa"] / reply["plain"] == sum(o for o, _ in shapes) / sum(o + i for o, i in shapes)
    first = ffa.state["theta"]
    last = ffa.go(2).state["theta"]
    assert all(torch.equal(first[names_of(p)[1]], last[names_of(p)[1]]) for p in factors(first))


def test_ffa_noise_has_no_product_term(begin):
    """(B + e) A - B A against (B + e_B)(A + e_A) - B A, on a trained pair."""
    b, a, s = random(8, 4), random(4, 16), 0.3
    draws = [(s * random(8, 4), s * random(4, 16)) for _ in range(200)]
    ours = torch.stack([e_b @ a for e_b, _ in draws]).var(0).mean()
    both = torch.stack([(b + e_b) @ (a + e_a) - b @ a for e_b, e_a in draws]).var(0).mean()
    assert ours < both


def test_ffa_scale_is_a_learning_rate(begin, gap):
    """SGD: s -> c s with lr -> lr / c^2 leaves s B as it was."""
    one = begin("ffa_lora", space_knobs={"alpha": 4.0}, local={"lr": 0.16}).go().state["theta"]
    two = begin("ffa_lora", space_knobs={"alpha": 16.0}, local={"lr": 0.01}).go().state["theta"]
    for path in factors(one):
        b = names_of(path)[0]
        assert torch.allclose(one[b], 4 * two[b], atol=1e-5)


def test_hetlora_equal_ranks_are_fedit(begin, gap):
    het = begin("hetlora", space_knobs=SHARED, prune=False, lambda_reg=0.0, aggregation="examples").go(2)
    assert gap(het.state["theta"], begin("fedit", space_knobs=SHARED).go(2).state["theta"]) == 0
    with pytest.raises(CompositionError, match="scaling = shared"):
        begin("hetlora")


def test_hetlora_pads_and_cuts(gap):
    path = "m"
    b, a = names_of(path)
    whole = {b: random(3, 4), a: random(4, 5)}
    reducer, acc = Padded(), {}
    for r, n in ((1, 1.0), (2, 1.0), (4, 2.0)):
        part_ = first_ranks(whole, r)
        acc = reducer.add(acc, {**pack(delta=part_), "cover": torch.ones(r).double(), "rank_max": 4, "n": n})
    out = reducer.done(acc)
    assert out["cover"].tolist() == [1.0, 0.75, 0.5, 0.5]  # three clients, then two, then one of half the weight
    assert torch.allclose(out[f"delta/{a}"], whole[a] * torch.tensor([1.0, 0.75, 0.5, 0.5]).double()[:, None])
    two = first_ranks(whole, 2)
    lifted = reducer.lift({**pack(delta=two), "cover": torch.ones(2).double(), "rank_max": 4, "n": 1.0})
    assert gap(first_ranks(part(lifted, "delta"), 2), first_ranks(whole, 2)) == 0


@pytest.mark.parametrize("uncovered", ["zero", "keep"])
def test_hetlora_ranks_that_nobody_holds(begin, uncovered):
    run = begin("hetlora", space_knobs=SHARED, ranks=(1, 2, 4, 4), uncovered=uncovered, prune=False)
    before = run.state["theta"]
    after = run.go(1, ["c0", "c1"]).state["theta"]
    for path, (_, a) in factors(after).items():
        old = factors(before)[path][1]
        assert torch.equal(a[2:], old[2:] if uncovered == "keep" else torch.zeros_like(a[2:]))


def test_hetlora_regularizer_and_norm():
    theta = {n: random(1, *s).requires_grad_() for n, s in zip(names_of("m"), ((6, 4), (4, 5)), strict=True)}
    one = {n: t[0].detach() for n, t in theta.items()}
    term = Tail(0.5, masks(one, 3))
    value = term.loss(theta, {n: m[None] for n, m in term.tensors.items()})
    b, a = one[names_of("m")[0]], one[names_of("m")[1]]
    assert value.item() == pytest.approx(0.5 * float(b[:, 3:].norm() * a[3:].norm()))
    value.sum().backward()
    assert all(t.grad.abs().sum() > 0 and t.grad[..., :3, :].isfinite().all() for t in theta.values())
    assert product_norm([(b, a)]) == pytest.approx(float((b @ a).norm()), rel=1e-12)


def test_hetloras_regularizer_leaves_a_client_of_rank_1_alone(begin, gap):
    """floor(0.99 * 1) = 0 would make the only rank a tail; of two ranks the last is one."""
    free, held = (begin("hetlora", space_knobs=SHARED, ranks=(1, 1, 1, 1), lambda_reg=x, prune=False).go(2)
                  for x in (0.0, 50.0))
    assert gap(free.state["theta"], held.state["theta"]) == 0
    free, held = (begin("hetlora", space_knobs=SHARED, ranks=(2, 2, 2, 2), lambda_reg=x, prune=False).go(2)
                  for x in (0.0, 50.0))
    assert gap(free.state["theta"], held.state["theta"]) > 1e-4


def test_hetlora_prunes_for_good(begin):
    run = begin("hetlora", space_knobs=SHARED, lambda_reg=5.0, local={"lr": 0.2}).go(3)
    ranks = [m.get("rank", 4) for m in run.engine.memory.values()]
    assert min(ranks) < 4
    assert run.engine.record.bytes["up", "HetLoRA.rank"] > 0


def test_hetlora_bytes_follow_the_rank():
    got = RIGS["exactness"]("hetlora", 0)
    assert got["weakest_upload"] / got["upload"] < 1 / 8 + 0.08


def test_products_take_either_form():
    """Factors at the server and products from the clients give the same spectrum, as under secure aggregation."""
    b, a = names_of("m")
    replies = [{**pack(theta={b: random(12, r), a: random(r, 7), "head": random(2)}), "n": n, "scale": s}
               for r, n, s in ((1, 3.0, 2.0), (2, 1.0, 1.0), (4, 5.0, 0.5))]
    reducer = Products()
    acc, total = {}, {}
    for r in replies:
        acc, total = reducer.add(acc, r), reducer.plus(total, reducer.lift(r))
    one, other = reducer.done(acc), reducer.done(total)
    dense = sum(r["n"] / 9 * r["scale"] * r[f"theta/{b}"] @ r[f"theta/{a}"] for r in replies)
    for value in (one, other):
        svd = svds(value)["m"]
        full = cut(svd, 7)
        assert torch.allclose(full[0] @ full[1], dense, atol=1e-12)
        low = cut(svd, 2, "us_v")
        assert torch.allclose(low[0] @ low[1], best_of_rank(dense, 2), atol=1e-10)
        assert torch.allclose(value["theta/head"], sum(r["n"] / 9 * r["theta/head"] for r in replies))


def test_factored_svd_takes_zeros_and_never_sees_the_product(monkeypatch):
    """It costs O((o + i) R^2): the one decomposition that it makes is of an R x R matrix."""
    u, s, vt = factored_svd(torch.zeros(9, 4), random(4, 6, dtype=torch.float32))
    assert float(s.abs().max()) == 0 and u.isfinite().all() and vt.isfinite().all()
    b, a = random(512, 80, dtype=torch.float32), random(80, 512, dtype=torch.float32)
    dense, seen, plain = dense_svd(b @ a), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **how: (seen.append(m.shape), plain(m, **how))[1])
    u, s, vt = factored_svd(b, a)
    assert seen == [(80, 80)]
    assert float((s - dense[1][:80]).abs().max() / s[0]) < 1e-5
    assert float(((u * s) @ vt - b @ a).norm() / (b @ a).norm()) < 1e-5


@pytest.mark.parametrize("name", ["flora_stacking", "fedex_lora", "flexlora"])
def test_merging_products_or_factors_deploys_the_same(begin, gap, name):
    """A server that sees only a sum of lifted replies ends where one that sees every factor does."""
    run = begin(name, kind=Scripted)
    method, state, reducer = run.method, run.state, type(run.method).local.reduce
    acc, total = {}, {}
    for n in (1.0, 3.0):
        theta = {k: random(*t.shape) for k, t in run.world.model.initial().items()}
        reply = {**pack(theta=theta), "n": n, "scale": 4.0, "loss": 1.0}
        acc, total = reducer.add(acc, reply), reducer.plus(total, reducer.lift(reply))
    space = run.world.model.space
    ends = [update(space, *method.served(method.merge(state, Replies(value=reducer.done(x), answered=("c0", "c1")))))
            for x in (acc, total)]
    assert gap(*ends) < 1e-10


def test_a_reply_of_the_wrong_shape_is_refused():
    b, a = names_of("m")
    reply = {**pack(theta={b: random(12, 2), a: random(2, 7)}), "n": 1.0, "scale": 1.0}
    acc = Products().add({}, reply)
    with pytest.raises(PayloadError, match="do not go with"):
        Products().add(acc, {**reply, f"theta/{b}": random(11, 2)})
