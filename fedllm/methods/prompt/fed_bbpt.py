"""Fed-BBPT: clients ask a black box for losses, and what they average is a small generator of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fedllm.core.ask import Replies, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part
from fedllm.core.rng import numpy_stream
from fedllm.local.estimate import Bayes, Estimator, Policy, Spsa, arrays, tensors
from fedllm.methods._blackbox import TOLD, Meter, empty_ledger, fp32, prompt, usual_ids
from fedllm.methods._spoken import Spoken


@dataclass(frozen=True)
class FedBBPT(Spoken):
    """policy: n x V probabilities of tokens. spsa: z with prompt = p_0 + A z. bayes: what was asked, and its losses."""

    card = Card(
        title="Fed-BBPT: federated black-box prompt tuning",
        paper="Lin et al., Efficient Federated Prompt Tuning for Black-Box Large Pre-trained Models, arXiv 2310.03123",
        topic="prompt learning: black box",
        sends="both ways n x V probabilities (policy) or q numbers (spsa); bayes: down all observations, up the new "
              "ones. With an endpoint, prompts and rows go to whoever runs it",
        needs="the losses of rows under prompt embeddings (space soft_prompt), or with policy a text endpoint",
        claim=Claim("four clients with label skew (Dirichlet 0.5): within the budget the prompt is more accurate on a "
                    "balanced test than the model without one", rig="black_prompt", metric="over_none", holds=">",
                    threshold=0.0, wins=4),
        also={"spsa": Claim("the same for a continuous prompt by SPSA", rig="black_prompt", metric="over_none",
                            holds=">", threshold=0.0, wins=4, options={"estimator": "spsa"}),
              "bayes": Claim("the same by Bayesian optimization", rig="black_prompt", metric="over_none", holds=">",
                             threshold=0.0, wins=4, options={"estimator": "bayes"})},
        evidence="written from a dossier; no code is public. Ours: candidates are random tokens (telling ones tell on "
                 "rows); SPSA moves a vector in a random subspace, not an image decoder; bayes has no second model",
    )
    trial = Trial({"candidates": 6, "samples": 3, "steps": 2, "batch": 4}, {"name": "soft_prompt", "length": 4})
    estimator: Literal["policy", "spsa", "bayes"] = knob("policy", "how prompts are learned from losses",
                                                         options=("policy", "spsa", "bayes"))
    steps: int = knob(5, "tau, local steps of a client in a round", ge=1)
    batch: int | None = knob(16, "rows that a step asks about; None: all of the client's", ge=1)
    lr: float = knob(0.01, "step of policy and spsa", gt=0)
    candidates: int = knob(200, "V, tokens that a place of the prompt can hold (policy)", ge=2)
    samples: int = knob(20, "I, prompts drawn in a step (policy)", ge=2)
    spread: bool = knob(False, "entries that were not drawn get -1/p, as BDPL's code has it (policy)")
    intrinsic_dim: int = knob(50, "q, numbers that are searched (spsa, bayes)", ge=1)
    alpha: float = knob(1.0, "scale of A beside the embeddings' (spsa, bayes)", gt=0)
    sp_avg: int = knob(5, "disturbances that a step averages (spsa)", ge=1)
    c: float = knob(0.01, "their size (spsa)", gt=0)
    words: tuple[str, ...] = knob((), "what a place of the prompt can hold at an endpoint: words or phrases")
    length: int = knob(4, "n, places of the prompt at an endpoint; a model of ours has the space's length", ge=1)
    seed: int = knob(0, "from which A and the candidates follow", ge=0, lt=2**32)

    def __post_init__(self) -> None:
        super().__post_init__()
        texts = not isinstance(self.words, str) and all(isinstance(w, str) for w in self.words)
        if not texts or (self.estimator != "policy" or len(self.words) < 2 if self.endpoint else self.words):
            raise RecipeError(f"FedBBPT.words = {self.words!r} is not allowed with endpoint = {self.endpoint!r} and "
                              f"estimator = {self.estimator!r}; an endpoint takes the policy over two or more words")

    def check(self, model: Any) -> None:
        super().check(model)
        if self.endpoint:
            return
        if type(model.space).__name__ != "SoftPrompt":
            raise CompositionError("method 'fed_bbpt' learns prompts; use the space soft_prompt, or an endpoint")
        key, have = "intrinsic_dim", model.words.shape[1] * model.space.length
        if self.estimator == "policy":
            key, have = "candidates", len(usual_ids(model))
        if (want := getattr(self, key)) > have:
            raise CompositionError(f"method.{key} = {want} is not allowed; it must be <= {have}, as the model has")

    def how(self, n: int) -> Estimator:
        """The estimator, for a prompt of n places."""
        kinds = len(self.words) or self.candidates
        made: Mapping[str, Callable[[], Estimator]] = {
            "policy": lambda: Policy(n, kinds, self.steps, self.samples, self.lr, self.spread),
            "spsa": lambda: Spsa(self.intrinsic_dim, self.steps, self.sp_avg, self.lr, self.c),
            "bayes": lambda: Bayes(self.intrinsic_dim, self.steps)}
        return made[self.estimator]()

    def calls(self, rows: int) -> int:
        return min(rows, self.batch or rows) * self.how(1).asks

    def init(self, model: Any) -> State:
        self.check(model)
        n = self.length if self.endpoint else model.space.length
        scale = self.alpha * float(model.words.float().std()) / self.intrinsic_dim**0.5  # the spread of A's entries
        return {"shared": tensors(self.how(n).start()), "n": n, "scale": scale, "first": self.first(model), "round": 0,
                "queries": empty_ledger()}

    def first(self, model: Any) -> Tree:
        """What points become prompts by: the candidates' embeddings [V, d], or the first prompt [n, d]."""
        if self.endpoint or self.estimator != "policy":
            return {} if self.endpoint else model.initial()
        ids = numpy_stream(self.seed, "candidates").choice(usual_ids(model), self.candidates, replace=False)
        [name] = model.initial()
        return {name: model.words[torch.from_numpy(ids).long()].float()}

    def down(self, state: State, client: ClientInfo) -> Payload:
        return pack(shared={n: t.float() for n, t in state["shared"].items()}, n=state["n"], scale=state["scale"],
                    round=state["round"])

    def fits(self, msg: Payload, reply: Payload) -> None:
        """What the estimator can merge with what it told."""
        self.how(msg["n"]).merge(arrays(part(msg, "shared")), [arrays(part(reply, "found"))], [1.0])

    @on_client(gives="found: tensors, n: rows, " + TOLD, fits=fits)
    def local(self, msg: Payload, client: Client) -> Payload:
        meter, rng = Meter(client), client.rng("fed_bbpt")
        rows = client.data if self.endpoint else client.tokens
        first = {} if self.endpoint else self.first(client.model)

        def ask(points: np.ndarray) -> Sequence[float]:
            batch = [rows[i] for i in rng.choice(len(rows), min(len(rows), self.batch or len(rows)), replace=False)]
            if self.endpoint:
                return meter.misses([self.phrase(p) for p in points], batch, self.max_new_tokens).mean(1).tolist()
            return meter.losses([self.tree(p, first, msg["scale"]) for p in points], batch)

        found = self.how(msg["n"]).search(arrays(part(msg, "shared")), ask, rng, msg["round"], client.memory)
        return {**pack(found={n: fp32(a) for n, a in found.items()}), "n": client.n, **meter.notes}

    def merge(self, state: State, out: Replies) -> State:
        found, weights = zip(*((arrays(part(out[c], "found")), out[c]["n"]) for c in out.answered), strict=True)
        return {**state, "shared": tensors(self.how(state["n"]).merge(arrays(state["shared"]), found, weights))}

    def tree(self, point: np.ndarray, first: Tree, scale: float) -> Tree:
        """The prompt of a point, [n, d]: candidates by number, or p_0 + A z."""
        if self.estimator == "policy":
            return {name: table[torch.from_numpy(point)] for name, table in first.items()}
        return prompt(torch.from_numpy(point), first, scale, self.seed)

    def served(self, state: State) -> tuple[Tree, None]:
        best = self.how(state["n"]).best(arrays(state["shared"]))
        return ({} if self.endpoint else self.tree(best, state["first"], state["scale"])), None

    def text(self, state: State) -> str:
        return self.phrase(state["shared"]["p"].argmax(1))

    def phrase(self, picks: Any) -> str:
        return " ".join(self.words[int(i)] for i in picks)
