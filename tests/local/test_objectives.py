"""What clients descend: DPO and distillation against closed forms, engines against each other, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedllm.core.errors import CompositionError, DataError, FedLLMError, RecipeError
from fedllm.core.payload import sub
from fedllm.data.encode import Encoded
from fedllm.engines.carry import carry_out
from fedllm.engines.client import ClientCall
from fedllm.local.fit import run_fits
from fedllm.local.flops import steps_of, work_of
from fedllm.local.forward import run_losses, run_measures
from fedllm.local.objective import beside, lane_losses
from fedllm.local.objectives import registry
from fedllm.local.objectives.distill import Distill, teacher_logits
from fedllm.local.objectives.dpo import DPO, log_likelihood
from fedllm.local.objectives.registry import make_objective, objectives
from fedllm.local.objectives.task import Task
from fedllm.local.private import Private
from fedllm.local.requests import Fit, Limits, Losses, Measure
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space
from tests.methods.conftest import begin, llama

SGD = LocalSpec(optimizer="sgd", lr=0.1, batch_size=3, max_length=32)


def model(space="lora", dtype=torch.float64, **knobs):
    return Model(llama(dtype), None, "generation", make_space(space, **knobs), fast_kernels=False)


def rows(seed, count, answer=3):
    """Token arrays of 5 to 12 tokens, of which up to `answer` are learned."""
    rng, out = np.random.default_rng(seed), []
    for n in rng.integers(5, 13, count):
        ids = rng.integers(3, 64, n).astype(np.int32)
        learned = int(rng.integers(1, answer + 1))
        out.append(Encoded(ids, np.where(np.arange(n) < n - learned, -100, ids).astype(np.int64), learned))
    return out


def moved(theta, seed, by=0.1):
    g = torch.Generator().manual_seed(seed)
    return {n: t + by * torch.randn(t.shape, generator=g).to(t) for n, t in theta.items()}


def plan(count, size=3):
    return [np.arange(i, min(i + size, count)) for i in range(0, count, size)]


def dpo_side(m, chosen, seed):
    others = rows(seed + 50, len(chosen))
    return {"rejected": others, "ref": torch.from_numpy(np.random.default_rng(seed).normal(size=len(chosen)))}


def distill_side(chosen, seed):
    rng = np.random.default_rng(seed)
    return {"teacher": [torch.from_numpy(rng.normal(size=(e.n_target, 64))) for e in chosen]}


def logp(m, e):
    """log pi(y|x) from the whole logits of one row, as transformers gives them."""
    z = m.net(input_ids=torch.from_numpy(e.ids).long()[None]).logits[0].log_softmax(-1)
    y = torch.from_numpy(e.labels)[1:]
    return z[:-1][y != -100].gather(1, y[y != -100][:, None]).sum()


def test_the_dpo_loss_is_its_formula():
    """-logsigmoid(beta d) (1 - s) - logsigmoid(-beta d) s, the mean over pairs, from each row's whole logits."""
    m = model()
    chosen, others = rows(0, 6), rows(1, 6)
    theirs = {"rejected": others, "ref": torch.linspace(-1, 1, 6, dtype=torch.float64)}
    theta = moved(m.initial(), 3)
    for beta, s in ((0.1, 0.0), (0.7, 0.2)):
        with m.using([theta]):
            got = lane_losses(DPO(beta, s), m, [chosen], [theirs])
            d = torch.stack([logp(m, a) - logp(m, b) for a, b in zip(chosen, others, strict=True)]) - theirs["ref"]
        want = (-F.logsigmoid(beta * d) * (1 - s) - F.logsigmoid(-beta * d) * s).mean()
        assert abs(float(got) - float(want)) < 1e-6 and float(got) != pytest.approx(math.log(2), abs=1e-3)


