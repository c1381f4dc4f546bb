"""SparseLoCo: DiLoCo whose clients send a few percent of their change in two bits, and keep the rest for later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import RecipeError
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, add, pack, part, scale, sub, tree_map
from fedllm.methods._chunks import Chunks, Gathered
from fedllm.methods._coarse import refuse_codes
from fedllm.methods._held import behind, counted, held

SPARSE = {"local": {"optimizer": "adamw", "steps": 12}, "rounds": 10, "sizes": (32,)}
FEW = {"k": 123}
RATES = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class SparseLoCo(Method):
    """e <- beta e + (theta - theta_k); C = 2 bits of the top k of each chunk of e; e <- e - C; theta <- theta - mean C.

    No outer momentum: the error that compression leaves behind is the memory. Clients are told what all of them sent,
    as in an all-gather, and make the outer step themselves; what counted is taken from e when the server says so.
    """

    card = Card(
        title="SparseLoCo: chunked top-k, two bits, error feedback",
        paper="Sarfi, Therien, Lidin and Belilovsky, Communication Efficient LLM Pre-training with SparseLoCo, 2025, "
              "arXiv 2508.15706",
        topic="pre-training",
        sends="down: what all clients sent last (at first, or after a missed round, all trainables); up: places of the "
              "largest entries of each chunk (12 bits) and their values (2 bits), a table a tensor, the training loss",
        needs="any model and space; local.steps H; clients that come every round and keep three times the trainables; "
              "not dp, secagg, he, codec or robust layers",
        claim=Claim("at 3 % density and 2 bits it ends no more than 0.05 above DiLoCo on the same steps, each at its "
                    "best inner rate", rig="tiny_lm", metric="fall", baseline="diloco", relative="difference",
                    holds=">=", threshold=-0.05, options={**SPARSE, "knobs": FEW}, grid=RATES),
        also={"feedback": Claim("and below the same compressor without error feedback, each at its best inner rate",
                                rig="tiny_lm", metric="fall", baseline="sparse_loco", relative="difference", holds=">",
                                threshold=0.0, options={**SPARSE, "knobs": FEW}, grid=RATES,
                                against={"knobs": {**FEW, "beta": 0.0}}),
              "bytes": Claim("at k = 64 what a client sends up is at most 1/100 of DiLoCo's", rig="wire",
                             metric="payload_up", baseline="diloco", relative="ratio", holds="<=", threshold=0.01,
                             kind="exact", seeds=3)},
        evidence="Equations and the quantizer from a dossier (public copies of its compressor); the paper's momentum "
                 "beta 0.95, chunk 64 x 64, k 64. Indices and codes are packed here, so that bytes are those that the "
                 "paper counts. Chunks follow a tensor's numbers in their order, not blocks of 64 x 64.",
    )
    trial = Trial({"k": 400}, local={"steps": 2}, rounding="which entries are the largest hangs on last bits")
    k: int = knob(64, "entries of a chunk that go", ge=1)
    chunk: int = knob(4096, "entries of a chunk", ge=8, le=4096)
    bits: int = knob(2, "bits of a value; 32: as they are", options=(2, 4, 8, 32))
    beta: float = knob(0.95, "how much of the error stays from round to round; 0: what is not sent is lost", ge=0, le=1)
    alpha: float = knob(1.0, "the outer rate", gt=0)
    average: Literal["all", "senders"] = knob("all", "an entry's mean over all clients, or over those that sent it",
                                              options=("all", "senders"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.chunk:
            raise RecipeError(f"SparseLoCo.k = {self.k} is not allowed with chunk = {self.chunk}; it must be <= "
                              f"{self.chunk}")

    @property
    def chunks(self) -> Chunks:
        return Chunks(self.chunk, self.k, self.bits)

    def check_layers(self, layers):
        refuse_codes(self, layers, "method diloco")

    def init(self, model) -> State:
        return {"theta": model.initial(), "version": 0, "holds": {}, "sent": {}}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        v, sent = state["version"], state["sent"]
        told = {c.id: pack(version=v, counted=c.id in state["holds"], **(
            sent if behind(state, c.id) else {"theta": state["theta"]})) for c in clients}
        out = yield Ask(self.local, told, reduce=Gathered(self.chunks, state["theta"]))
        sent = out.value["sent"]
        theta = self.step(state["theta"], sent)
        return {"theta": theta, "sent": sent, **counted(state, list(told), out.answered)}

    def step(self, theta: Tree, sent: Mapping[str, Payload]) -> Tree:
        """theta - alpha mean_k C_k, in the order of the clients, wherever it is done."""
        total = count = None
        for one in sent.values():
            c = self.chunks.dense(one, theta)
            hit = tree_map(lambda x: (x != 0).to(x.dtype), c)
            total, count = (c, hit) if total is None else (add(total, c), add(count, hit))
        if total is None:
            return theta
        mean = scale(total, 1 / len(sent)) if self.average == "all" else tree_map(
            lambda x, n: x / n.clamp(min=1), total, count)
        return sub(theta, scale(mean, self.alpha))  # single operations, which every machine rounds alike

    @on_client(gives="at: whole, values: summand, table?: tensor, loss?: number")
    def local(self, msg: Payload, client: Client) -> Payload:
        v, theta = msg["version"], part(msg, "theta")
        if not theta:
            told = {h: part(msg, h) for h in sorted({k.partition("/")[0] for k in msg if k.startswith("sent")},
                                                    key=lambda h: int(h[4:]))}
            theta = self.step(held(client, v)["theta"], told)
        fitted = client.fit(theta, moments=client.memory.get("inner"))
        client.memory["inner"] = fitted.moments
        u = sub(theta, fitted.theta)  # D = theta - theta_k
        if (kept := client.memory.get("error")) and self.beta:
            e = kept["e"]  # what counted leaves it now: e <- e - C
            e = sub(e, self.chunks.dense(kept["sent"], e)) if msg["counted"] else e
            u = add(u, e, self.beta)
        sent = self.chunks.sparse(u)
        client.memory["held"] = {"version": v, "theta": theta}
        client.memory["error"] = {"e": u, "sent": sent}
        return pack(loss=fitted.loss, **sent)
