"""FedPIT: what leaves a client was trained on rows that the shared model invented; what its own rows taught stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import on_client
from fedllm.core.errors import CompositionError, RecipeError, Withheld
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, scale, sub
from fedllm.core.reduce import Mean
from fedllm.models.overlap import closest

Row = Mapping[str, Any]
ABORT = 10  # batches of tries, as many times the rows that are wanted

SAID = {"knobs": {"template": "[q] {prompt} [a] {response} [e] ", "temperature": 0.7, "max_new_tokens": 14}}


@dataclass(frozen=True)
class FedPIT(Star):
    """Two adapters: theta_pub learns synthetic rows and travels, theta_pri learns one's own and answers at home.

    Synthetic rows are written by a model that has read the client's rows as demonstrations, so they are private data
    and the method gives no differential privacy. Before anything leaves, an audit compares each of them with all the
    client's rows; one copy, and the client answers nothing in this round.
    """

    card = Card(
        title="FedPIT / FewFedPIT: parameter-isolated instruction tuning on self-generated data",
        paper="Zhang et al., FedPIT: Towards Privacy-preserving and Few-shot Federated Instruction Tuning, arXiv "
              "2403.06131 (v1 FedPIT, v2 FewFedPIT)",
        topic="privacy",
        sends="down: theta_pub; up: its change, or that of the mixture beta theta_pub + (1 - beta) theta_pri",
        needs="a generation task; a model that goes on with demonstrations; clients that remember theta_pri",
        claim=Claim("planted canaries come out of the uploaded adapters less often than out of FedIT's",
                    rig="canaries", metric="extracted", baseline="fedit", relative="difference",
                    holds="<", threshold=0.0, options=SAID),
        also={"price": Claim("and what a client uses at home has a loss on its own rows that is not above FedIT's",
                             rig="canaries", metric="local", baseline="fedit", relative="difference", holds="<=",
                             threshold=0.0, options=SAID)},
        evidence="Written from a dossier on both versions; no code is public. Ours: the audit, one continuation that "
                 "gives instruction and response, and a start of theta_pri halfway between the shared model and the "
                 "private one. FewFedPIT's score of synthetic rows is left out. With beta = 1 nothing that "
                 "was trained on own rows is sent, so canaries cannot come out of it. On our rig clients pay at home: "
                 "a loss of 2.4 with theta_pri against 1.5 with FedIT's model (three seeds).",
    )
    trial = Trial({"synthetic_ratio": 0.0, "beta": 0.5},  # a model of random weights writes no row that can be read
                  far={"method.synthetic_ratio": 1.0, "method.beta": 1.0})
    only_fits = False
    beta: float = knob(1.0, "share of theta_pub in what is sent: 1 is FedPIT, 0.5 FewFedPIT", ge=0, le=1)
    synthetic_ratio: float = knob(1.0, "synthetic rows for each row of the client's own", ge=0)
    k_shot: int = knob(2, "own rows shown as demonstrations", ge=1)
    rouge_max: float = knob(0.7, "most ROUGE-L of a new instruction to any other; 1 keeps all", gt=0, le=1)
    audit_max: float = knob(0.9, "ROUGE-L of a synthetic row to one's own from which it counts as a copy", gt=0, le=1)
    temperature: float = knob(0.7, "of sampling", gt=0)
    max_new_tokens: int = knob(128, "longest synthetic row", ge=1)
    template: str = knob("Instruction: {prompt}\nResponse: {response}\n\n", "how a demonstration is written")

    def __post_init__(self) -> None:
        super().__post_init__()
        marks = self.template.replace("{prompt}", "\0").replace("{response}", "\0").split("\0")
        if len(marks) != 3 or not all(m.strip() for m in marks[:2]) or "{response}{prompt}" in self.template:
            raise RecipeError(f"FedPIT.template = {self.template!r} is not allowed; it must be a mark, {{prompt}}, "
                              "another mark, {response} and an end")
        if self.synthetic_ratio == 0 and self.beta == 1:
            raise RecipeError("FedPIT.synthetic_ratio = 0 is not allowed with beta = 1: nothing would train what is "
                              "sent; it must be > 0, or beta < 1")
        object.__setattr__(self, "_marks", tuple(m.strip() for m in marks))

    def check(self, model: Any) -> None:
        if model.task != "generation":
            raise CompositionError("method 'fedpit' and data.task = classification do not fit together: it invents "
                                   "instructions with responses; use data.task = generation")

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, synthetic: count")
    def local(self, msg, client):
        w, own = part(msg, "theta"), list(client.data)
        synthetic = self.invent(client, w, own)
        self.audit(client.id, synthetic, own)
        # theta_pub <- argmin_{D_syn} from w
        public = client.fit(w, on=synthetic).theta if synthetic else w
        # theta_pri <- argmin_{D_loc + D_syn}, from halfway between w and what it was
        before = client.memory.get("private")
        start = add(scale(before, 0.5), w, 0.5) if before else w
        private = client.fit(start, on=[*own, *synthetic]).theta
        client.memory["private"] = private
        # theta_up = beta theta_pub + (1 - beta) theta_pri
        up = add(scale(public, self.beta), private, 1 - self.beta)
        return pack(delta=sub(up, w), n=client.n, synthetic=float(len(synthetic)))

    def merge(self, state: State, out) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        """At home it is theta_pri that answers."""
        return client.score(client.memory.get("private") or part(msg, "theta"), on=msg["on"])

    def invent(self, client: Any, w: Tree, own: Sequence[Row]) -> list[Row]:
        """New rows by the shared model, with some of the client's own before its eyes."""
        wanted, rng = round(self.synthetic_ratio * len(own)), client.rng("fedpit")
        kept: list[Row] = []
        for _ in range(ABORT if wanted else 0):
            shown = [rng.choice(len(own), min(self.k_shot, len(own)), replace=False) for _ in range(wanted)]
            prompts = ["".join(self.template.format(**own[i]) for i in some) + self._marks[0] for some in shown]  # type: ignore[attr-defined]
            for text in client.generate(prompts, w, max_new_tokens=self.max_new_tokens, temperature=self.temperature):
                row = self.read(text)
                if row and len(kept) < wanted and self.is_new(row["prompt"], [*own, *kept]):
                    kept.append(row)
            if len(kept) == wanted:
                break
        if wanted and not kept:
            raise Withheld(f"client '{client.id}' has no synthetic row after {ABORT * wanted} tries: the model does "
                           "not go on with demonstrations, or repeats them")
        return kept

    def read(self, text: str) -> dict[str, str] | None:
        """Instruction and response in what the model wrote; None where it wrote none."""
        _, middle, end = self._marks  # type: ignore[attr-defined]
        prompt, found, rest = text.partition(middle)
        response = rest.partition(end or self._marks[0])[0]  # type: ignore[attr-defined]
        row = {"prompt": prompt.strip(), "response": response.strip()}
        return row if found and all(row.values()) else None

    def is_new(self, prompt: str, rows: Sequence[Row]) -> bool:
        """Whether an instruction is unlike all others."""
        return self.rouge_max == 1 or closest(prompt, [r["prompt"] for r in rows], self.rouge_max) <= self.rouge_max

    def audit(self, client: str, synthetic: Sequence[Row], own: Sequence[Row]) -> None:
        """Nothing leaves when a synthetic row is, or nearly is, one of the client's own."""
        mine = [f"{r['prompt']} {r['response']}" for r in own]
        for i, row in enumerate(synthetic):
            if (near := closest(f"{row['prompt']} {row['response']}", mine, self.audit_max)) >= self.audit_max:
                raise Withheld(f"client '{client}' sends nothing: synthetic row {i} copies one of its own (ROUGE-L "
                               f"{near:.2f}, allowed is below {self.audit_max:g})")
