"""Per-example clipping against Opacus and a loop, noise, Poisson batches, ledgers, and what is refused."""

from dataclasses import dataclass

import dp_accounting as dp
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, QuorumError, RecipeError
from fedllm.core.layer import Facts
from fedllm.core.method import Star
from fedllm.core.payload import pack, part, sub
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.local.fit import run_fits
from fedllm.local.private import Private
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.privacy.accountant import BudgetSpent
from fedllm.privacy.dp_sgd import DPSGD
from fedllm.privacy.secagg import SecAgg

SGD = LocalSpec(optimizer="sgd", lr=0.5, steps=3, batch_size=4)


def start_of(model, dtype, seed=1):
    """A start whose B is not zero, so that every gradient is alive."""
    g = torch.Generator().manual_seed(seed)
    return {n: (x + 0.1 * torch.randn(x.shape, generator=g)).to(dtype) for n, x in model.initial().items()}


def fit(world, theta, client, plan, clip, noise=0.0, batch=4.0, seed=0):
    private = Private(clip, noise, batch, torch.Generator().manual_seed(seed))
    return Fit(client, world.model, theta, None, world.encoded(client, "train"), plan, world.local, private=private)


@pytest.mark.parametrize("clip", [1e-2, 0.5, 1e3])
def test_it_equals_opacus(tiny, tiny_llama_folder, clip):
    """Three steps of SGD with clipping and no noise, on PEFT's LoRA with Opacus's hooks; fp64."""
    from opacus import GradSampleModule
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    _, _, _, world = tiny(dtype=torch.float64, spec=SGD)
    theta = start_of(world.model, torch.float64)
    plan = [np.array(at) for at in ([0, 3, 5, 6], [1, 2], [4, 0, 7])]
    ours = run_fits([fit(world, theta, "c3", plan, clip)], Limits())[0].theta

    net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float64)
    peft = get_peft_model(net, world.model.space.peft_config(net, "generation")).double()
    named = {n.replace(".default", ""): p for n, p in peft.named_parameters() if p.requires_grad}
    assert named.keys() == theta.keys()
    for n, p in named.items():
        p.data.copy_(theta[n])
    hooked, rows = GradSampleModule(peft, loss_reduction="sum"), world.encoded("c3", "train")
    for at in plan:
        picked = [rows[i] for i in at]
        width = max(len(e.ids) for e in picked)
        ids = torch.tensor([[*e.ids, *[0] * (width - len(e.ids))] for e in picked])
        labels = torch.tensor([[*e.labels, *[-100] * (width - len(e.ids))] for e in picked])
        mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in picked])
        z = hooked(input_ids=ids, attention_mask=mask).logits[:, :-1]
        ce = torch.nn.functional.cross_entropy(z.mT, labels[:, 1:], ignore_index=-100, reduction="none")
        (ce.sum(1) / (labels[:, 1:] != -100).sum(1)).sum().backward()
        norms = torch.stack([p.grad_sample.flatten(1).pow(2).sum(1) for p in named.values()]).sum(0).sqrt()
        shrink = (clip / (norms + 1e-6)).clamp(max=1)
        for p in named.values():
            p.data -= 0.5 * torch.einsum("i,i...->...", shrink, p.grad_sample) / 4
            p.grad_sample = p.grad = None
    for n, p in named.items():
        torch.testing.assert_close(ours[n], p.data, atol=1e-6, rtol=0)
    assert clip < 1 or max(float((ours[n] - theta[n]).abs().max()) for n in ours) > 1e-3


@pytest.mark.parametrize("space", ["lora", "head", "soft_prompt", "adapter", "prefix", "ia3", "full"])
def test_it_equals_a_loop_over_examples(tiny, space):
    """In every space: one example at a time, clipped by hand."""
    spec = LocalSpec(optimizer="sgd", lr=1.0, steps=1, batch_size=4)
    _, _, _, world = tiny(space=space, dtype=torch.float64, spec=spec)
    theta, at, clip = start_of(world.model, torch.float64), np.array([0, 2, 5]), 0.05
    ours = run_fits([fit(world, theta, "c2", [at], clip)], Limits())[0].theta
    total = {n: torch.zeros_like(x) for n, x in theta.items()}
    for i in at:
        alone = run_fits([Fit("c2", world.model, theta, None, world.encoded("c2", "train"), [np.array([i])],
                              world.local)], Limits())[0].theta
        g = sub(theta, alone)
        norm = sum(float(x.pow(2).sum()) for x in g.values()) ** 0.5
        total = {n: total[n] + x * min(1, clip / (norm + 1e-6)) for n, x in g.items()}
    for n in theta:
        torch.testing.assert_close(ours[n], theta[n] - total[n] / 4, atol=1e-9, rtol=0)


