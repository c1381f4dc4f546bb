"""A start on synthetic rows: clients send a few that a generator of theirs wrote, and FedAvg goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import RecipeError, Withheld
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, pack, part
from fedllm.gate.copies import distinct
from fedllm.gate.made import license_of, made
from fedllm.methods._bootstrap import Frame
from fedllm.methods._rewrite import need_generation
from fedllm.methods._warm import WarmStart
from fedllm.methods._written import need_new

TRIES = 4
"""So many times the rows that are wanted are drawn, at the most."""
WARM = {"rig": "warm_start", "kind": "level"}


@dataclass(frozen=True)
class SynthWarmstart(WarmStart):
    """Once: every client tunes the model on its own rows for some steps, lets it write `n_syn` rows from nothing, and
    sends them; the server trains on all of them, and FedAvg goes on from there.

    Synthetic rows are made of private ones. What leaves must pass the gate (layer `responsible_gate`), which stops what
    copies a row; it is no proof.
    """

    card = Card(
        title="Synthetic data to cut federated convergence time",
        paper="Dankar, Madathil, Using Synthetic Data to Reduce Model Convergence Time in Federated Learning, 2022",
        topic="LLMs for federated learning: synthesis", kinds=("text",),
        sends="once up: n_syn synthetic rows of each client, as text; then as fedavg",
        needs="a generation task; for real sites the layer responsible_gate",
        claim=Claim("it needs at most 0.7 of the rounds in which FedAvg gets to a loss", metric="rounds",
                    baseline="fedavg", relative="ratio", holds="<=", threshold=0.7, rig="warm_start",
                    grid={"local.lr": (3e-3, 1e-2)}),
        also={"broken": Claim("with responses dealt to other prompts by a generator that is broken, its best round is "
                              "at most 1 % above FedAvg's best in loss", metric="best", baseline="fedavg",
                              relative="ratio", holds="<=", threshold=1.01, rig="warm_start",
                              options={"broken": True, "local": {"lr": 1e-2}}),
              "membership": Claim("what the server learned of the synthetic rows tells clients' rows from fresh ones "
                                  "with an AUC of at most 0.6, under the gate", metric="auc", holds="<=", threshold=0.6,
                                  options={"rounds": 1, "gate": True, "local": {"lr": 1e-2}}, **WARM)},
        evidence="Written from a dossier; the paper's records are tables, and its generators CART and copulas. Here "
                 "rows are text and the generator is the model itself. Rounds are counted without the generator's "
                 "steps. On our rig, whose rows are seven words of forty, the gate takes nearly all of a generator's "
                 "rows for copies (four to seven of 120 are left), and the start with them.",
    )
    trial = Trial({"warm_steps": 0})
    n_syn: int = knob(50, "synthetic rows of each client", ge=1)
    generator_steps: int = knob(100, "steps in which a client's generator learns its rows", ge=1)
    temperature: float = knob(1.0, "of sampling", gt=0)
    max_new_tokens: int = knob(128, "longest synthetic row", ge=1)
    least_new: float = knob(0.05, "least share of what it says that is new and not empty, or none leaves", ge=0, le=1)
    template: str = knob("Instruction: {prompt}\nResponse: {response}\n\n", "how the generator reads and writes a row")
    license: str = knob("", "of the synthetic rows; empty: what the client's rows say, where all say the same")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            end = Frame(self.template).marks[2]
        except ValueError as error:
            raise RecipeError(f"SynthWarmstart.template = {self.template!r} is not allowed; {error}") from None
        if not end:
            raise RecipeError(f"SynthWarmstart.template = {self.template!r} is not allowed; something must follow "
                              "{response}, a blank line for one: else a row is not told from one that was cut off")

    @property
    def only_fits(self) -> bool:  # type: ignore[override]
        """A generator reads its client's rows; without a start from synthetic ones there is none."""
        return self.warm_steps == 0

    def check(self, model: Any) -> None:
        need_generation("SynthWarmstart", model)

    def gathered(self, state: State, clients) -> Program:
        out = yield Ask(self.synthesize, {c.id: pack(theta=state["theta"]) for c in clients})
        return [text for reply in out.values() for text in reply["rows"] if text]

    @on_client(gives="rows: synthetic")
    def synthesize(self, msg: Payload, client: Any) -> Payload:
        frame, w = Frame(self.template), part(msg, "theta")
        told = [{"prompt": "", "response": self.template.format(prompt=r["prompt"], response=r["response"])}
                for r in client.data]
        mine = client.fit(w, on=told, steps=self.generator_steps).theta
        said = client.generate([frame.marks[0]] * (TRIES * self.n_syn), mine, max_new_tokens=self.max_new_tokens,
                               temperature=self.temperature)
        need_new(f"client '{client.id}': its generator", said, self.least_new, quoted=False)
        read = [row for text in said if (row := frame.read(text))]
        keep = distinct([f"{r['prompt']} {r['response']}" for r in read], 0.9)
        rows = [read[i] for i in keep][: self.n_syn]
        if not rows:
            raise Withheld(f"client '{client.id}' has no synthetic row after {len(said)} tries: its generator does not "
                           "write rows, or the same one over and over")
        by, seed = f"{client.model.name or 'model'}, tuned at home", int(client.rng("synth").integers(2**31))
        return {"rows": [made(row, by, self.licensed(client.data), seed) for row in rows]}

    def licensed(self, rows: Sequence[Any]) -> str:
        """The synthetic rows' license: the knob's, or the one of all rows that they were made of."""
        said = {license_of(r) for r in rows}
        return self.license or (said.pop() if len(said) == 1 else "unknown")
