"""PowerSGD: matrices go as rank-r factors in two questions, both of them sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, PayloadError
from fedllm.core.form import Form
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Layer
from fedllm.core.payload import Payload, pack, part
from fedllm.core.reduce import Lifted, Sum, wide
from fedllm.core.rng import torch_stream

OWN = "codec_powersgd"
FIRST = Form.of("P?: tensors, none: count")


@dataclass(frozen=True)
class CodecPowerSGD(Knobs, Layer):
    """PowerSGD (Vogels, Karimireddy, Jaggi, NeurIPS 2019) with error feedback, on the lifted replies of any Sum.

    First question: P = sum_k M_k Q with a Q that all share (warm-started by the last round's). Second: with P^ =
    orth(P), Q = sum_k M_k^T P^, and all else that the reply holds. The sum is then P^ Q^T. As both are sums, `secagg`
    may stand below. A client lost between the two leaves its residue as it was, and has no part in the sum. LoRA's own
    factors are low-rank already: it pays for whole matrices (spaces full, layers; FlexLoRA's products).
    """

    algebra = Algebra("codec", needs="sum", additive=True, contracts=False,
                      instead="codec_quant with mode: toward_zero, which never makes an update longer")

    rank: int = knob(4, "r, columns of P and Q", ge=1)
    warm_start: bool = knob(True, "begin with the last round's Q instead of a fresh random one")
    error_feedback: bool = knob(True, "keep at the client what the factors could not say")

    def init(self) -> dict[str, Any]:
        return {"q": {}, "asked": 0}

    def check(self, method: Any, reducers: Mapping[str, Any]) -> None:
        for name, reducer in reducers.items():
            if name != "score" and not isinstance(reducer, Sum):
                needs = "every single reply" if reducer is None else f"the reducer {type(reducer).__name__}"
                raise CompositionError(f"layer 'codec_powersgd' sends factors of a sum and "
                                       f"'{type(method).__name__}.{name}' needs {needs}, so they do not fit together; "
                                       "codec_quant works with any method")

    def server(self, ask: Any, state: Any) -> Any:
        if isinstance(ask.owner, Layer):
            return (yield ask)
        lift = not isinstance(ask.reducer, Lifted)
        q = state["q"].get(ask.phase, {}) if self.warm_start else {}
        told = pack(**{OWN: q}) | {OWN + "-lift": lift, OWN + "-asked": state["asked"]}
        state["asked"] += 1
        first = yield replace(ask, msgs={c: {**m, **told} for c, m in ask.msgs.items()}, reduce=Lifted(),
                              form=FIRST)
        # P^ = orthonormal basis of sum_k M_k Q
        basis = {k: torch.linalg.qr(p)[0] for k, p in part(first.value, "P").items()}
        out = yield Ask(self.second, {c: pack(P=basis, phase=ask.phase) for c in first.answered}, deadline=ask.deadline)
        total = {k: v for k, v in out.value.items() if not k.startswith(("Q/", "none"))}
        sums = part(out.value, "Q")
        total |= {k: basis[k] @ x.mT for k, x in sums.items()}  # sum ~ P^ Q^T, [n, m]
        state["q"][ask.phase] = {k: torch.linalg.qr(x)[0] for k, x in sums.items()}
        missing = {**first.missing, **out.missing}
        return replace(out, value=ask.reducer.done(total), missing=missing)

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        if OWN + "-lift" not in msg:
            return call(msg)
        reply = call({k: v for k, v in msg.items() if not k.startswith(OWN)})
        lifted = fn.__dict__["reduce"].lift(reply) if msg[OWN + "-lift"] else reply
        phase, warm = f"{type(fn.__self__).__name__}.{fn.__name__}", part(msg, OWN)
        kept = client.memory.setdefault(OWN, {})
        residue = kept.get(phase, {}).get("e", {}) if self.error_feedback else {}
        # M_k = D_k + e_k
        m = {k: wide(v) + residue[k] if k in residue else wide(v) for k, v in lifted.items() if self.pays(v)}
        kept[phase] = {"e": residue, "m": m, "rest": {k: v for k, v in lifted.items() if k not in m}}
        return pack(P={k: x @ warm.get(k, self._q(k, x, msg[OWN + "-asked"])).to(x.dtype) for k, x in m.items()}) | {
            "none": 0}

    def fits(self, msg: Payload, reply: Payload) -> None:
        """Q has the rows that M has columns; which these are the majority says, and P says the rest."""
        for k, q in part(reply, "Q").items():
            if f"P/{k}" not in msg or q.dim() != 2 or q.shape[1] != msg[f"P/{k}"].shape[1]:
                raise PayloadError(f"'Q/{k[:80]}' of shape {tuple(q.shape)} goes with no P that was sent")

    @on_client(reduce=Lifted(), gives="Q?: tensors, none: count, *: summand", fits=fits)
    def second(self, msg: Payload, client: Any) -> Payload:
        """Q_k = M_k^T P^, with the rest of the reply; then the residue is what P^ Q_k^T leaves."""
        kept, basis = client.memory[OWN][msg["phase"]], part(msg, "P")
        m, rest = kept.pop("m"), kept.pop("rest")
        q = {k: x.mT @ basis[k] for k, x in m.items()}
        if self.error_feedback:
            kept["e"] = {k: x - basis[k] @ q[k].mT for k, x in m.items()}
        return {**rest, **pack(Q=q), "none": 0}

    def pays(self, v: Any) -> bool:
        """Whether two thin factors are smaller than the matrix."""
        return isinstance(v, Tensor) and v.dim() == 2 and self.rank * sum(v.shape) < v.numel()

    def _q(self, name: str, x: Tensor, asked: int) -> Tensor:
        """The first Q: random, and the same for all clients."""
        return torch.randn(x.shape[1], self.rank, generator=torch_stream(OWN, name, asked))
