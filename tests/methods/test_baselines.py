"""Averages, drift corrections and server optimizers against closed forms."""

from __future__ import annotations

import pytest
import torch

from evidence.rigs.trials import update
from fedllm.core.ask import Replies
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.payload import norm, pack, part, sub
from fedllm.methods.registry import make_method

FULL_BATCH = {"epochs": 1, "batch_size": 64}


def test_one_full_batch_step_of_fedavg_is_one_centralized_step(begin, gap):
    fed, pooled = begin("fedavg", local=FULL_BATCH), begin("centralized", local=FULL_BATCH)
    # rows count alike only where they have equally many targets: weigh by targets, as the pooled loss does
    fed.world.federation = pooled.world.federation
    for run in (fed, pooled):
        for client in (*run.world.federation.clients, "__global__"):
            rows = run.world.encoded(client, "train")
            rows[:] = [one_target(e) for e in rows]
        run.go()
    assert gap(fed.state["theta"], pooled.state["theta"]) < 1e-8  # a Llama computes its norms in fp32
    assert pooled.up() == 0
    assert norm(sub(fed.state["theta"], fed.world.model.initial())) > 1e-4


def one_target(e):
    labels = e.labels.copy()
    labels[:-1] = -100
    return type(e)(e.ids, labels, 1)


