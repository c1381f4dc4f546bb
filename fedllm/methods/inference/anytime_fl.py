"""Anytime FL: one attention over a frozen encoder's blocks, learned together, that can answer after any of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER, Client
from fedllm.core.errors import DataError, RecipeError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.core.rng import torch_stream
from fedllm.methods._exits import Exiting, Told, logits
from fedllm.models.exits import depth_of, states


@dataclass(frozen=True)
class AnytimeFL(Exiting):
    """u_l = LN(c_l); a_l = Attn(u_l; u_1..u_l) by one adapter for all blocks; logits_l = LN(u_l + a_l) H + b."""

    card = Card(
        title="Anytime FL: exits after every block",
        paper="Liu et al., Federated Learning for Inference at Anytime and Anywhere, arXiv 2212.04084, 2022",
        topic="inference: early exit",
        sends="both ways: the adapter and the head, 4 d w + (d + 1) classes numbers, whatever the depth",
        needs="data.task: classification; an encoder, which stays frozen; clients that remember n L d numbers",
        claim=Claim("at full depth it is at most one point behind a linear probe of the last block, trained by as many "
                    "rounds and steps", rig="exits", metric="over_probe", holds=">=", threshold=-0.01),
        also={"early": Claim("answers that end where they are sure enough (0.8) run at most 0.8 of the blocks",
                             rig="exits", metric="share_of_blocks", holds="<=", threshold=0.8),
              "sure": Claim("and are right at most two points less often than at full depth", rig="exits",
                            metric="early_over_full", holds=">=", threshold=-0.02),
              "shallow": Claim("with clients of 2, 4 and 6 blocks it is at most two points behind clients of 6",
                               rig="exits", metric="mixed_over_deep", holds=">=", threshold=-0.02)},
        evidence="Reconstructed from the abstract. The adapter reads the blocks' states and does not change what the "
                 "next block is given, so that the frozen encoder runs once a row and not once a step.",
    )
    trial = Trial(space={"name": "head"}, task="classification", knobs={"width": 4})
    metrics: ClassVar = {"accuracy": "max", "early_accuracy": "max", "share_of_blocks": "min"}
    serves, only_fits = False, False
    depths: tuple[int, ...] = knob((), "blocks that clients run, dealt in the order of their names; (): all of them")
    width: int = knob(8, "w, of the adapter's attention", ge=1)
    exit_weights: Literal["uniform", "linear"] = knob("uniform", "how exits weigh in the loss: alike, or by depth",
                                                      options=("uniform", "linear"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(d < 1 for d in self.depths):
            raise RecipeError(f"AnytimeFL.depths = {self.depths!r} is not allowed; each must be >= 1 (blocks)")

    def check(self, model: Any) -> None:
        if (most := max((*self.depths, self.budget * (self.exit_by == "budget")), default=0)) > depth_of(model):
            raise RecipeError(f"method.depths, method.budget: {most} blocks, and the model has {depth_of(model)}")

    def init(self, model: Any) -> State:
        d, w, classes, rng = model.net.config.hidden_size, self.width, len(model.labels), torch_stream(model.seed,
                                                                                                      "exits")
        dtype = torch.promote_types(model.net.dtype, torch.float32)
        drawn = {n: torch.randn(d, w, generator=rng, dtype=torch.float64).to(dtype) / d**0.5 for n in "qkv"}
        zero = functools.partial(torch.zeros, dtype=dtype)
        return {"theta": {**drawn, "o": zero(w, d), "head": zero(d, classes), "bias": zero(classes)}}

    def round(self, state: State, clients) -> Program:
        order = {c: i for i, c in enumerate(sorted(c.id for c in clients))}
        deal = {c: self.depths[i % len(self.depths)] if self.depths else 0 for c, i in order.items()}
        out = yield Ask(self.local, {c.id: pack(theta=state["theta"], depth=deal[c.id]) for c in clients})
        # theta <- theta + sum_k p_k (theta_k - theta): all shapes are alike, whatever a client's depth
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        theta, depth = part(msg, "theta"), int(msg["depth"]) or depth_of(client.model)
        if f"states/{depth}" not in client.memory:
            client.memory[f"states/{depth}"] = self.seen(client, client.data, depth, theta["head"])
        x = client.memory[f"states/{depth}"]
        y = torch.tensor([row["label"] for row in client.data])
        params = {n: t.clone().requires_grad_() for n, t in theta.items()}
        optimizer, total = client.training.optimizer_over(list(params.values())), 0.0
        weigh = torch.ones(depth) if self.exit_weights == "uniform" else torch.arange(1.0, depth + 1)
        plan = client.batches(client.training.count(client.n))
        for rows in plan:
            ce = F.cross_entropy(logits(params, x[rows]).movedim(2, 1), y[rows, None].expand(-1, depth),
                                 reduction="none")  # [B, depth]
            loss = (ce * weigh.to(ce)).sum() / (weigh.sum() * len(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        learned = {n: p.detach() for n, p in params.items()}
        return pack(delta=sub(learned, theta), n=client.n, loss=total / max(1, len(plan)))

    def seen(self, client: Client, rows: Any, depth: int, like: Tensor) -> Tensor:
        """Pooled states of rows after each block [n, depth, d]; the encoder runs once over them, as far as that."""
        got = client.measure({}, rows, functools.partial(states, depth=depth))
        return torch.from_numpy(got).to(like.dtype).reshape(len(rows), depth, -1)

    def answer(self, query: str, clients, state: State | None = None) -> Program:
        out = yield Ask(self.infer, {SERVER: pack(theta=(state or {})["theta"], query=query)})
        said = out[SERVER]
        return Told(query, said["label"], said["depth"], said["confidence"])

    @on_server
    def infer(self, msg: Payload, client: Client) -> Payload:
        [row] = client.encode([{"text": msg["query"], "label": 0}])
        z, ran = self.walked(client.model, torch.as_tensor(row.ids), part(msg, "theta"))
        return {"label": str(client.model.labels[int(z.argmax())]), "depth": ran,
                "confidence": float(z.softmax(-1).max())}

    def examine(self, state: State, clients, rows) -> Program:
        out = yield Ask(self.curve, {SERVER: pack(theta=state["theta"], on="global")})
        if not out[SERVER]["n"]:
            raise DataError("method 'anytime_fl' is tested on the global test, which is empty; give data.test")
        return {n: out[SERVER][n] for n in (*self.metrics, "n")}

    @on_client(gives="n: count, at: numbers, *: number", test=True)
    def curve(self, msg: Payload, client: Client) -> Payload:
        """Accuracy after each block (`at`), at full depth, and by the exit rule, with the share of blocks it takes."""
        rows, theta = client.held_out(msg["on"]), part(msg, "theta")
        if not rows:
            return {"n": 0, "at": [], **dict.fromkeys(self.metrics, 0.0)}
        z = logits(theta, self.seen(client, rows, depth_of(client.model), theta["head"]))  # [n, depth, classes]
        right = (z.argmax(-1) == torch.tensor([row["label"] for row in rows])[:, None]).double()
        ends = torch.tensor([self.stop(one) for one in z])
        return {"n": len(rows), "at": right.mean(0).tolist(), "accuracy": float(right[:, -1].mean()),
                "early_accuracy": float(right[torch.arange(len(rows)), ends - 1].mean()),
                "share_of_blocks": float(ends.double().mean()) / z.shape[1]}