def test_clients_of_unequal_rank_and_batch_share_a_step(tiny):
    """Together they end where each ends alone; noise stays off the padding, and an empty batch is noise alone."""
    _, _, _, world = tiny(dtype=torch.float64, spec=SGD)
    thetas = [{n: x.double() + 0.1 for n, x in world.model.initial(r).items()} for r in (4, 2, 3)]
    plans = [[np.array([0, 1, 2]), np.array([], int), np.array([3])], [np.array([4]), np.array([1, 5]), np.array([0])],
             [np.array([], int)] * 3]
    make = [lambda k=k: fit(world, thetas[k], f"c{k}", plans[k], 0.3, noise=0.7, seed=k) for k in range(3)]
    together = run_fits([m() for m in make], Limits())
    for k, m in enumerate(make):
        alone = run_fits([m()], Limits())[0].theta
        for n, x in alone.items():
            torch.testing.assert_close(together[k].theta[n], x, atol=1e-10, rtol=0)
    moved = torch.cat([(together[2].theta[n] - x).flatten() for n, x in thetas[2].items()])
    assert float(moved.std()) == pytest.approx(0.5 * 3**0.5 * 0.7 * 0.3 / 4, rel=0.05)


def test_the_layer_trains_privately_and_books_each_client(tiny):
    layer = DPSGD(noise_multiplier=1.1, clip_norm=0.5, delta=1e-3)
    engine, m, state, world = tiny(layers=[layer], k=3, loopback=True, spec=SGD)
    states = [layer.init()]
    for r in range(2):
        engine.begin(r)
        state = drive(m.round(state, world.infos()), engine, [layer], states)
        engine.commit()
    says = layer.statement(states[0])
    for i in range(3):
        event = dp.PoissonSampledDpEvent(4 / (6 + i), dp.GaussianDpEvent(1.1))
        independent = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event, 6).get_epsilon(1e-3)
        assert says["clients"][f"c{i}"] == pytest.approx(independent, rel=0.01)
    assert says["epsilon"] == says["clients"]["c0"] and says["unit"] == "example" and not says["void"]
    assert not any("loss" in e for e in engine.record.events)


def test_seeded_noise_repeats_and_voids_the_claim(tiny):
    ends = []
    for seed in (1, 1, None):
        layer = DPSGD(noise_multiplier=1.0, seed=seed)
        engine, m, state, world = tiny(layers=[layer], k=3, spec=SGD)
        states = [layer.init()]
        ends.append(drive(m.round(state, world.infos()), engine, [layer], states)["theta"])
        assert bool(layer.statement(states[0])["void"]) == (seed is not None)
    name = next(n for n in ends[0] if "lora_B" in n)
    assert ends[0][name].equal(ends[1][name]) and not ends[0][name].equal(ends[2][name])


def test_vectorized_equals_one_at_a_time(tiny):
    ends = []
    for kind in ("in_process", "vectorized"):
        layer = DPSGD(noise_multiplier=0.8, seed=5)
        engine, m, state, world = tiny("fedprox", layers=[layer], k=4, engine=kind, dtype=torch.float64, spec=SGD)
        state = {"theta": {n: x.double() for n, x in state["theta"].items()}}
        ends.append(drive(m.round(state, world.infos()), engine, [layer])["theta"])
    for n, x in ends[0].items():
        torch.testing.assert_close(ends[1][n], x, atol=1e-9, rtol=0)


@dataclass(frozen=True)
class Peek(Star):
    """Trains, and also tells its loss on the rows (or of the rows themselves, or of their gradient)."""

    what: str = "loss"

    @on_client(reduce=Mean())
    def local(self, msg, client):
        theta = part(msg, "theta")
        told = {"loss": lambda: client.loss(theta), "data": lambda: float(len(client.data)),
                "gradient": lambda: float(sum(g.sum() for g in client.gradient(theta).values()))}[self.what]()
        return pack(delta=sub(client.fit(theta).theta, theta), n=client.n, told=told)

    def round(self, state, clients):
        return (yield Ask(self.local, {c.id: pack(theta=state["theta"]) for c in clients}))


