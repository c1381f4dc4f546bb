"""FedCola: what is averaged over whom is said for each weight; attention is shared by all who own the modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER, Client
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload, Tree, pack, part
from fedllm.methods._modalities import KINDS, PARTS, kind_of, need_pairs, of_kind
from fedllm.spaces.complement import AUX, SCALE, merged, twin

NAMED: Mapping[str, tuple[str, ...]] = {
    "none": (), "attention": (".q.", ".k.", ".v.", ".out."), "mlp": (".up.", ".down."), "blocks": (".blocks.",)}


@dataclass(frozen=True)
class FedCola(Method):
    """theta_kind: the mean over its kind; `shared` weights: over all whose modality it is; W_eff = W + s W_aux."""

    card = Card(
        title="FedCola: collaborative multi-modal transformers",
        paper="Sun et al., Towards Multi-modal Transformers in Federated Learning, ECCV 2024, arXiv 2404.12467",
        topic="multimodality",
        sends="the weights of a client's modalities and its head either way; down also the other modality's blocks",
        needs="data.task: pairs, model.name: pairs, space complement",
        claim=Claim("two clients of pictures, of texts and of both: the mean accuracy over the kinds is above that of "
                    "FedAvg within each kind", rig="kinds_of_clients", metric="accuracy", baseline="fedcola",
                    relative="difference", holds=">", threshold=0.0,
                    against={"knobs": {"shared": "none", "aux": False}}, grid={"lr": (1e-3, 3e-3)}),
        also={"sharing": Claim("and above the same without the other modality's weights", rig="kinds_of_clients",
                               metric="accuracy", baseline="fedcola", relative="difference", holds=">", threshold=0.0,
                               against={"knobs": {"aux": False}})},
        evidence="Authors' code read by the dossier. s W_aux is merged into W when a client sends, and s begins at 0 "
                 "again; weights n_k are divided by those who contributed. A kind of client stands for a data set.",
    )
    trial, only_fits = Trial(space={"name": "complement"}, task="pairs"), False

    shared: Literal["none", "attention", "mlp", "blocks"] = knob(
        "attention", "which of a block's weights all clients of its modality average", options=tuple(NAMED))
    aux: bool = knob(True, "clients of one modality also see the other's blocks: W + s W_aux")

    def check(self, model: Any) -> None:
        need_pairs(model, "fedcola", (SCALE,))

    def init(self, model: Any) -> State:
        theta = {n: t for n, t in model.initial().items() if not n.startswith((SCALE, "prompt."))}
        return {"kinds": {}, **{k: of_kind(theta, k) for k in KINDS}}

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        """The pairs' model, with the heads of both other kinds."""
        heads = {n: t for k in ("image", "text") for n, t in state[k].items() if n.startswith(f"head.{k}.")}
        return {**state["pair"], **heads}, None

    def round(self, state: State, clients: Any) -> Program:
        kinds = dict(state["kinds"])
        if new := [c.id for c in clients if c.id not in kinds]:
            said = yield Ask(self.tell, {c: {} for c in new}, quorum=0)  # who is silent is asked again
            kinds |= {c: KINDS[said[c]["kind"]] for c in said}
        mine = [c.id for c in clients if c.id in kinds]
        out = yield Ask(self.local, {c: pack(theta=state[kinds[c]], aux=self.other(state, kinds[c])) for c in mine})
        return {**state, "kinds": kinds, **self.merged(state, {c: kinds[c] for c in out}, out)}

    def other(self, state: State, kind: str) -> Tree | None:
        """W_aux: for blocks of one modality those that stand in their place in the other's."""
        if not self.aux or kind == "pair":
            return None
        far = state["text" if kind == "image" else "image"]
        return {n: far[t] for n, w in state[kind].items() if w.dim() == 2 and (t := twin(n)) in far}

    def merged(self, state: State, kinds: Mapping[str, str], out: Mapping[str, Payload]) -> dict[str, Tree]:
        """Each weight of each kind: sum n_k w_k / sum n_k over those who contribute to it."""
        made = {k: dict(state[k]) for k in KINDS}
        for kind in KINDS:
            for name in state[kind]:
                over = [c for c in out if (kinds[c] == kind or self.is_shared(name)) and name in state[kinds[c]]]
                total = sum(out[c]["n"] for c in over)
                if over and total:
                    made[kind][name] = sum(out[c][f"theta/{name}"] * (out[c]["n"] / total) for c in over)
        return made

    def is_shared(self, name: str) -> bool:
        """Whether all clients of its modality average this weight."""
        return name.startswith(("image.blocks.", "text.blocks.")) and any(x in name for x in NAMED[self.shared])

    def known(self, msg: Payload, reply: Payload) -> None:
        need(0 <= reply["kind"] < len(KINDS), f"'kind' is {reply['kind']}, allowed is a place in {KINDS}")

    def its_own(self, msg: Payload, reply: Payload) -> None:
        got, told = part(reply, "theta"), part(msg, "theta")
        need(got.keys() == told.keys(), "'theta' is not of the weights that this client was told")
        odd = next((n for n, t in got.items() if t.shape != told[n].shape), None)
        need(odd is None, f"'theta/{odd}' is not of the shape that this client was told")

    @on_client(gives="kind: integer", fits=known)
    def tell(self, msg: Payload, client: Client) -> Payload:
        return {"kind": KINDS.index(kind_of(client))}

    @on_client(gives="theta: tree, n: rows, loss?: number", fits=its_own)
    def local(self, msg: Payload, client: Client) -> Payload:
        """Plain training; s and W learn, W_aux rests. What is sent is W + s W_aux."""
        theta, aux = part(msg, "theta"), part(msg, "aux")
        scales = {SCALE + n: theta[n].new_zeros(1) for n in aux}
        fitted = client.fit({**theta, **scales, **{AUX + n: t for n, t in aux.items()}}, freeze=(f"{AUX}*",))
        return pack(theta=merged(fitted.theta), n=client.n, loss=fitted.loss)

    def evaluate(self, state: State, clients: Any, on: str) -> Program:
        """Each client by the model of its kind."""
        whole = self.served(state)[0]
        return (yield Ask(self.score, {c.id: pack(theta=whole if c.id == SERVER else None, on=on, **{
            k: state[k] for k in KINDS if state["kinds"].get(c.id) == k}) for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        told = next((part(msg, k) for k in ("theta", *PARTS) if part(msg, k)), None)
        start = {n: t for n, t in client.model.initial().items() if not n.startswith((SCALE, "prompt."))}
        return client.score(told or start, on=msg["on"])
