"""FedMeZO: zeroth-order steps inside FedAvg, with a learning rate for each client that its loss guides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Payload, add, pack, part
from fedllm.core.reduce import Mean, Sum
from fedllm.local.perturb import LAWS, Directions, flat, unflat
from fedllm.local.zeroth import walk

RATES = ("round", "five", "diff", "random", "frozen")


@dataclass(frozen=True)
class Moves(Sum):
    """Weighted mean of the clients' moves: vectors, or made here from a seed and the scalars along its directions."""

    ragged: ClassVar[bool] = True

    law: Literal["gaussian", "rademacher"]

    def lift(self, reply: Payload) -> Payload:
        move = reply.get("move")
        if move is None:  # w_k - w = -eta_k sum_t g_t z_t
            g = reply["g"].tolist()
            move = Directions(reply["seed"], reply["P"], self.law).add(
                torch.zeros(reply["P"]), {t: -reply["lr"] * x for t, x in enumerate(g) if x})
        return Mean().lift({"move": move, "n": reply["n"], "loss": reply["loss"]})

    def done(self, total: Payload) -> Payload:
        return Mean().done(total)


@dataclass(frozen=True)
class FedMeZO(Star):
    """MeZO on every client (two forwards a step, no gradients), FedAvg of where they went."""

    card = Card(
        title="FedMeZO: zeroth-order federated tuning",
        paper="Ling et al., On the Convergence of Zeroth-Order Federated Tuning for Large Language Models, KDD 2024, "
              "arXiv 2402.05926",
        topic="efficiency",
        sends="down: trainables and a rate; up: their change, or (`up: scalars`) a seed and a scalar a step",
        needs="any model and space (the paper's is LoRA); forward passes only",
        claim=Claim("the memory of a client's step peaks at no more than 1.3 times that of a forward pass",
                    rig="step_memory", metric="peak_over_forward", holds="<=", threshold=1.3, kind="exact"),
        also={"rates": Claim("rates that the clients' last losses guide reach a lower loss than one rate for all",
                             rig="mezo_rates", metric="gain", holds=">", threshold=0.0, seeds=5, wins=4)},
        evidence="Authors' code read. Their strategies know three clients only; here any number. `rates: diff` "
                 "follows the norm of a client's own move, theirs that of its difference from the mean move, which a "
                 "server that folds answers does not see. Ours: scalars up.",
    )
    trial = Trial({"steps": 3, "lr": 1e-2, "delta": 5e-3})
    only_fits = False
    steps: int = knob(30, "tau, local steps a round", ge=1)
    eps: float = knob(1e-3, "size of the perturbation", gt=0)
    lr: float = knob(1e-5, "eta, the middle rate", gt=0)
    delta: float = knob(5e-6, "how far a client's rate may lie from eta; below eta", ge=0)
    rates: Literal["round", "five", "diff", "random", "frozen"] = knob(
        "round", "a client's rate follows its last loss, its last five, the size of its last move, chance, or nothing",
        options=RATES)
    up: Literal["weights", "scalars"] = knob("weights", "what clients send", options=("weights", "scalars"))
    law: Literal["gaussian", "rademacher"] = knob("gaussian", "distribution of a direction's entries", options=LAWS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta >= self.lr:
            raise RecipeError(f"FedMeZO.delta = {self.delta} is not allowed; it must be below lr = {self.lr}, or a "
                              "client's rate could be 0 or less")

    def check_work(self, local, rounds) -> None:
        if self.up == "scalars" and local.weight_decay:
            raise CompositionError(f"fedmezo with up = scalars and local.weight_decay = {local.weight_decay:g} do not "
                                   "fit together: scalars do not tell what decay did; use weight_decay = 0 or up = "
                                   "weights")

    def init(self, model) -> State:
        return {"theta": model.initial(), "seen": {}}

    def round(self, state: State, clients):
        rates = personal(self.lr, self.delta, {c.id: sum(seen) / len(seen) for c in clients
                                               if (seen := state["seen"].get(c.id))})
        msgs = {c.id: pack(theta=state["theta"], lr=rates.get(c.id, self.lr)) for c in clients}
        return self.merge(state, (yield Ask(self.local, msgs, reduce=Moves(self.law))))

    def fits(self, msg, reply):
        """A move as long as all trainables are together, or what it can be made from."""
        size = sum(t.numel() for t in part(msg, "theta").values())
        if "move" in reply:
            return need(reply["move"].shape == (size,), f"'move' has shape {tuple(reply['move'].shape)}, not {size}")
        need({"seed", "lr", "P", "g"} <= reply.keys(), "of 'seed', 'lr', 'P' and 'g' one is lacking")
        need(reply["P"] == size, f"'P' is {reply['P']}, allowed is {size}")
        need(reply["seed"] >= 0, f"'seed' is {reply['seed']}, allowed is a number from 0")
        need(reply["g"].shape == (self.steps,), f"'g' has shape {tuple(reply['g'].shape)}, allowed is {self.steps}")

    @on_client(reduce=Moves("gaussian"), gives="move?: tensor, seed?: integer, lr?: number, P?: count, g?: tensor, "
                                               "n: rows, loss?: number, note/score?: number",
               fits=fits)
    def local(self, msg, client):
        self.check_work(client.training, 0)
        draw, start = client.rng("fedmezo"), part(msg, "theta")
        seed = int(draw.integers(2**62))
        lr = float(draw.uniform(self.lr - self.delta, self.lr + self.delta)) if self.rates == "random" else msg["lr"]
        went = walk(client, start, self.law, seed, range(self.steps), self.eps, lr, client.training.weight_decay)
        move = went.w - flat(start)
        told = {"move": move} if self.up == "weights" else {
            "seed": seed, "lr": lr, "P": len(move), "g": torch.tensor(went.g)}
        note = float(move.norm()) if self.rates == "diff" else went.loss
        return {**told, "n": client.n, "loss": went.loss, **({"note/score": note} if self.guided else {})}

    @property
    def guided(self) -> bool:
        """Whether the server learns what each client's rate follows."""
        return self.rates in ("round", "five", "diff")

    def merge(self, state: State, out) -> State:
        keep = 5 if self.rates == "five" else 1
        told = {c: [*state["seen"].get(c, []), note["score"]][-keep:] for c, note in out.notes.items()
                if "score" in note}
        move = unflat(out.value["move"].to(flat(state["theta"]).dtype), state["theta"])
        return {"theta": add(state["theta"], move), "seen": {**state["seen"], **told}}


def personal(lr: float, delta: float, scores: Mapping[str, float]) -> dict[str, float]:
    """eta_k = eta + delta (s_k - mean s) / max_j |s_j - mean s|: the worse off step further; all alike, all eta."""
    mean = sum(scores.values()) / max(1, len(scores))
    far = max((abs(s - mean) for s in scores.values()), default=0.0)
    return {c: lr + delta * (s - mean) / far if far else lr for c, s in scores.items()}