@pytest.mark.parametrize("what", ["loss", "data", "gradient"])
def test_reading_rows_beside_training_is_refused(tiny, what):
    layer = DPSGD(noise_multiplier=1.0)
    engine, _, state, world = tiny(layers=[layer], k=3, spec=SGD)
    engine.stack = (Peek(what), layer)
    with pytest.raises(CompositionError, match=r"dp_sgd.*client.fit only.*dp_fedavg"):
        drive(Peek(what).round(state, world.infos()), engine, [layer])


@pytest.mark.parametrize("method", ["fedavg", "fedask"])
def test_the_budget_sets_the_noise_and_stops_the_run(tiny, method):
    """Also where a round asks a second question, which trains nothing and so costs nothing."""
    rows = {"c0": 6, "c1": 7, "c2": 8}
    layer = DPSGD(epsilon=6.0, delta=1e-3).bind(Facts(rows, 3, 2, SGD))
    engine, m, state, world = tiny(method, layers=[layer], k=3, spec=SGD)
    states = [layer.init()]
    with pytest.raises(BudgetSpent, match="budget is 6"):
        for r in range(5):
            engine.begin(r)
            state = drive(m.round(state, world.infos()), engine, [layer], states)
            engine.commit()
    assert r >= 2 and 4.0 < layer.statement(states[0])["epsilon"] <= 6.0


def test_a_client_keeps_to_the_budget_whatever_the_server_thinks_a_question_costs(tiny):
    layer = DPSGD(epsilon=6.0, delta=1e-3).bind(Facts({"c0": 6, "c1": 7, "c2": 8}, 3, 2, SGD))
    engine, m, state, world = tiny(layers=[layer], k=3, spec=SGD)
    states = [{**layer.init(), "trains": {"FedAvg.local": 0}}]
    with pytest.raises(BudgetSpent, match="budget is 6"):
        for r in range(5):
            engine.begin(r)
            state = drive(m.round(state, world.infos()), engine, [layer], states)
            states[0]["trains"] = {"FedAvg.local": 0}  # as if it had never trained
            engine.commit()
    assert r >= 2


def test_a_round_that_fails_is_paid_for(tiny):
    layer = DPSGD(noise_multiplier=1.0, delta=1e-3).bind(Facts({"c0": 6, "c1": 7, "c2": 8}, 3, 2, SGD))
    engine, m, state, world = tiny(layers=[layer], k=3, spec=SGD)
    states, engine.quorum = [layer.init()], 4
    with pytest.raises(QuorumError):
        drive(m.round(state, world.infos()), engine, [layer], states)
    event = dp.PoissonSampledDpEvent(4 / 6, dp.GaussianDpEvent(1.0))
    independent = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(event, 3).get_epsilon(1e-3)
    assert layer.statement(states[0])["epsilon"] == pytest.approx(independent, rel=0.01)
    unbound = DPSGD(noise_multiplier=1.0)
    assert unbound.statement(states[0])["epsilon"] == float("inf")


def test_under_secure_aggregation(tiny):
    """Its ledger's question has no reducer and passes; the sums are as without."""
    ends = []
    for more in ((), (SecAgg(clip=64.0),)):
        layers = [DPSGD(noise_multiplier=1.0, seed=2), *more]
        engine, m, state, world = tiny(layers=layers, k=4, spec=SGD)
        states = [x.init() for x in layers]
        ends.append(drive(m.round(state, world.infos()), engine, layers, states)["theta"])
        assert len(states[0]["clients"]) == 4
    for n, x in ends[0].items():
        torch.testing.assert_close(ends[1][n], x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("knobs", [{"noise_multiplier": 0.0}, {"clip_norm": 0.0, "noise_multiplier": 1.0},
                                   {"epsilon": -1.0}, {}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(RecipeError, match=next(iter(knobs), "both missing")):
        DPSGD(**knobs)
    with pytest.raises(RecipeError, match=r"delta = 0.2 is not allowed with 100 units"):
        DPSGD(noise_multiplier=1.0, delta=0.2).bind(Facts({"a": 100}, 1, 1, SGD))
