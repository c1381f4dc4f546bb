"""FedGRPO: clients sample answers, a program says which are right, and only the policies that this improves travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedllm.core.ask import on_client
from fedllm.core.client import Client
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.method import Card, Claim, Trial, knob
from fedllm.core.payload import Payload, Tree
from fedllm.core.reduce import Mean
from fedllm.local.objectives.grpo import GRPO, TokenLogs
from fedllm.methods._groups import advantages
from fedllm.methods._policies import Policies

RIG = {"rig": "verifiable", "metric": "right", "grid": {"local.lr": (1e-3, 3e-3)}}


@dataclass(frozen=True)
class FedGRPO(Policies):
    """The mean of trainables that clients improve by GRPO on rewards that a program gives (the recipe's metric)."""

    card = Card(
        title="FedGRPO: group-relative policy optimization with verifiable rewards",
        paper="GRPO: Shao et al., DeepSeekMath, arXiv 2402.03300; federated: Chen et al., FGRPO, arXiv 2606.03094, and "
              "Zhu et al., FedGRPO, AAAI 2026, arXiv 2602.12014",
        topic="agents",
        sends="down: the trainables; up: their change, a weight, the mean reward; no prompt, answer or reward of one",
        needs="data.task: generation, and a model that is right now and then; evaluate.metric says what is right",
        claim=Claim("where each client's questions are of one kind, the mean policy is right more often over all kinds "
                    "than policies trained alone on as many samples", baseline="fed_grpo", relative="difference",
                    holds=">", threshold=0.0, against={"alone": True}, **RIG),
        also={"pooled": Claim("it is right at most 0.05 less often than one learner that has everybody's questions, on "
                              "as many samples and steps", baseline="fed_grpo", relative="difference", holds=">",
                              threshold=-0.05, against={"pooled": True}, **RIG),
              "weighed": Claim("clients weighed by what they have gained over their own past: right more often than by "
                               "the number of their rows", baseline="fed_grpo", relative="difference", holds=">",
                               threshold=0.0, options={"knobs": {"weigh": "gain"}}, **RIG),
              "even": Claim("answers of equal rewards move no weight", rig="verifiable_even", metric="moved",
                            holds="<=", threshold=0.0, kind="exact")},
        evidence="FGRPO read as an abstract: its weight is ours, n_k max(floor, gain over an average of the client's "
                 "past rewards). FedGRPO's other setting, a policy at the server that clients grade, is not here. An "
                 "answer's tokens are those of its text as it is read again.",
    )
    trial = Trial({"prompts": 2, "answers": 3, "max_new_tokens": 3}, rounding="what is sampled may be another word")
    only_fits = False

    prompts: int = knob(8, "of a round at each client", ge=1)
    answers: int = knob(8, "sampled to each prompt: the group", ge=2)
    temperature: float = knob(1.0, "of sampling", gt=0)
    max_new_tokens: int = knob(16, "longest answer", ge=1)
    clip: float = knob(0.2, "how far a token's ratio to the sampling policy counts", gt=0, lt=1)
    beta: float = knob(0.0, "weight of the distance to the model that the run starts from", ge=0)
    scale: bool = knob(True, "divide advantages by the deviation of their group; false: Dr. GRPO")
    weigh: Literal["rows", "gain"] = knob("rows", "a client's weight: its rows, or those times what it has gained",
                                          options=("rows", "gain"))
    floor: float = knob(0.1, "gain: least share of a client's weight", gt=0, le=1)
    memory: float = knob(0.8, "gain: how much of the average reward is the past's", ge=0, lt=1)

    def check(self, model: Any) -> None:
        if model.task != "generation":
            raise CompositionError(f"method 'fed_grpo' and data.task = {model.task!r} do not fit together: it samples "
                                   "answers and asks a metric which are right; use data.task = 'generation'")

    def check_rows(self, labels: Sequence[str], rows: Any) -> None:
        if found := next((c for c, some in rows.items() if any("messages" in row for row in some)), None):
            raise DataError(f"method 'fed_grpo' answers prompts, and client '{found}' has rows of several turns "
                            "(messages); give prompt and response")

    @on_client(reduce=Mean(), gives="delta?: tree, n: rows, reward: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        start = self.own(msg, client)
        rows, rewards = self.sampled(client, start)  # G answers to each of P questions, and r [P, G]
        a = advantages(rewards, self.scale).reshape(-1)  # A_j = (r_j - mean r) / (std r + eps)
        # A text that is read again may have more tokens than were sampled, and one that ends it.
        logs = TokenLogs(max(2 * self.max_new_tokens, *(row.n_target for row in rows)))
        old = client.measure(start, rows, logs)
        ref = client.measure(client.model.initial(), rows, logs) if self.beta else old
        # min -1/|y| sum_t min(rho_t A, clip(rho_t) A) + beta KL(pi || ref)
        theta = client.fit(start, on=rows, objective=GRPO(self.clip, self.beta),
                           side={"advantage": a.tolist(), "old": list(old), "ref": list(ref)}).theta
        return self.told(client, start, theta, n=client.n * self.weight(client, float(rewards.mean())),
                    reward=float(rewards.mean()))

    def sampled(self, client: Client, theta: Tree) -> tuple[list[Any], np.ndarray]:
        """Rows of sampled answers, group after group, and what each is worth [prompts, answers]."""
        every, rng = client.data, client.rng("fed_grpo")
        some = [every[i] for i in rng.permutation(len(every))[: self.prompts]]
        asked = [row for row in some for _ in range(self.answers)]
        said = client.generate([row["prompt"] for row in asked], theta, max_new_tokens=self.max_new_tokens,
                               temperature=self.temperature)
        rewards = np.array([client.judged(s, row["response"]) for s, row in zip(said, asked, strict=True)])
        read = client.encode([{"prompt": row["prompt"], "response": s} for s, row in zip(said, asked, strict=True)])
        return read, rewards.reshape(len(some), self.answers)

    def weight(self, client: Client, reward: float) -> float:
        """max(floor, gain), gain = (r - past) / (|past| + eps) and 1 at most; the past is an average that follows."""
        if self.weigh == "rows":
            return 1.0
        past = client.memory.get("past", reward)
        client.memory["past"] = self.memory * past + (1 - self.memory) * reward
        return min(1.0, max(self.floor, (reward - past) / (abs(past) + 1e-6)))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return client.score(self.own(msg, client), on=msg["on"])