def test_distillation_is_the_kl_of_softened_distributions():
    m, own = model(), rows(0, 4)
    side = distill_side(own, 2)
    theta = moved(m.initial(), 3)
    with m.using([theta]):
        got = lane_losses(Distill(temperature=2.0, ce=0.25), m, [own], [side])
        total, count = 0.0, 0
        for e, t in zip(own, side["teacher"], strict=True):
            y = torch.from_numpy(e.labels)[1:]
            z = m.net(input_ids=torch.from_numpy(e.ids).long()[None]).logits[0][:-1][y != -100]
            p, q = (t / 2).softmax(-1), (z / 2).softmax(-1)
            ce = F.cross_entropy(z, y[y != -100], reduction="sum")
            total += float(0.75 * 4 * (p * (p / q).log()).sum() + 0.25 * ce)
            count += e.n_target
        soft = {"teacher": [t.softmax(-1) for t in side["teacher"]]}
        same = lane_losses(Distill(2.0, 0.25, "probabilities"), m, [own], [soft])
    assert float(got) == pytest.approx(total / count, abs=1e-10) and float(same) == pytest.approx(float(got), abs=1e-10)


def test_distillation_pulls_a_student_to_its_teacher():
    m, own = model("full"), rows(0, 6)
    teacher, start = moved(m.initial(), 4), m.initial()
    with torch.no_grad(), m.using([teacher]):
        said = []
        for e in own:
            y = torch.from_numpy(e.labels)[1:]
            said.append(m.net(input_ids=torch.from_numpy(e.ids).long()[None]).logits[0][:-1][y != -100])
    fit = Fit("c", m, start, None, own, plan(6) * 20, LocalSpec(lr=0.01), objective=Distill(), side={"teacher": said})
    begun = run_fits([Fit("c", m, start, None, own, plan(6), SGD, objective=Distill(), side={"teacher": said})],
                     Limits())[0].loss
    with m.using([run_fits([fit], Limits())[0].theta]):
        left = float(lane_losses(Distill(), m, [own], [{"teacher": said}]))
    assert left < 0.05 * begun


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("objective", [DPO(0.5), Distill(1.5, 0.3)])
def test_clients_of_one_step_equal_clients_alone(objective, dtype, tolerance):
    m = model(dtype=dtype, rank=4)
    asks = []
    for k, count in enumerate((4, 9, 6)):
        own = rows(k, count)
        side = dpo_side(m, own, k) if isinstance(objective, DPO) else distill_side(own, k)
        asks.append(Fit(f"c{k}", m, m.initial(4 - k), None, own, plan(count), SGD, objective=objective, side=side))
    assert len({a.group for a in asks}) == 1
    together, alone = run_fits(asks, Limits()), [run_fits([a], Limits())[0] for a in asks]
    for a, b, ask in zip(together, alone, asks, strict=True):
        assert max(float(t.abs().max()) for t in sub(a.theta, b.theta).values()) <= tolerance
        assert a.loss == pytest.approx(b.loss, abs=tolerance) and a.tokens == b.tokens == work_of(ask).tokens
        assert any(float(t.abs().max()) > 10 * tolerance for t in sub(a.theta, ask.theta).values())


def test_other_knobs_and_other_objectives_do_not_share_a_step():
    assert len({DPO(0.1).key, DPO(0.2).key, Distill().key, Task().key}) == 4 and DPO(0.1).key == DPO(0.1).key


def test_the_task_itself_is_the_models_own_loss():
    m, own = model(), rows(0, 5)
    assert Fit("c", m, {}, None, own, [], SGD).objective == Task()
    with m.using([m.initial()] * 2):
        got = lane_losses(Task(), m, [own[:3], own[3:]], [{}, {}])
    wanted = [r.mean for r in run_losses([Losses("c", m, m.initial(), None, own[:3]),
                                          Losses("c", m, m.initial(), None, own[3:])], Limits())]
    assert got.tolist() == pytest.approx(wanted, abs=1e-12)


