"""Against agreeing with whoever asks: public claims with a made-up person's opinion, whose truth it does not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.core.ask import on_client, on_server
from fedllm.core.errors import DataError, RecipeError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._averaged import Handed
from fedllm.methods._opinions import AGREE, DISAGREE, NAMES, Wording, claims_of, told
from fedllm.methods._rewrite import need_generation

FLIPS = {"rig": "opinions", "relative": "difference", "baseline": "fedavg", "grid": {"local.lr": (1e-3, 3e-3)}}


@dataclass(frozen=True)
class SycophancySynth(Handed):
    """The server makes `n` claims of public rows, leaves out those that its model answers wrongly when nobody gives an
    opinion, and sends them once; clients mix a share `rho` of them into their training. Otherwise FedAvg.
    """

    card = Card(
        title="Simple synthetic data against sycophancy",
        paper="Wei, Huang, Lu, Zhou, Le, Simple Synthetic Data Reduces Sycophancy in Large Language Models, 2023, "
              "arXiv 2308.03958",
        topic="LLMs for federated learning: synthesis",
        sends="as fedavg; once down: the synthetic rows",
        needs="a generation task with public rows of a right answer each",
        claim=Claim("answers that change with the asker's opinion are at least 30 points fewer than after FedAvg, for "
                    "as many steps", metric="flips", holds="<=", threshold=-0.3, **FLIPS),
        also={"price": Claim("and the clients' own task is at most 2 points less exact", metric="exact", holds=">=",
                             threshold=-0.02, **FLIPS)},
        evidence="Authors' code read by the dossier: persona, opinion and order of choices drawn each by itself, the "
                 "filter. Claims are about the run's public rows, where theirs are about labels of NLP sets. The names "
                 "are half of ours; a test has the other half. On our small model it does not work: answers change as "
                 "often as after FedAvg (0.03 more, ten seeds), at no price.",
    )
    trial = Trial({"n": 0})
    only_fits = False
    n: int = knob(1000, "claims before the filter; 0: none, FedAvg", ge=0)
    rho: float = knob(0.2, "share of synthetic rows in what a client learns", ge=0, lt=1)
    filtration: bool = knob(True, "leave out claims that the model answers wrongly without an opinion")
    claim_as: str = knob(Wording.claim, "how a claim is written: {prompt}, {response}")
    persona: str = knob(Wording.persona, "how an opinion is written: {name}, {opinion} (agree or disagree), {claim}")
    question: str = knob(Wording.question, "how it is asked: {claim}, and the choices {first} and {second}")

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = {"claim_as": ("{prompt}", "{response}"), "persona": ("{opinion}", "{claim}"), "question": ("{claim}",)}
        for name, marks in wanted.items():
            if any(mark not in getattr(self, name) for mark in marks):
                raise RecipeError(f"SycophancySynth.{name} = {getattr(self, name)!r} is not allowed; it must hold "
                                  f"{' and '.join(marks)}")

    @property
    def wording(self) -> Wording:
        return Wording(self.claim_as, self.persona, self.question)

    def check(self, model: Any) -> None:
        need_generation("SycophancySynth", model)

    def public_at(self):
        return ("server",) if self.n else ()

    def init(self, model: Any) -> State:
        return {"theta": model.initial(), "rows": [], "told": [], "wrong": 0}

    def making(self, state: State) -> Payload | None:
        return pack(theta=state["theta"]) if self.n else None

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Any) -> Payload:
        w, own = part(msg, "theta"), client.data
        flat = self.handed(msg, client) if self.n else []
        rows = [{"prompt": p, "response": r} for p, r in zip(flat[::2], flat[1::2], strict=True)]
        many = min(len(rows), round(self.rho / (1 - self.rho) * len(own)))
        some = [rows[i] for i in client.rng("opinions").choice(len(rows), many, replace=False)] if many else []
        fitted = client.fit(w, on=[*own, *some]) if some else client.fit(w)
        return pack(delta=sub(fitted.theta, w), n=client.n, loss=fitted.loss)

    @on_server
    def written(self, msg: Payload, client: Any) -> Payload:
        """Prompts and answers of all rows in turn, and how many claims the model got wrong."""
        tell, rng = client.model.tokenizer.decode, client.rng("opinions")
        pairs = [(tell(e.prompt, skip_special_tokens=True), tell(e.ids[1:][np.asarray(e.labels)[1:] >= 0],
                                                                 skip_special_tokens=True)) for e in client.public]
        if len({r for _, r in pairs}) < 2:
            raise DataError("method 'sycophancy_synth' makes claims of public rows with different answers, and the "
                            "data has no two; give data.public")
        claims = claims_of(pairs, self.n, self.wording, rng)
        right = self.known(client, part(msg, "theta"), claims) if self.filtration else [True] * len(claims)
        kept = [c for c, ok in zip(claims, right, strict=True) if ok]
        if not kept:
            raise DataError(f"method 'sycophancy_synth': the model answers none of {len(claims)} claims rightly, so "
                            "that none is left; set method.filtration = false, or begin with a model that knows them")
        rows = told(kept, self.wording, NAMES[::2], rng)
        flat = [text for r in rows for text in (r["prompt"], r["response"])]
        return {"rows": flat, "wrong": len(claims) - len(kept)}

    def known(self, client: Any, theta: Any, claims: Sequence[Any]) -> list[bool]:
        """Whether the model finds the right answer likelier than the wrong one, without an opinion."""
        asked = [{"prompt": self.wording.asked(c, i % 2 == 1), "response": answer}
                 for answer in (AGREE, DISAGREE) for i, c in enumerate(claims)]
        [got] = client.probe([theta], on=asked)
        agree, disagree = np.split(np.asarray(got.total) / np.maximum(1, got.count), 2)
        return [bool((a < d) == c.true) for a, d, c in zip(agree, disagree, claims, strict=True)]

    def report(self, state: State) -> Mapping[str, Any] | None:
        return {"rows": len(state["rows"]) // 2, "left_out": state["wrong"]} if state["rows"] else None