def test_centralized_does_as_much_work_as_all_clients(begin):
    run = begin("centralized", local={"epochs": None, "steps": 3, "batch_size": 4} | {"epochs": 1})
    seen = {}
    fit = run.engine.answers
    run.engine.answers = lambda jobs: watched(fit, jobs, run, seen)
    run.go()
    assert seen["steps"] == pytest.approx(sum(3 * n / -(-n // 4) for n in (5, 7, 9, 12)) / 4, abs=0.5)
    assert "one place" in begin("centralized").method.simulation_only


def watched(answers, jobs, run, seen):
    from fedllm.engines import carry

    before = carry.RUNNERS[carry.Fit]

    def runner(requests, limits):
        seen["steps"] = len(requests[0].plan)
        return before(requests, limits)

    carry.RUNNERS[carry.Fit] = runner
    try:
        yield from answers(jobs)
    finally:
        carry.RUNNERS[carry.Fit] = before


def test_one_client_is_plain_local_training(begin, gap):
    fed, alone = (begin(name, sizes=(12,)).go(2) for name in ("fedavg", "local_only"))
    assert gap(fed.state["theta"], alone.engine.memory["c0"]["theta"]) < 1e-15
    assert alone.up() == 0 and alone.engine.record.totals()["down"] == 0


@pytest.mark.parametrize("name", ["fedavg", "fedit", "scaffold", "flora_stacking", "fedex_lora", "flexlora"])
def test_the_order_of_clients_does_not_matter(begin, gap, name):
    ends = []
    for order in (["c0", "c1", "c2", "c3"], ["c2", "c0", "c3", "c1"]):
        run = begin(name, dtype=torch.float32).go(1, order)
        theta, base = run.method.served(run.state)
        ends.append(update(run.world.model.space, theta, base))  # products: the factors of an SVD have no fixed sign
    assert gap(*ends) < 1e-6


def test_fedprox_without_mu_is_fedavg_and_with_it_holds_clients_back(begin, gap):
    assert gap(begin("fedprox", mu=0.0).go(2).state["theta"], begin("fedavg").go(2).state["theta"]) == 0
    moved = []
    for mu in (0.0, 0.1, 1.0, 10.0):
        run = begin("fedprox", mu=mu, local={"steps": 8, "lr": 0.05})
        before = run.state["theta"]
        moved.append(norm(sub(run.go().state["theta"], before)))
    assert moved == sorted(moved, reverse=True) and moved[-1] < moved[0]


def test_scaffold_keeps_its_books(begin, gap):
    run, plain = begin("scaffold", clients=4), begin("fedavg", weighting="uniform")
    assert gap(run.go().state["theta"], plain.go().state["theta"]) < 1e-12
    for _ in range(2):
        run.go()
        c_k = [run.engine.memory[c]["c"] for c in run.world.federation.clients]
        total = {n: sum(c[n] for c in c_k) / 4 for n in c_k[0]}
        assert gap(total, run.state["c"]) < 1e-5
    assert norm(run.state["c"]) > 0


def test_scaffold_with_part_of_the_clients(begin, gap):
    """c stays the mean of all N clients' c_k, those that never came counting as zero."""
    run = begin("scaffold", clients=4).go(1, ["c0", "c1"]).go(1, ["c1", "c2"])
    held = [m["c"] for m in run.engine.memory.values() if "c" in m]
    assert len(held) == 3 and gap({n: sum(c[n] for c in held) / 4 for n in held[0]}, run.state["c"]) < 1e-12
    seen = begin("scaffold").go(1, ["c0", "c1"]).go(1, ["c1", "c2"])
    held = [m["c"] for m in seen.engine.memory.values() if "c" in m]
    assert gap({n: sum(c[n] for c in held) / 3 for n in held[0]}, seen.state["c"]) < 1e-12


def test_scaffold_refuses_an_adaptive_local_optimizer(begin):
    with pytest.raises(CompositionError, match="plain SGD"):
        begin("scaffold", local={"optimizer": "adamw"}).go()
    begin("scaffold", local={"optimizer": "adamw"}, allow_adaptive=True).go()


D, THETA = torch.tensor([0.5, -0.2, 0.0]), torch.tensor([1.0, 2.0, 3.0])


def merged(name, rounds=1, **knobs):
    method, state = make_method(name, **knobs), {"theta": {"w": THETA.double()}}
    for _ in range(rounds):
        state = method.merge(state, Replies(value={**pack(delta={"w": D.double()}), "n": 1.0}))
    return state["theta"]["w"]


def test_server_optimizers_by_hand():
    """One or two rounds on three parameters, D = (0.5, -0.2, 0), tau = 0.1 where there is one."""
    d, at = D.double(), THETA.double()
    v = 0.01 + d * d  # adagrad: v_0 + D^2
    assert torch.allclose(merged("fedadagrad", server_lr=0.1, tau=0.1), at + 0.1 * d / (v.sqrt() + 0.1), atol=1e-12)
    v = 0.99 * 0.01 + 0.01 * d * d
    wanted = at + 0.1 * 0.1 * d / (v.sqrt() + 0.1)  # m = (1 - 0.9) D
    assert torch.allclose(merged("fedadam", server_lr=0.1, tau=0.1), wanted, atol=1e-12)
    shrunk = wanted - 0.1 * 0.2 * at  # adamw: the weights shrink beside the very same step
    assert torch.allclose(merged("fedadamw", server_lr=0.1, tau=0.1, weight_decay=0.2), shrunk, atol=1e-12)
    assert torch.equal(merged("fedadamw", 3, weight_decay=0.0), merged("fedadam", 3))
    v = torch.tensor([0.01 + 0.01 * 0.25, 0.01 + 0.01 * 0.04, 0.01 - 0.0], dtype=torch.float64)
    wanted = at + 0.1 * 0.1 * d / (v.sqrt() + 0.1)  # 0.01 < D^2 for the first two: v grows by (1 - b2) D^2
    assert torch.allclose(merged("fedyogi", server_lr=0.1, tau=0.1), wanted, atol=1e-12)
    assert torch.allclose(merged("fedavgm", 2, momentum=0.9), at + d + (0.9 * d + d), atol=1e-12)


def test_server_optimizers_that_are_fedavg(begin, gap):
    plain = begin("fedavg").go(2).state["theta"]
    assert gap(begin("fedavgm", momentum=0.0).go(2).state["theta"], plain) == 0
    start = begin("fedavg").state["theta"]
    # with tau far above sqrt(v), adam without momentum is eta_s / (2 tau) D: v starts at tau^2
    run = begin("fedadam", beta1=0.0, tau=1e6, server_lr=2e6, beta2=0.999999).go(1)
    step, wanted = sub(run.state["theta"], start), sub(begin("fedavg").go(1).state["theta"], start)
    assert norm(sub(step, wanted)) < 1e-3 * norm(wanted)


@pytest.mark.parametrize(("name", "knob", "value"), [
    ("fedprox", "mu", -1.0), ("scaffold", "server_lr", 0.0), ("fedavgm", "momentum", 1.0), ("fedadam", "beta2", 1.0),
    ("fedadamw", "weight_decay", -0.1), ("fedadagrad", "beta1", 1.0),
    ("fedadagrad", "tau", 0.0), ("rolora", "period", 0), ("hetlora", "gamma", 1.0), ("fedkseed", "K", 0),
    ("flexlora", "split", "halves"), ("fedex_lora", "residual_rank", -1), ("centralized", "match", "luck")])
def test_knobs_out_of_range_are_refused(name, knob, value):
    with pytest.raises(RecipeError, match=knob):
        make_method(name, **{knob: value})


def test_fedit_is_fedavg_on_lora_and_nothing_else(begin, gap):
    assert gap(begin("fedit").go(2).state["theta"], begin("fedavg").go(2).state["theta"]) == 0
    with pytest.raises(CompositionError, match="use the space 'lora'"):
        begin("fedit", space="full")


def test_fedavg_keeps_the_type_of_its_weights(begin):
    assert {t.dtype for t in begin("fedavg").go().state["theta"].values()} == {torch.float64}
    method = make_method("fedavg")
    half = {"w": THETA.bfloat16()}
    out = method.merge({"theta": half}, Replies(value={**pack(delta={"w": D}), "n": 1.0}))
    assert part(pack(theta=out["theta"]), "theta")["w"].dtype == torch.bfloat16