def test_what_goes_beside_a_row_is_counted():
    m, own = model(), rows(0, 6)
    side = dpo_side(m, own, 0)
    fit = Fit("c", m, m.initial(), None, own, plan(6), SGD, objective=DPO(), side=side)
    plain = Fit("c", m, m.initial(), None, own, plan(6), SGD)
    other = Fit("c", m, m.initial(), None, side["rejected"], plan(6), SGD)
    assert work_of(fit) == work_of(plain) + work_of(other) and steps_of(fit, 3) == 2 * steps_of(plain, 3) == 4
    soft = Fit("c", m, m.initial(), None, own, plan(6), SGD, objective=Distill(), side=distill_side(own, 0))
    assert work_of(soft) == work_of(plain) and steps_of(soft, 3) == 2


def test_a_lot_holds_what_goes_beside_its_rows_too():
    from fedllm.local.fit import _lots

    m, own = model(), rows(0, 3)
    asks = [Fit(f"c{k}", m, m.initial(), None, own, plan(3), SGD, objective=DPO(), side=dpo_side(m, own, k))
            for k in range(2)]
    widest = max(int(a.lengths.max()) * 3 for a in asks)
    assert len(_lots(asks, Limits(batch_tokens=2 * widest))) == 1
    assert len(_lots(asks, Limits(batch_tokens=2 * widest - 1))) == 2


def test_dp_sgd_clips_each_pair_of_a_dpo_step():
    """w' = w - lr sum_i clip(g_i) / B, with g_i from one pair at a time, and no noise."""
    m = model("full")
    own = rows(0, 5)
    side, theta, clip = dpo_side(m, own, 0), moved(m.initial(), 1, 0.01), 0.05
    private = Private(clip, 0.0, 5.0, torch.Generator())
    got = run_fits([Fit("c", m, theta, None, own, [np.arange(5)], SGD, objective=DPO(), side=side, private=private)],
                   Limits())[0]
    total = {n: torch.zeros_like(t) for n, t in theta.items()}
    for i, e in enumerate(own):
        w = {n: t.clone().requires_grad_() for n, t in theta.items()}
        with m.using([w]):
            loss = -F.logsigmoid(0.1 * (logp(m, e) - logp(m, side["rejected"][i]) - side["ref"][i]))
            grads = torch.autograd.grad(loss, list(w.values()))
        norm = torch.stack([g.pow(2).sum() for g in grads]).sum().sqrt()
        assert norm > clip
        for n, g in zip(w, grads, strict=True):
            total[n] += g * float((clip / (norm + 1e-6)).clamp(max=1.0))
    for n, t in theta.items():
        assert torch.allclose(got.theta[n], t - 0.1 * total[n] / 5, atol=1e-10, rtol=0)
    assert got.loss == 0.0


def test_a_measure_is_a_vector_a_row_and_clients_share_a_forward():
    m = model()
    asks = [Measure(f"c{k}", m, moved(m.initial(), k), None, rows(k, 3 + k), log_likelihood) for k in range(3)]
    assert len({a.group for a in asks}) == 1 and asks[0].group != Losses("c", m, m.initial(), None, ()).group
    calls = []

    def watched(net, batch):
        calls.append(batch.k)
        return log_likelihood(net, batch)

    got = run_measures([Measure(a.client, m, a.theta, None, a.rows, watched) for a in asks], Limits())
    assert calls[0] == 3
    for a, g in zip(asks, got, strict=True):
        with m.using([a.theta]):
            assert g[:, 0] == pytest.approx([float(logp(m, e)) for e in a.rows], abs=1e-10)
    assert steps_of(asks[0], 3) == pytest.approx(1 / 3) and work_of(asks[0]).tokens == sum(
        len(e.ids) for e in asks[0].rows)


def test_a_measure_of_another_shape_is_refused():
    m = model()
    with pytest.raises(CompositionError, match=r"log_sum gave shape \(\) for 3 rows; allowed is one vector a row"):
        def log_sum(net, batch):
            return net.row_losses(batch)[0].sum()

        run_measures([Measure("c", m, m.initial(), None, rows(0, 3), log_sum)], Limits())


