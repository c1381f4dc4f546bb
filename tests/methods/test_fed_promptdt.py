"""Fed-PromptDT: what a window holds, what acting reads, plain FedAvg without a prompt, and what leaves a server."""

import numpy as np
import pytest
import torch

import fedllm
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.payload import leaves
from fedllm.core.program import drive
from fedllm.data.scenes import EnvironmentSpec, environments
from fedllm.engines import ENGINES
from fedllm.engines.carry import carry_out
from fedllm.engines.client import ClientCall, server_info
from fedllm.engines.world import World
from fedllm.environments.registry import bounded
from fedllm.local.decide import Decide, run_decisions
from fedllm.local.logs import Pool, gathered, to_go, window
from fedllm.local.policy import Episode
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.decider import make_decider
from fedllm.runs.layers import make_layer
from fedllm.spaces import make_space

RNG = np.random.default_rng
KNOBS = {"context_len": 3, "prompt_len": 2, "logs": 6, "test_episodes": 2}
RECIPE = {"name": "vr", "model": {"name": "decider", "width": 8, "depth": 1}, "space": "full", "rounds": 2,
          "method": {"name": "fed_promptdt", **KNOBS}, "local": {"lr": 0.01, "steps": 2, "batch_size": 4},
          "data": {"source": "env:edge_vr", "environment": {"clients": 3, "slots": 5, "held_out": 2}}}


def world(dtype="float64", clients=3, **local):
    fed = environments("env:edge_vr", EnvironmentSpec(clients=clients, held_out=2, slots=5), 1)
    model = make_decider(18, 15, 4, 8, 1, make_space("full"), seed=1, dtype=dtype)
    return World(model, fed, LocalSpec(**{"optimizer": "sgd", "lr": 0.5, "steps": 2, "batch_size": 4, **local}), 1)


def trained(engine, dtype="float64", rounds=2, layers=(), w=None, **knobs):
    w = w or world(dtype)
    m = make_method("fed_promptdt", **{**KNOBS, **knobs})
    driver, state, states = ENGINES[engine]((m, *layers), w), m.init(w.model), [x.init() for x in layers]
    for t in range(rounds):
        driver.begin(t)
        state = drive(m.round(state, w.infos()), driver, layers, states)
        driver.commit()
    scores = drive(m.evaluate(state, [*w.infos(), server_info()], "global"), driver)
    return state, {c: dict(s) for c, s in scores.items()}, driver


def gap(a, b):
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a)


def logs_of(w, client="client-0", episodes=8):
    env = bounded(w.rows(client, "train")[0], RNG(3))
    return gathered(env, episodes, RNG(4), 0.1), env


def test_what_is_still_to_be_earned():
    e = Episode(np.zeros((3, 2)), np.zeros(3, int), np.array([1.0, 2.0, 4.0]), False)
    assert to_go(e, 10).tolist() == [[pytest.approx(0.7), 0.0], [pytest.approx(0.6), pytest.approx(0.1)],
                                     [pytest.approx(0.4), pytest.approx(0.2)]]


def test_a_prompt_is_of_the_best_and_never_of_its_own_window():
    logs, env = logs_of(world())
    total = [e.total for e in logs]
    pool = Pool(logs, env, 0.7, 2)
    assert pool.target * env.max_steps == pytest.approx(np.quantile(total, 0.7)) and 1 < len(pool.best) < 4
    of = lambda front: next(i for i, e in enumerate(logs) if any((e.seen[t : t + 2] == front.seen).all()  # noqa: E731
                                                                for t in range(len(e.actions) - 1)))
    assert {of(pool.shown(RNG(i))) for i in range(30)} == set(pool.best)
    assert pool.best[0] not in {of(pool.shown(RNG(i), pool.best[0])) for i in range(30)}
    assert (pool.shown(RNG(0)).cues == env.scene.cues()).all()
    none = Pool(logs, env, 0.7, 0).shown(RNG(0))
    assert none.tokens == 0 and all(part.size == 0 for part in none.parts.values())


