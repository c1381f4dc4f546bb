"""FedGFPT: clients search a prompt token by token with forward passes; ids go up, a sparse change of it comes down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.ask import Ask, Program, Replies, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import CompositionError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, part
from fedllm.local.evolve import Search, rank_weights
from fedllm.methods._blackbox import TOLD, BlackBox, Meter, empty_ledger, prompt, usual_ids
from fedllm.methods._token_prompt import NAME, SHORTLIST, held, moved, nearest, readable, short, sparse, stamp


@dataclass(frozen=True)
class FedGFPT(BlackBox):
    """p' is what server and clients hold alike; a round moves it by Phi tokens with coefficients at each position."""

    card = Card(
        title="FedGFPT: personalized federated text classification with gradient-free prompt tuning",
        paper="Wang et al., Personalized Federated Learning for Text Classification with Gradient-Free Prompt Tuning, "
              "Findings of NAACL 2024",
        topic="parameter efficiency",
        sends="up: n token ids (2n bytes); down: Phi ids and 16-bit coefficients a position (4 n Phi bytes), or the "
              "whole prompt to a client that missed a round",
        needs="the losses of rows under prompt embeddings and the token embeddings (space soft_prompt); no gradients",
        kinds=("tokens",),
        claim=Claim("on a small language model of four grammars, clients of one of them: the loss on unseen rows is "
                    "below that of the untuned prompt", rig="grammar_prompt", metric="gain", holds=">", threshold=0.0,
                    wins=4),
        also={"personal": Claim("a client's own CMA-ES after that lowers it further", rig="grammar_prompt",
                                metric="personal_gain", holds=">", threshold=0.0, wins=4)},
        evidence="written from a dossier after a public note on the paper; no code is public. Ours: only better tokens "
                 "are taken, positions that were not moved go up as their nearest token, the LASSO's penalty counts in "
                 "mean squared norms of an embedding, and a message carries a hash of p'",
    )
    trial = Trial({"search_steps": 4, "n_candidates": 3, "batch": 4, "phi": 2}, {"name": "soft_prompt", "length": 4})
    n_candidates: int = knob(5, "K, tokens that are tried at a position: the nearest by cosine", ge=1)
    search_steps: int = knob(20, "S, positions that a client tries in a round", ge=1)
    batch: int | None = knob(32, "rows of a client's search in a round; None: all of its rows", ge=1)
    accept: Literal["only_if_better", "best_candidate"] = knob("only_if_better", "when the best candidate is taken",
                                                               options=("only_if_better", "best_candidate"))
    phi: int = knob(5, "Phi, tokens a position that tell the change of the prompt", ge=1)
    lasso_alpha: float = knob(0.2, "penalty on their coefficients, in mean squared norms of an embedding", ge=0)
    tune_after: int | None = knob(None, "rounds after which clients tune for themselves (CMA-ES); None: never", ge=0)
    generations: int = knob(10, "of a client's own search in a round", ge=1)
    popsize: int = knob(8, "candidates of such a generation", ge=4)
    intrinsic_dim: int = knob(50, "numbers that it searches", ge=2)
    seed: int = knob(0, "from which the subspace of that search follows", ge=0, lt=2**32)

    def check(self, model: Any) -> None:
        if type(model.space).__name__ != "SoftPrompt":
            raise CompositionError("method 'fed_gfpt' searches a prompt; use the space soft_prompt")
        most = {"n_candidates": len(usual_ids(model)), "phi": min(SHORTLIST, len(model.words))}
        if self.tune_after is not None:
            most["intrinsic_dim"] = model.initial()[NAME].numel()
        for key, have in most.items():
            if getattr(self, key) > have:
                raise CompositionError(f"method.{key} = {getattr(self, key)} is not allowed; it must be <= {have}")

    def calls(self, rows: int) -> int:
        tuning = 0 if self.tune_after is None else self.generations * self.popsize
        return max(min(rows, self.batch or rows) * (self.n_candidates * self.search_steps + 1), rows * tuning)

    def init(self, model: Any) -> State:
        self.check(model)
        return {"prompt": model.initial()[NAME].float(), "table": model.words.float(), "change": {}, "version": 0,
                "at": {}, "round": 0, "queries": empty_ledger()}

    def down(self, state: State, client: ClientInfo) -> Payload:
        behind = state["version"] - state["at"].get(client.id, 0 if state["version"] == 0 else -1)
        news = {0: {}, 1: state["change"]}.get(behind, {"prompt": state["prompt"]})
        return {"version": state["version"], "hash": stamp(state["prompt"]), **news}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        if self.tune_after is None or state["round"] < self.tune_after:
            return (yield from super().round(state, clients))
        self.afford(state, clients)
        out = yield Ask(self.personal, {c.id: self.down(state, c) for c in clients})
        return {**state, "at": self.known(state, out), "round": state["round"] + 1, "queries": self.booked(state, out)}

    def known(self, state: State, out: Replies) -> dict[str, int]:
        """Who holds which version of p'; of those who are missing nothing is known."""
        kept = {c: v for c, v in state["at"].items() if c not in out.missing}
        return kept | dict.fromkeys(out.answered, state["version"])

    def fits(self, msg: Payload, reply: Payload) -> None:
        need(reply["ids"].dim() == 1, f"'ids' has shape {tuple(reply['ids'].shape)}, allowed is one list")

    @on_client(gives="ids: whole, loss?: number, " + TOLD, fits=fits)
    def local(self, msg: Payload, client: Client) -> Payload:
        p, meter, rng = held(msg, client).clone(), Meter(client), client.rng("fed_gfpt")
        table, usual = client.model.words.float(), torch.from_numpy(usual_ids(client.model)).long()
        some = rng.choice(len(client.tokens), min(len(client.tokens), self.batch or len(client.tokens)), replace=False)
        rows = [client.tokens[i] for i in some]
        ids, [now] = nearest(p, table, usual), meter.losses([{NAME: p}], rows)
        for _ in range(self.search_steps):
            t = int(rng.integers(len(p)))
            near = usual[F.cosine_similarity(table[usual], p[t][None]).topk(self.n_candidates).indices]
            tried = [p.index_put((torch.tensor([t]),), table[j][None]) for j in near]
            losses = meter.losses([{NAME: x} for x in tried], rows)
            best = int(np.argmin(losses))
            if losses[best] < now or self.accept == "best_candidate":
                p, now, ids[t] = tried[best], losses[best], near[best]
        return {"ids": short(ids, len(table)), "loss": now, **meter.notes}

    def merge(self, state: State, out: Replies) -> State:
        table, before = state["table"], state["prompt"]
        read = readable({c: out[c]["ids"] for c in out.answered}, len(before), len(table))
        sent = torch.stack(list(read.values()))  # [clients, n]
        rest = table[sent].mean(0) - before  # R[t] = mean_k E[ids_kt] - p'[t]
        told = [sparse(r, table, self.phi, self.lasso_alpha) for r in rest]
        ids, w = torch.stack([i for i, _ in told]), torch.stack([w for _, w in told])  # [n, phi]
        return {**state, "prompt": moved(before, ids, w, table), "change": {"ids": short(ids, len(table)), "w": w},
                "at": self.known(state, out), "version": state["version"] + 1}

    @on_client(gives=TOLD)
    def personal(self, msg: Payload, client: Client) -> Payload:
        """CMA-ES over p' + A z on the client's own rows; what it finds stays in its memory."""
        first, meter, rng = {NAME: held(msg, client)}, Meter(client), client.rng("fed_gfpt")
        kept = client.memory.get("search")
        s = Search.of(kept) if kept else Search.start(np.zeros(self.intrinsic_dim), 1.0)
        for _ in range(self.generations):
            zs = s.ask(rng, self.popsize)
            losses = meter.losses([self.own(torch.from_numpy(z), first, client) for z in zs], client.tokens)
            s = s.tell(zs, losses, rank_weights(self.popsize, self.popsize // 2))
        client.memory["search"] = s.tensors()
        return {**meter.notes}

    def own(self, z: Tensor, first: dict[str, Tensor], client: Client) -> dict[str, Tensor]:
        """p' + A z with A_ij ~ N(0, var E / q)."""
        return prompt(z, first, float(client.model.words.float().std()) / self.intrinsic_dim**0.5, self.seed)

    def served(self, state: State) -> tuple[dict[str, Tensor], None]:
        return {NAME: state["prompt"]}, None

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        theta, kept = part(msg, "theta"), client.memory.get("search")
        return client.score(self.own(kept["mean"], theta, client) if kept else theta, on=msg["on"])
