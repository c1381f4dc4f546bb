"""FedAgent: an agent at the server learns how much each client counts; clients stay near by distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER, Client
from fedllm.core.errors import CompositionError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, pack, part, sub
from fedllm.core.rng import numpy_stream
from fedllm.local.objectives.distill import teacher_logits
from fedllm.methods import _weighing as by
from fedllm.methods._qmix import made, taught

RIG = {"rig": "flipped", "metric": "accuracy", "relative": "difference", "holds": ">", "threshold": 0.0,
       "grid": {"local.lr": (3e-3, 1e-2)}}


@dataclass(frozen=True)
class FedAgentRLKD(Method):
    """theta <- theta + sum_k p_k delta_k, p_k ~ n_k exp(score_k) by a Q-agent that is paid in the probe's accuracy."""

    card = Card(
        title="FedAgent: reinforcement learning weighs clients, distillation holds them",
        paper="Sun et al., FedAgent: Federated learning on Non-IID data via reinforcement learning and knowledge "
              "distillation, Expert Systems with Applications 2025, 127973; reward: Wang et al., FAVOR, INFOCOM 2020",
        topic="agents",
        sends="FedAvg's: the trainables down, their change, rows and loss up; nothing more of a client leaves",
        needs="data.task classification; labelled public rows at the server (data.public): the probe, which is no test",
        claim=Claim("where 3 of 10 clients have turned labels, accuracy is above FedAvg's", baseline="fedavg", **RIG),
        also={"bandit": Claim("and above that of a bandit over what each client's step alone is worth",
                              baseline="fedagent_rlkd", against={"knobs": {"agent": "bandit"}}, **RIG),
              "weights": Claim("clients with turned labels weigh less than half of 1/K each, on the mean of the last "
                               "10 rounds", rig="flipped", metric="flipped_weight", holds="<", threshold=0.5),
              "drift": Claim("distillation alone leaves clients nearer to the global model than FedAvg does, after as "
                             "many steps", rig="flipped", metric="drift", baseline="fedavg", relative="ratio",
                             holds="<", threshold=1.0, options={"knobs": {"agent": "off"}, "flip": 0, "rounds": 10}),
              "plain": Claim("without agent and distillation it is FedAvg (largest difference of a weight)",
                             rig="flipped", metric="off_fedavg", holds="<=", threshold=1e-6, kind="exact",
                             options={"knobs": {"agent": "off", "kd_lambda": 0.0}, "rounds": 3}),
              "again": Claim("the agent's decisions follow from the state and the seed (decisions that differ)",
                             rig="flipped", metric="again", holds="<=", threshold=0.0, kind="exact",
                             options={"rounds": 12})},
        evidence="The paper's text was not in reach: from its abstract by a dossier. The agent is a Q-net of each "
                 "client's level, mixed (QMIX), where others have DDPG; it also learns from weightings that were tried "
                 "on the probe and did not count, since a run has too few rounds for deep RL. A bandit did as well.",
    )
    trial = Trial({"warmup": 1, "tries": 2}, task="classification", silent="how long a client was away is told to the "
                  "agent", rounding="an agent's choice may be another after rounding")

    action: Literal["weights", "subset"] = knob("weights", "what the agent chooses: weights, or who counts at all",
                                                options=("weights", "subset"))
    agent: Literal["q", "bandit", "off"] = knob("q", "off: FedAvg's weights", options=("q", "bandit", "off"))
    kd_lambda: float = knob(0.5, "weight of the distillation from the model that was received", ge=0)
    temperature: float = knob(2.0, "T of the distillation", gt=0, le=20)
    reward: Literal["target", "gain"] = knob("gain", "target: 64^(accuracy - target_acc) - 1; gain: what it rose by",
                                             options=("target", "gain"))
    target_acc: float = knob(0.95, "of the reward", gt=0, le=1)
    gamma: float = knob(0.5, "discount of later rounds", ge=0, lt=1)
    warmup: int = knob(3, "rounds with FedAvg's weights, from which the agent learns by its tries", ge=0)
    tries: int = knob(8, "further weightings that are tried on the probe in a round", ge=0)
    levels: int = knob(3, "of a client's weight; of a subset 2", ge=2)
    spread: float = knob(1.5, "the lowest and highest scores: -spread and spread", gt=0)
    explore: float = knob(0.02, "share of levels that are drawn at random", ge=0, lt=1)
    agent_lr: float = knob(1e-2, "rate of the agent", gt=0)
    replay: int = knob(6, "rounds that the agent remembers", ge=1)
    agent_seed: int = knob(0, "of the agent and its draws", ge=0)

    only_fits: ClassVar[bool] = False
    count = property(lambda self: 2 if self.action == "subset" else self.levels)

    def public_at(self) -> Sequence[Literal["clients", "server"]]:
        return () if self.agent == "off" else ("server",)

    def check(self, model: Any) -> None:
        if model.task != "classification":
            raise CompositionError(f"method 'fedagent_rlkd' and data.task = {model.task!r} do not fit together: it "
                                   "holds classes against classes; allowed is 'classification'")

    def init(self, model: Any) -> State:
        self.check(model)
        return {"theta": model.initial(), "round": 0, "net": made(self.agent_seed, by.FEATURES, self.count), "past": {},
                "value": {}, "last": {}, "p": {}, "probe": []}

    def round(self, state: State, clients: Sequence[Any]) -> Program:
        out = yield Ask(self.local, {c.id: pack(theta=state["theta"]) for c in clients})
        ids, n = list(out), np.array([float(out[c]["n"]) for c in out])
        share, deltas = n / n.sum(), [part(out[c], "delta") for c in ids]
        state, p = {**state, "round": state["round"] + 1}, share
        if self.agent != "off":
            told = pack(theta=state["theta"], net=state["net"], delta={
                f"{c}/{n}": t for c, d in zip(ids, deltas, strict=True) for n, t in d.items()})
            told |= {"ids": ids, "share": share.tolist(), "losses": [out[c]["loss"] for c in ids],
                     "away": [state["round"] - 1 - state["last"].get(c, state["round"] - 1) for c in ids],
                     "value": [state["value"].get(c, 0.0) for c in ids], "round": state["round"]}
            [got] = (yield Ask(self.weigh, {SERVER: told}, quorum=1)).values()
            p, state = np.array(got["p"]), self.learned(state, ids, got)
        last = {**state["last"], **dict.fromkeys(ids, state["round"])}
        return {**state, "theta": by.moved(state["theta"], deltas, p), "last": last,
                "p": dict(zip(ids, p.tolist(), strict=True))}

    @on_client(gives="delta: tree, n: rows, loss: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        theta, near = part(msg, "theta"), {}
        if self.kd_lambda:  # CE + lambda T^2 KL(received || own)
            z = torch.from_numpy(client.measure(theta, client.tokens, teacher_logits))
            near = {"objective": by.Near(self.kd_lambda, self.temperature), "side": {"teacher": list(z)}}
        fitted = client.fit(theta, **near)
        return pack(delta=sub(fitted.theta, theta), n=client.n, loss=fitted.loss)

    @on_server
    def weigh(self, msg: Payload, client: Client) -> Payload:
        """Clients' states on the probe, the levels and weights that count, and others with what they would be worth."""
        theta, share = part(msg, "theta"), np.array(msg["share"])
        rng = numpy_stream(self.agent_seed, "weigh", msg["round"])
        deltas = [part(msg, f"delta/{c}") for c in msg["ids"]]
        before, *alone = by.probed(client, [theta, *(by.moved(theta, [d], [1.0]) for d in deltas)])
        worth = [a - before for a in alone]
        s = by.features(worth, msg["losses"], share, deltas, msg["away"])
        level = by.chosen(part(msg, "net"), s, self.explore, self.count, rng)
        every = [level, *by.tried(level, self.count, self.tries, rng)]
        each = [by.weights(share, a, self.count, self.spread, self.action == "subset") for a in every]
        value = by.by_bandit(msg["value"], worth)
        if self.agent == "bandit":
            each = [by.bandit_weights(share, value, self.spread)]
        after = by.probed(client, [by.moved(theta, deltas, p) for p in each])
        r = [64 ** (a - self.target_acc) - 1 if self.reward == "target" else 10 * (a - before) for a in after]
        p = share if msg["round"] <= self.warmup else each[0]
        return {"s": s, "a": torch.stack(every[: len(each)]), "r": r, "p": p.tolist(), "value": value, "probe": before}

    def learned(self, state: State, ids: Sequence[str], got: Payload) -> State:
        """The agent after a round: what was done and tried, with the states that came after it."""
        value = {**state["value"], **dict(zip(ids, got["value"], strict=True))}
        past = {r: {**one, "after": one.get("after", got["s"])} for r, one in state["past"].items()}
        net = state["net"]
        if self.agent == "q" and past:
            net = taught(net, by.remembered(past), self.gamma, self.agent_lr, passes=4)
        now = {"s": got["s"], "a": got["a"], "r": list(got["r"])}
        return {**state, "net": net, "past": dict([*past.items(), (str(state["round"]), now)][-self.replay :]),
                "value": value, "probe": [*state["probe"], float(got["probe"])]}

    def report(self, state: State) -> Any:
        return {"weight_of_each_client_in_the_last_round": state["p"], "probe": state["probe"]}
