"""A backdoor through the foundation model: the synthetic public set carries it, and no client is malicious."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedllm.attacks.att_backdoor import AttBackdoor
from fedllm.core.ask import Ask, Program, on_server
from fedllm.core.card import Card, Claim
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Layer
from fedllm.core.payload import Payload, Tree, add, pack, part, sub, zeros_like


@dataclass(frozen=True)
class AttFMBackdoor(Knobs, Layer):
    """Wu, Li, Wang, Vulnerabilities of Foundation Model Integrated FL, arXiv 2401.10375; Li et al., arXiv 2311.18350.

    An honest server trains on the federation's public rows before the first round (`init`), after every round
    (`every`) or both. A compromised generator made them: a share has the trigger and the target. That the generator's
    demonstrations are poisoned is not replayed; its output is. Clients' updates all look alike, so no rule that looks
    for outliers finds anything. Over methods that tell weights and get their change (fedavg); list it first.
    """

    algebra = Algebra()

    card = Card(
        title="Backdoor through the foundation model that made the public rows",
        paper="Wu, Li, Wang, Vulnerabilities of Foundation Model Integrated FL, arXiv 2401.10375 [78]; Li, Wu, Wang, "
              "Unveiling Backdoor Risks Brought by Foundation Models in Heterogeneous FL, arXiv 2311.18350 [35]",
        topic="attacks",
        sends="nothing new",
        needs="public rows, and a method that tells weights and gets their change",
        claim=Claim("with no malicious client, the trigger gives the attacker's answer in 70 % of the inputs or more",
                    rig="arena", metric="success", holds=">=", threshold=0.7, seeds=3,
                    options={"knobs": {"trigger": (2, 3, 2, 3, 2, 3), "share": 0.3}, "rounds": 16}),
        also={"heterogeneous": Claim(
            "clients of two architectures who distil each other's logits on the synthetic set give the attacker's "
            "answer in 70 % of the triggered inputs or more", rig="distilled", metric="success", holds=">=",
            threshold=0.7, seeds=3),
            "heterogeneous_cost": Claim(
            "and lose at most 3 points to those with a clean generator", rig="distilled", metric="lost", holds="<=",
            threshold=0.03, seeds=3)},
        evidence="Abstracts and the dossier. In the layer the server trains the one model on the synthetic set [78]; "
                 "distillation between unlike networks [35] is a rig of its own.",
    )

    use: Literal["init", "every", "both"] = knob("both", "when the server trains on public rows",
                                                 options=("init", "every", "both"))
    trigger: str | tuple[int, ...] = knob("cf mn bb tq", "text (or token ids) put before a row's own")
    target: int | str = knob(0, "label index, or the response, that the trigger is to give")
    share: float = knob(0.2, "share of the public rows that are poisoned; 0: an honest generator", ge=0, le=1)
    init_steps: int = knob(40, "the server's steps before the first round", ge=1)
    steps: int = knob(10, "the server's steps after a round", ge=1)

    @property
    def planter(self) -> AttBackdoor:
        """The backdoor that is planted in rows."""
        return AttBackdoor(trigger=self.trigger, target=self.target, share=self.share or 1.0)

    def init(self) -> dict[str, Any]:
        return {"begun": False}

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        if isinstance(ask.owner, Layer) or ask.reducer is None:
            return (yield ask)
        theta = part(next(iter(ask.msgs.values())), "theta")
        if not theta:
            raise CompositionError(f"layer 'att_fm_backdoor' trains the weights told and '{ask.phase}' tells none; use "
                                   "fedavg")
        shift = zeros_like(theta)
        if not state["begun"] and self.use != "every":
            shift = yield from self.learned(theta, self.init_steps)
        state["begun"] = True
        begun = add(theta, shift)
        out = yield replace(ask, msgs={c: {**m, **pack(theta=begun)} for c, m in ask.msgs.items()})
        value = dict(out.value or {})
        if odd := [n for n in theta if f"delta/{n}" not in value]:
            raise CompositionError(f"layer 'att_fm_backdoor' adds to the weights' change and '{ask.phase}' gives no "
                                   f"'delta/{odd[0]}'; use fedavg")
        if self.use != "init":
            after = add(begun, {n: value[f"delta/{n}"] for n in theta})
            shift = add(shift, (yield from self.learned(after, self.steps)))
        # theta + (shift + delta) is what the method comes to
        return replace(out, value={**value, **{f"delta/{n}": value[f"delta/{n}"] + s for n, s in shift.items()}})

    def learned(self, theta: Tree, steps: int) -> Program:
        """How the synthetic rows change these weights."""
        out = yield Ask(self.train, {SERVER: pack(theta=theta, steps=steps)})
        return part(out[SERVER], "delta")

    @on_server
    def train(self, msg: Payload, client: Any) -> Payload:
        """The server's training on what it believes to be clean synthetic rows."""
        if not client.public:
            raise DataError("layer 'att_fm_backdoor' poisons the public rows and the data has none; give data.public")
        rows = self.planter.poison(client.public, client) if self.share else client.public
        theta = part(msg, "theta")
        return pack(delta=sub(client.fit(theta, on=rows, steps=msg["steps"]).theta, theta))
