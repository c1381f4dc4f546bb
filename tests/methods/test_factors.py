"""What travels of a LoRA, and what an average of factors comes to: FedSA-LoRA, Fed-SB, FedASK, LoRA-FAIR, FLoRIST."""

from __future__ import annotations

import pytest
import torch

from evidence.rigs.trials import RIGS, Scripted, off, update, wanted
from fedllm.core.ask import Replies
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.payload import pack, part, tensor_bytes
from fedllm.local.requests import Limits, Sensitivity
from fedllm.local.sensitivity import run_sensitivities
from fedllm.methods._linalg import dense_svd, factored_svd
from fedllm.methods.efficiency.fedask import refactored
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.spaces.lora import factors, names_of
from fedllm.spaces.lora_sb import as_lora, core

RNG = torch.Generator().manual_seed(0)
SB = {"space": "lora_sb", "space_knobs": {"rank": 4, "alpha": 4.0}}


def random(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


class Measured(Scripted):
    """Training moves at random; gradients are real."""

    def train(self, request):
        return run_sensitivities([request], Limits())[0] if isinstance(request, Sensitivity) else super().train(request)


def test_fedsa_no_message_holds_b(begin):
    run = begin("fedsa_lora")
    msg = run.method.down(run.state, run.world.infos()[0])
    told = {n for n in part(msg, "theta")}
    assert told and all(n.endswith("lora_A.weight") for n in told)
    run.go(2)
    own = run.engine.memory["c0"]["own"]
    assert own and all(n.endswith("lora_B.weight") for n in own) and all(bool(b.any()) for b in own.values())
    assert own.keys().isdisjoint(run.state["theta"])
    before = {n: b.clone() for n, b in own.items()}
    run.go(1, ["c1", "c2"])
    assert all(torch.equal(b, before[n]) for n, b in run.engine.memory["c0"]["own"].items())


def test_fedsa_alone_is_local_training(begin, gap):
    """K = 1: A + (A_1 - A) is A_1 to rounding, so what the client holds is what it would have trained alone."""
    one, alone = (begin(name, sizes=(6,)).go(3) for name in ("fedsa_lora", "local_only"))
    held = {**one.engine.memory["c0"]["own"], **one.state["theta"]}
    assert gap(held, alone.engine.memory["c0"]["theta"]) < 1e-12


def test_fedsa_shares_the_other_factor_and_the_head_when_told(begin):
    run = begin("fedsa_lora", task="classification", share="B", share_head=True)
    assert {n.rpartition("lora_")[2] for n in run.state["theta"] if "lora_" in n} == {"B.weight"}
    assert any("classifier" in n for n in run.state["theta"])
    with pytest.raises(CompositionError, match="use the space 'lora'"):
        begin("fedsa_lora", space="ia3")


def test_fed_sb_is_exact_whatever_the_clients_learned(begin):
    run = begin("fed_sb", kind=Scripted, begin="random", **SB).go(2)
    space, n = run.world.model.space.whole, {c.id: c.n for c in run.world.infos()}
    each = {c: update(space, as_lora(theta)) for c, theta in run.engine.made.items()}
    mean = {p: sum(n[c] / sum(n.values()) * each[c][p] for c in each) for p in each["c0"]}
    assert off(update(space, as_lora(run.state["theta"])), mean) < 1e-12


def test_fed_sb_sends_squares(begin):
    run = begin("fed_sb", **SB)
    info = run.world.infos()[0]
    sites = len(factors(run.state["theta"]))
    first = tensor_bytes(run.method.down(run.state, info))
    run.go(1)
    after = run.method.down(run.state, info)
    assert first > tensor_bytes(after) == 8 * 4 * 4 * sites  # fp64, r^2 a module, whatever its width
    late = type(info)("c9", 3)
    assert tensor_bytes(run.method.down(run.state, late)) == first  # who was not there gets A and B too


def test_fed_sb_starts_from_the_best_of_its_rank(begin):
    """With r as large as the narrow side, B S A is the clients' mean gradient itself."""
    knobs = {"space": "lora_sb", "space_knobs": {"rank": 8, "alpha": 8.0, "targets": ("k_proj", "v_proj")}}
    run = begin("fed_sb", kind=Measured, first_step=0.5, rows=50, **knobs)
    gradients = mean_gradient(run)
    run.go(1)
    started = next(iter(run.engine.took.values())).theta
    s = run.world.model.space.s
    for path, (b, a) in factors(started).items():
        assert torch.allclose(b.mT @ b, torch.eye(8).double(), atol=1e-10)
        assert torch.allclose(a @ a.mT, torch.eye(8).double(), atol=1e-10)
        assert torch.allclose(s * b @ started[core(path)] @ a, -0.5 * gradients[path], atol=1e-10)


def mean_gradient(run):
    """sum_k p_k dL_k/dW of every module, by autograd on the weights themselves."""
    model, out, total = run.world.model, {}, sum(c.n for c in run.world.infos())
    nets = {path: model.net.get_submodule(path) for path in factors(model.initial())}
    for info in run.world.infos():
        rows = run.world.encoded(info.id, "train")
        for row in rows:
            for m in nets.values():
                m.weight.requires_grad_(True)
            with model.using([model.initial()]):
                model.losses(collate([[row]], model.pad, torch.device("cpu"))).sum().backward()
            for path, m in nets.items():
                out[path] = out.get(path, 0) + m.weight.grad * (info.n / total / len(rows))
                m.weight.grad = None
                m.weight.requires_grad_(False)
    return out


def test_fed_sb_needs_its_space_and_a_rank_that_fits(begin):
    with pytest.raises(CompositionError, match="use the space 'lora_sb'"):
        begin("fed_sb")
    with pytest.raises(RecipeError, match=r"space.rank = 9 is not allowed; .* is 8 x 16, so it must be <= 8"):
        begin("fed_sb", space="lora_sb", space_knobs={"rank": 9, "targets": ("k_proj",)})
    with pytest.raises(RecipeError, match=r"space.rank = 30 is not allowed"):  # a rank above the base's
        begin("fedsa_lora", space_knobs={"rank": 30, "targets": ("q_proj",)})


def folded(run, lifted):
    """A merge of two clients' random factors, seen one by one or as a sum."""
    generator = torch.Generator().manual_seed(7)
    reducer, acc, replies = type(run.method).local.reduce, {}, []
    for n in (1.0, 3.0):
        theta = {k: torch.randn(t.shape, generator=generator, dtype=t.dtype)
                 for k, t in run.world.model.initial().items()}
        replies.append(theta)
        reply = {**pack(theta=theta), "n": n, "scale": 4.0, "loss": 1.0}
        acc = reducer.plus(acc, reducer.lift(reply)) if lifted else reducer.add(acc, reply)
    return run.method.merge(run.state, Replies(value=reducer.done(acc), answered=("c0", "c1"))), replies


@pytest.mark.parametrize("lifted", [False, True])
def test_lora_fair_is_the_least_square(begin, gap, lifted):
    """lambda 0: what is left of M - B' A_bar is orthogonal to A_bar's rows; lambda large: FedIT."""
    state, (one, two) = folded(begin("lora_fair", lam=0.0), lifted)
    plain = folded(begin("lora_fair", lam=1e12), lifted)[0]["theta"]
    for path, (b, a) in factors(state["theta"]).items():
        m = sum(p * factors(t)[path][0] @ factors(t)[path][1] for p, t in ((0.25, one), (0.75, two)))
        assert float(((m - b @ a) @ a.mT).abs().max()) < 1e-9
        floor = m - m @ torch.linalg.pinv(a) @ a  # what of M lies outside the rows of A_bar
        assert torch.allclose(m - b @ a, floor, atol=1e-9)
        mean = 0.25 * factors(one)[path][0] + 0.75 * factors(two)[path][0]
        assert float((m - b @ a).norm()) <= float((m - mean @ a).norm())
        assert torch.allclose(plain[names_of(path)[0]], mean, atol=1e-9)


def test_lora_fair_sends_what_fedit_does(begin):
    """The same tensors; its replies say their scale too."""
    fair, plain = begin("lora_fair").go(1), begin("fedit").go(1)
    info = fair.world.infos()[0]
    assert tensor_bytes(fair.method.down(fair.state, info)) == tensor_bytes(plain.method.down(plain.state, info))


def test_florist_keeps_the_energy_that_it_says(begin):
    """The squared relative error of a round is what was left out, and one direction less would have been too little."""
    assert RIGS["exactness"]("florist", 1, dtype="float64", knobs={"tau": 1.0})["error"] < 1e-12
    run = begin("florist", tau=0.8)
    b, a = random(24, 12), random(12, 16)
    svd = factored_svd(b, a)
    left, right = run.method.thresholded(svd)
    lost = float((b @ a - left @ right).square().sum() / (b @ a).square().sum())
    shares = (svd[1].square() / svd[1].square().sum()).cumsum(0)
    q = left.shape[1]
    assert lost == pytest.approx(1 - float(shares[q - 1]), abs=1e-12) and lost <= 0.2 < 1 - float(shares[q - 2])
    zero = run.method.thresholded(factored_svd(torch.zeros(5, 3), random(3, 6).float()))
    assert zero[0].shape == (5, 1) and not zero[0].any()


def test_florist_tells_the_ranks_and_sends_no_more(begin):
    ranks = {"ranks": (1, 2, 4, 8), "space_knobs": {"rank": 8}}
    run = begin("florist", tau=0.9, kind=Scripted, **ranks).go(1)
    stack = begin("flora_stacking", kind=Scripted, **ranks).go(1)
    told = run.method.report(run.state)["rank_of_each_module"]
    info = run.world.infos()[0]
    sizes = {p: b.shape[0] + a.shape[1] for p, (b, a) in factors(run.world.model.initial()).items()}
    down = tensor_bytes(run.method.down(run.state, info))
    assert down == 8 * sum(told[p] * size for p, size in sizes.items())
    assert down < tensor_bytes(stack.method.down(stack.state, info)) and all(1 <= q <= 15 for q in told.values())


def test_florist_late_joiners_hold_the_same_base(begin, gap):
    run = begin("florist", kind=Scripted, tau=1.0, ranks=(1, 2, 4, 8), space_knobs={"rank": 8})
    run.go(2, ["c0", "c1"]).go(1)
    bases = [fit.base for fit in run.engine.took.values()]
    assert len(bases) == 4 and all(gap(b, bases[0]) < 1e-12 for b in bases)
    space = run.world.model.space
    assert off(update(space, *run.method.served(run.state)), wanted(run, space)) < 1e-9


@pytest.mark.parametrize(("name", "knobs", "says"), [
    ("florist", {"tau": 0.0}, "tau = 0.0 is not allowed; it must be > 0"),
    ("lora_fair", {"lam": -1.0}, "lam = -1.0 is not allowed; it must be >= 0"),
    ("fedsa_lora", {"share": "C"}, "share = 'C' is not allowed")])
def test_knobs_out_of_range(name, knobs, says):
    with pytest.raises(RecipeError, match=says):
        make_method(name, **knobs)


def test_fedask_deploys_the_mean_product_though_only_b_is_trained(begin):
    run = begin("fedask", kind=Scripted).go(1)
    space, n, theta = run.world.model.space, {c.id: c.n for c in run.world.infos()}, run.state["theta"]
    start = run.world.model.initial()
    each = {c: update(space, start | {k: x for k, x in made.items() if "lora_B" in k})
            for c, made in run.engine.made.items()}
    mean = {p: sum(n[c] / sum(n.values()) * each[c][p] for c in each) for p in each["c0"]}
    assert off(update(space, theta), mean) < 1e-12
    assert any(not torch.equal(theta[k], x) for k, x in start.items() if "lora_A" in k)  # and yet A moved


def test_fedask_sends_two_sketches(begin):
    run = begin("fedask").go(1)
    up = {e["phase"]: e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "up"}
    pairs = factors(run.state["theta"]).values()
    assert up["FedASK.local"] > sum(8 * b.shape[0] * b.shape[1] for b, _ in pairs)
    assert up["FedASK.project"] > sum(8 * a.shape[0] * a.shape[1] for _, a in pairs)
    assert sum(up.values()) < 1.5 * sum(8 * x.numel() for pair in pairs for x in pair) + 4000


def test_fedask_refuses_a_sketch_that_cannot_hold_the_product_and_keeps_a_when_nothing_was_learned(begin):
    with pytest.raises(CompositionError, match=r"method.sketch = 1 and space.rank.*must be >="):
        begin("fedask", sketch=1)
    a, b = torch.randn(3, 5), torch.zeros(4, 3)
    q = torch.linalg.qr(torch.randn(4, 3)).Q
    kept_b, kept_a = refactored(q, torch.zeros(3, 5), b, a)
    assert torch.equal(kept_a, a) and not kept_b.any()


def test_an_svds_signs_do_not_hang_on_the_routine(monkeypatch):
    """LAPACK may give each pair either sign, by the last bits of its input and by processor."""
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(7, 3, generator=g, dtype=torch.float64), torch.randn(3, 5, generator=g, dtype=torch.float64)
    plain, flip = torch.linalg.svd, torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)

    def other(m, full_matrices):
        u, s, vt = plain(m, full_matrices=full_matrices)
        return u * flip[: len(s)], s, vt * flip[: len(s), None]

    one = dense_svd(b @ a), factored_svd(b, a)
    monkeypatch.setattr(torch.linalg, "svd", other)
    two = dense_svd(b @ a), factored_svd(b, a)
    for (u, s, vt), (u2, _, vt2), made in zip(one, two, (b @ a, b @ a), strict=True):
        assert torch.equal(u, u2) and torch.equal(vt, vt2)
        assert torch.allclose(u * s @ vt, made)