def test_actions_alone_are_learned_and_none_sees_itself_or_what_follows():
    w = world()
    logs, env = logs_of(w)
    front = Pool(logs, env, 0.9, 2).shown(RNG(0))
    e, togo = logs[0], to_go(logs[0], env.max_steps)
    row, short = window(togo, e.seen, e.actions, 3, front), window(togo[3:], e.seen[3:], e.actions[3:], 3, front)
    assert (row.n_target, short.n_target, len(row.ids)) == (3, 2, 3 + 2 + 1)
    theta = w.model.initial()

    def z(row):
        with torch.no_grad(), w.model.using([theta]):
            w.model.stack.rows = 1
            return w.model.net.decide(collate([[row]], 0, w.model.device).parts)[0]

    with torch.no_grad(), w.model.using([theta]):
        total, count, _ = w.model.row_losses(collate([[row, short]], 0, w.model.device))
    said = z(row).log_softmax(-1)
    assert total[0] == pytest.approx(-sum(float(said[t, e.actions[t]]) for t in range(3))) and count.tolist() == [3, 2]
    later = window(togo, e.seen, np.array([e.actions[0], *((e.actions[1:] + 1) % 15)]), 3, front)
    assert torch.equal(z(later)[:2], z(row)[:2]) and not torch.equal(z(later)[2], z(row)[2])
    other = window(togo, e.seen, e.actions, 3, Pool(logs, env, 0.1, 2).shown(RNG(5)))
    assert not torch.equal(z(other), z(row))


def test_acting_reads_what_a_window_of_the_same_steps_holds():
    w = world(dtype="float32")
    theta = {n: t + 0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
             for n, t in w.model.initial().items()}
    rows = w.federation.test
    fronts = [Pool(*logs_of(w, c), 0.9, 2).shown(RNG(i)) for i, c in enumerate(("client-0", "client-1"))]
    ask = Decide("a", w.model, theta, None, [bounded(r, RNG(0)) for r in rows], [5, 6], True, fronts, 3)
    less = Decide("b", w.model, theta, None, [bounded(rows[1], RNG(0))], [6], True, fronts[1:], 3)
    (one, two), (again,) = run_decisions([ask, less], Limits())
    assert (two.actions == again.actions).all() and (two.rewards == again.rewards).all()
    for episode, front in ((one, fronts[0]), (two, fronts[1])):
        left = front.target - np.concatenate([[0.0], episode.rewards.cumsum()[:-1]]) / 100
        togo = np.stack([left, np.arange(5) / 100], 1).astype(np.float32)
        for t in range(5):
            at = max(0, t - 2)
            row = window(togo[at : t + 1], episode.seen[at : t + 1], episode.actions[at : t + 1], 3, front)
            with torch.no_grad(), w.model.using([theta]):
                w.model.stack.rows = 1
                z = w.model.net.decide(collate([[row]], 0, w.model.device).parts)[0, t - at]
            assert int(z.argmax()) == episode.actions[t]
    assert (ask.wide, ask.most, ask.reads) == (6, 200, 1200)


def test_without_a_prompt_it_is_fedavg_of_a_plain_decision_transformer():
    """Each client fits windows that hold no prompt, and the mean by logged steps is the next state: by hand."""
    w = world(clients=2)
    state, _, _ = trained("vectorized", rounds=1, w=w, prompt_len=0, logs=6)
    start, n, fitted = w.model.initial(), [], []
    for info in w.infos():
        call = ClientCall(info, w, {}, 0, "FedPromptDT.local", 1, lambda r: carry_out([r], Limits())[0])
        rng = call.rng("fed_promptdt")
        env = call.env(rng)
        logs = gathered(call.env(rng), 6, rng, 0.1)
        rows = Pool(logs, env, 0.9, 0).windows(8, 3, rng)
        assert all(r.parts["shown_did"].size == r.parts["cues"].size == 0 for r in rows)
        fitted.append(call.fit(start, on=rows).theta)
        n.append(sum(len(e.actions) for e in logs))
    mean = {name: sum(k * t[name] for k, t in zip(n, fitted, strict=True)) / sum(n) for name in start}
    assert gap(state["theta"], mean) < 1e-12 < gap(mean, start)
    assert "cue.weight" in start and gap({"w": state["theta"]["cue.weight"]}, {"w": start["cue.weight"]}) == 0