def test_classes_are_distilled_by_what_a_teacher_measured(begin=begin):
    run = begin("fedavg", task="classification", engine="in_process")
    call = client_of(run)
    taught = moved(run.world.model.initial(), 1)
    said = call.measure(taught, call.tokens, teacher_logits)
    assert said.shape == (5, 3)
    fitted = call.fit(run.world.model.initial(), steps=4, objective=Distill(ce=0.5), side={"teacher": said})
    assert np.isfinite(fitted.loss) and fitted.loss > 0


def client_of(run, client="c0"):
    info = {c.id: c for c in run.world.infos()}[client]
    return ClientCall(info, run.world, {}, 0, "FedAvg.local", 1, lambda r: carry_out([r], run.world.limits)[0])


def test_text_beside_a_row_is_tokenized_like_it(begin=begin):
    run = begin("fedavg", engine="in_process")
    call, theta = client_of(run), run.world.model.initial()
    other = [{**row, "response": "w1 w2"} for row in call.data]
    text = call.fit(theta, objective=DPO(), side={"rejected": other, "ref": [0.0] * 5})
    call = client_of(run)
    coded = call.fit(theta, objective="dpo", side={"rejected": call.encode(other), "ref": torch.zeros(5)})
    assert all(torch.equal(a, b) for a, b in zip(text.theta.values(), coded.theta.values(), strict=True))


@pytest.mark.parametrize(("objective", "side", "kind", "says"), [
    (DPO(), None, CompositionError, "objective 'dpo' lacks side 'rejected': give one for each row; it needs rej"),
    (DPO(), {"rejected": []}, CompositionError, "lacks side 'ref'"),
    (DPO(), {"rejected": [], "ref": [], "teacher": []}, CompositionError, "no use for side 'teacher'"),
    (Distill(), {"teacher": [torch.zeros(1, 64)] * 4}, DataError, "side 'teacher' has 4 entries and there are 5 rows"),
    (Task(), {"ref": [0.0] * 5}, CompositionError, "objective 'task' has no use for side 'ref'; allowed is nothing"),
    ("dpoo", None, RecipeError, "objective = 'dpoo' is unknown; did you mean 'dpo'?"),
])
def test_bad_sides_are_refused_before_any_step(objective, side, kind, says, begin=begin):
    run = begin("fedavg", engine="in_process")
    call = client_of(run)
    call._submit = lambda request: pytest.fail("work was done")
    with pytest.raises(kind, match=says.replace("?", r"\?")):
        call.fit(run.world.model.initial(), objective=objective, side=side)


def test_a_teacher_of_another_vocabulary_is_refused():
    m, own = model(), rows(0, 3)
    for side, says in (({"teacher": [torch.zeros(e.n_target, 10) for e in own]}, "10 tokens or classes, and the model"),
                       ({"teacher": [torch.zeros(0, 64) for e in own]}, "has 0 targets a row at most")):
        with pytest.raises(DataError, match=says):
            run_fits([Fit("c", m, m.initial(), None, own, plan(3), SGD, objective=Distill(), side=side)], Limits())


def test_the_registry_finds_every_file_and_checks_knobs():
    files = {p.stem for p in Path(registry.__file__).parent.glob("*.py")} - {"__init__", "registry"}
    assert {"distill", "dpo", "task"} <= set(objectives()) == files
    assert make_objective("dpo", beta=0.3) == DPO(0.3)
    for name, knobs, says in (("dpo", {"beta": 0}, "beta"), ("dpo", {"betta": 1}, "did you mean 'beta'"),
                              ("distill", {"given": "words"}, "given")):
        with pytest.raises(FedLLMError, match=says):
            make_objective(name, **knobs)


def test_numbers_beside_a_row_keep_their_precision():
    got = beside([[0.1, 0.2], [0.3]], model())
    assert got.dtype == torch.float64 and got.tolist() == [0.1, 0.2, 0.3, 0.0]
