"""pFedPG: the server makes each client's visual prompt, and learns to from where the client moved the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER, Client
from fedllm.core.errors import CompositionError
from fedllm.core.form import shaped
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part
from fedllm.core.rng import torch_stream
from fedllm.methods._class_prompts import need_space, one_task
from fedllm.spaces.visual_prompt import HEAD, TOKENS, VisualPrompt

SPACE = {"name": "visual_prompt", "length": 4, "head": True, "visual_from": "front"}
RATES = {"local.lr": (0.02, 0.05, 0.2)}


@dataclass(frozen=True)
class PFedPG(Method):
    """P_k = B + W_o MHA(W_q D_k, W_k B, W_v B); the client trains P_k and its own head, and sends delta_k = P~_k - P_k;
    the server descends phi = (B, W, D_k) along sum_k w_k (dP_k / dphi)^T (-delta_k)."""

    card = Card(
        title="pFedPG: client-specific prompt generation",
        paper="Yang et al., Efficient Model Personalization in Federated Learning via Client-Specific Prompt "
              "Generation, ICCV 2023, arXiv 2308.15367",
        topic="prompt learning: vision-language",
        sends="down: the client's visual prompt, m d_v numbers; up: its change, as many; heads never",
        needs="data.task: image_text with pictures; the space visual_prompt with head: true; clients that remember",
        claim=Claim("with four clients of a look each, their own heads and six pictures a class, each is right on its "
                    "own test more often than with one prompt that is averaged (FedVPT)", rig="shapes_looks",
                    metric="accuracy", baseline="pfedpg", relative="difference", holds=">", threshold=0.0,
                    options={"space": SPACE, "clients": ["photo", "sketch", "neon", "noisy"], "classes": 8, "own": 8,
                             "shots": 6}, against={"knobs": {"generate": False}}, grid=RATES),
        also={"alone": Claim("and more often than with the prompt and head that it trains alone", rig="shapes_looks",
                             metric="accuracy", baseline="local_only", relative="difference", holds=">", threshold=0.0,
                             options={"space": SPACE, "clients": ["photo", "sketch", "neon", "noisy"], "classes": 8,
                                      "own": 8, "shots": 6}, grid=RATES)},
        evidence="An unofficial code by the dossier. The server's optimizer is plain gradient descent; with a rate of "
                 "1 the basis moves by the clients' mean change, as the averaged prompt does. Heads start as the text "
                 "features of the classes. Descriptors of who is not asked stay as they are. It is 0.7 points over "
                 "FedVPT and 0.5 below alone (both open). Fitting a newcomer's descriptor alone is not done.",
    )
    trial = Trial({"heads": 2}, space={"name": "visual_prompt", "length": 2, "head": True}, task="image_text")
    serves = False

    server_lr: float = knob(1.0, "rate of the server's generator", gt=0)
    heads: int = knob(4, "attention heads of the generator; they divide the width of a patch", ge=1)
    residual: bool = knob(True, "add the basis to what the attention makes")
    generate: bool = knob(True, "false: one prompt for all, the mean of the clients' (FedVPT with own heads)")

    def check(self, model: Any) -> None:
        need_space("pfedpg", model, VisualPrompt)
        width = model.initial()[TOKENS].shape[1]
        if not model.space.head or width % self.heads:
            raise CompositionError(f"method 'pfedpg' keeps a head at each client (space.head = true, and it is "
                                   f"{model.space.head}), and method.heads = {self.heads} must divide the width of a "
                                   f"patch, {width}")

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        one_task("pfedpg", labels, rows)

    def init(self, model: Any) -> State:
        self.check(model)
        basis, rng = model.initial()[TOKENS], torch_stream(model.seed, "pfedpg")
        d = basis.shape[1]
        maps = {n: (torch.rand(d, d, generator=rng) * 2 - 1) / math.sqrt(d) for n in ("q", "k", "v", "o")}
        return {"phi": {"basis": basis, **maps}, "of": {}, "seed": model.seed}

    def prompt(self, phi: Mapping[str, Tensor], descriptor: Tensor) -> Tensor:
        """P_k [m, d] of the generator and a descriptor [m, d]."""
        if not self.generate:
            return phi["basis"]
        q, k, v = ((x @ phi[n].T).unflatten(-1, (self.heads, -1)).transpose(0, 1) for n, x in (
            ("q", descriptor), ("k", phi["basis"]), ("v", phi["basis"])))  # [heads, m, d_h]
        z = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        made = z.transpose(0, 1).flatten(1) @ phi["o"].T
        return made + phi["basis"] if self.residual else made

    def descriptor(self, state: State, client: str) -> Tensor:
        """D_k, which starts at random by the client's name."""
        first = torch_stream(state["seed"], "pfedpg", client)
        return state["of"].get(client, torch.randn(state["phi"]["basis"].shape, generator=first))

    def round(self, state: State, clients: Any) -> Program:
        told = {c.id: self.prompt(state["phi"], self.descriptor(state, c.id)) for c in clients}
        out = yield Ask(self.local, {c: pack(prompt=p) for c, p in told.items()})
        n = sum(reply["n"] for reply in out.values())
        told = pack(phi=state["phi"], of={c: self.descriptor(state, c) for c in out}, w={
            c: reply["n"] / n for c, reply in out.items()}, delta={c: reply["delta"] for c, reply in out.items()})
        [new] = (yield Ask(self.learn, {SERVER: told}, quorum=1)).values()
        return {**state, "phi": part(new, "phi"), "of": {**state["of"], **part(new, "of")}}

    @on_server
    def learn(self, msg: Payload, client: Client) -> Payload:
        phi, of, w, delta = (part(msg, name) for name in ("phi", "of", "w", "delta"))
        client.book(tokens=0, steps=0, flops=6.0 * len(of) * len(phi["basis"]) * sum(t.numel() for t in phi.values()))
        return pack(**self.learned(phi, of, {c: (w[c], delta[c]) for c in of}))

    def learned(self, phi: Tree, descriptors: Tree, moved: Mapping[str, tuple[float, Tensor]]) -> dict[str, Tree]:
        """phi <- phi - eta g, g the gradient of -sum_k w_k <delta_k, P_k(phi)>; of descriptors those of who moved."""
        leaves: Tree = {n: t.clone().requires_grad_() for n, t in phi.items()}
        of = {c: descriptors[c].clone().requires_grad_() for c in moved}
        with torch.enable_grad():
            along = sum(-w * (d * self.prompt(leaves, of[c])).sum() for c, (w, d) in moved.items())
            every = [*leaves.values(), *of.values()]
            g = torch.autograd.grad(along, every, allow_unused=True)  # type: ignore[arg-type]
        new = [(x if s is None else x - self.server_lr * s).detach() for x, s in zip(every, g, strict=True)]
        return {"phi": dict(zip(leaves, new[: len(leaves)], strict=True)),
                "of": dict(zip(of, new[len(leaves) :], strict=True))}

    def fits(self, msg: Payload, reply: Payload) -> None:
        """PayloadError for a change of another shape than the prompt's."""
        shaped("delta", reply["delta"], tuple(msg["prompt"].shape))

    @on_client(gives="delta: tensor, n: rows, loss?: number", fits=fits)
    def local(self, msg: Payload, client: Client) -> Payload:
        fitted = client.fit(self.own(msg["prompt"], client))
        client.memory["head"] = fitted.theta[HEAD]
        return pack(delta=fitted.theta[TOKENS] - msg["prompt"], n=client.n, loss=fitted.loss)

    def own(self, prompt: Tensor, client: Client) -> Tree:
        """The prompt that it was made, and its own head."""
        head = client.memory.get("head")
        return {TOKENS: prompt, HEAD: client.model.initial()[HEAD] if head is None else head}

    def evaluate(self, state: State, clients: Any, on: str) -> Program:
        return (yield Ask(self.score, {c.id: pack(prompt=self.prompt(state["phi"], self.descriptor(state, c.id)), on=on)
                                       for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return client.score(self.own(msg["prompt"], client), on=msg["on"])