@pytest.mark.parametrize("dtype, most", [("float64", 1e-10), ("float32", 1e-5)])
def test_engines_agree(dtype, most):
    (one, s1, _), (other, s2, _) = trained("in_process", dtype), trained("vectorized", dtype)
    assert gap(one["theta"], other["theta"]) <= most and s1 == s2
    assert s1[SERVER]["n"] == 4 and set(s1[SERVER]) == {"n", "return", "cut"}


def test_weights_leave_and_no_log(tmp_path):
    class Seen(fedllm.Layer):
        sent: list = []  # noqa: RUF012

        def client(self, fn, msg, client, call):
            reply = call(msg)
            self.sent += [reply] if fn.__name__ == "local" else []
            return reply

    layer = Seen()
    driver = trained("vectorized", layers=(layer,), rounds=1)[2]
    assert {n.split("/")[0] for r in layer.sent for n, _ in leaves(r)} == {"delta", "n", "loss"}
    assert {n for n in driver.memory["client-0"]} == {"0/seen", "0/did", "0/paid", "0/steps"}
    alone = trained("vectorized", rounds=1, share="nothing")
    assert alone[2].record.totals()["up"] < driver.record.totals()["up"] / 5 and "theta" in alone[2].memory["client-1"]
    with pytest.raises(CompositionError, match="dp_sgd"):
        from fedllm.privacy.composition import check_stack

        check_stack(make_method("fed_promptdt"), [make_layer("dp_sgd", {"noise_multiplier": 1.0}, "layers.0")], {})


def test_logs_stay_and_another_prompt_is_another_places():
    w = world()
    m = make_method("fed_promptdt", **KNOBS)
    call = ClientCall(w.infos()[0], w, {}, 0, "f", 0, lambda r: None)
    first = m.logged(call, 0, call.rng("fed_promptdt"))
    again = m.logged(call, 0, call.rng("other"))
    assert all((a.seen == b.seen).all() and (a.rewards == b.rewards).all() for a, b in zip(first, again, strict=True))
    own = m.fronts(call, w.federation.test)
    another = make_method("fed_promptdt", shows="another", **KNOBS).fronts(call, w.federation.test)
    assert [f.target for f in another] == [f.target for f in own][::-1] and own[0].target != own[1].target
    assert trained("in_process", rounds=1, shows="another")[1]["client-0"]["n"] == 4
    alone = make_method("fed_promptdt", shows="another", **KNOBS).score({"on": "local", **{
        f"theta/{n}": t for n, t in w.model.initial().items()}}, call)
    assert alone == {"n": 0}


def test_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # so that no process is started for what is beside
    run = fedllm.run(RECIPE, root=tmp_path, **{"evaluate.baselines": ["equal_share"]})
    e = run.evaluation
    assert {"return", "cut", "n"} <= set(e["global"]) and e["global"]["n"] == 4 and len(e["clients"]) == 3
    assert e["baselines"]["equal_share"]["global"]["n"] == 4
    assert (run.folder / "model" / "decider.safetensors").is_file()
    assert "equal share" in (run.folder / "report.html").read_text()
    assert "decider.safetensors" in (run.folder / "model_card.md").read_text()


@pytest.mark.parametrize("change, kind, says", [
    ({"model": "policy"}, CompositionError, "learns from logs"),
    ({"method": "fed_marl"}, CompositionError, "allowed are fed_promptdt"),
    ({"model": {"name": "decider", "hidden": [4]}}, RecipeError, "do not fit together"),
    ({"local.steps": None}, RecipeError, "local.steps is not set"),
    ({"method.target_return_quantile": 0.0}, RecipeError, "target_return_quantile"),
    ({"model.width": 12}, RecipeError, "model.width"),
    ({"data.source": "office", "data.environment": None}, RecipeError, "do not fit together"),
    ({"evaluate.baselines": ["local_only"]}, CompositionError, "allowed are random, equal_share, proportional"),
])
def test_what_does_not_go_is_refused(tmp_path, change, kind, says):
    with pytest.raises(kind, match=says):
        fedllm.run(RECIPE, root=tmp_path, **change)
    assert not list(tmp_path.glob("*/events.jsonl"))
