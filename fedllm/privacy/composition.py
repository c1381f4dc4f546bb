"""Which layers may stand above which: read from what each declares, refused before anything runs.

`check_stack` is asked when a recipe is built. `rows` is the same rules as a table for the docs; a test runs every pair
that it calls sound and compares it with the plain form.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.core.layer import Layer
from fedllm.core.reduce import Mean

HIDES = ("secagg", "he")
"""Kinds of layers whose messages look random."""


def check_stack(method: Any, layers: Sequence[Layer], reducers: Mapping[str, Any]) -> None:
    """Raise CompositionError for the first two parts of a run that do not fit together."""
    for layer in layers:
        layer.check(method, reducers)
    for i, j in itertools.combinations(range(len(layers)), 2):
        if why := clash(layers[i], layers[j]):
            raise CompositionError(why)


def clash(above: Layer, below: Layer) -> str | None:
    """One sentence on why these two do not fit together in this order; None when they do."""
    a, b = above.algebra, below.algebra
    up, down = f"layer '{type(above).__name__}'", f"layer '{type(below).__name__}'"
    if same_kind(above, below):
        return f"{up} and {down} do the same work twice; leave one of them out"
    if b.kind == "robust" and a.kind in ("codec", "attack"):
        return f"{up} above {down}: it must see replies as the method's client functions give them; list {down} first"
    if b.kind == "attack" and (a.kind in ("codec", *HIDES) or (a.kind == "dp" and a.needs == "sum")):
        return f"{up} above {down}: an attacker forges what the method sends and then obeys the wire; list {down} first"
    if a.kind == "meter":
        return f"{up} above {down}: it counts what is sent; list {down} first"
    if a.kind == "line" and b.kind != "meter":
        return f"{up} above {down}: it carries what all others send; list {down} first"
    if a.kind == "tree" and (b.kind in ("codec", "attack") or (b.kind == "dp" and b.needs == "sum")):
        return f"{up} above {down}: it must see replies before the servers of the tree add them up; list {down} first"
    if a.kind == "dp" and b.reads:
        return f"{up} above {down}: what {down} lets out is read from rows without noise; use {b.instead}"
    if a.kind in HIDES and b.kind == "codec":
        return (f"{up} above {down}: masked or encrypted numbers look random and cannot be compressed; list "
                "codec_powersgd above it, or set the quantum of the ring")
    if a.kind in HIDES and b.kind == "dp":
        return f"{up} above {down}: what is masked or encrypted can no longer be clipped; list {down} first"
    if {"set", "sum"} in ({a.needs, b.reveals}, {b.needs, a.reveals}) or (a.needs, b.needs) == ("set", "sum"):
        hides, wants = (up, down) if a.reveals == "sum" else (down, up)
        return (f"{hides} lets the server see sums only and {wants} needs every single reply; clip each reply at home "
                "with dp_fedavg instead")
    if b.kind == "tree" and a.kind in HIDES and a.compresses:
        return f"{up} above {down}: which entries {up} sends is no sum; use secagg, whose masked sum a tree can add up"
    if b.kind in (*HIDES, "tree") and not a.additive:
        return f"{up} above {down}: its messages do not add up to the message of the sum; use {a.instead}"
    if a.kind == "dp" and a.needs == "sum" and (b.kind == "robust" or not b.contracts):
        return (f"{up} above {down}: what {down} delivers may be longer than the clip, and the noise too "
                "small; codec_quant with mode: toward_zero or codec_topk_ef with error_feedback: false keep it")
    if a.kind == "codec" and b.kind == "dp" and b.needs == "sum":
        return f"{up} above {down}: a coded reply cannot be clipped as the update that it stands for; list {down} first"
    if a.kind == "codec" and b.kind in HIDES and b.compresses:
        return f"{up} above {down}: the second would drop what the first has coded; use {b.instead}"
    if a.kind == b.kind == "codec" and (type(above).__name__, type(below).__name__) != ("CodecTopKEF", "CodecQuant"):
        return (f"{up} above {down}: the second would compress what the first has coded; only codec_topk_ef above "
                "codec_quant works")
    return None


def same_kind(above: Layer, below: Layer) -> bool:
    """Whether one of the two is enough."""
    a, b = above.algebra, below.algebra
    return (type(above) is type(below) or (a.kind in HIDES and b.kind in HIDES)
            or (a.kind == b.kind == "robust") or (a.kind == b.kind == "dp" and a.needs == b.needs == "sum"))


@dataclass(frozen=True)
class Row:
    """One pair of the table: `says` is the refusal, or empty when the pair runs."""

    above: str
    below: str
    says: str


def rows(parts: Mapping[str, Layer] | None = None) -> list[Row]:
    """Every ordered pair of layers, and every layer over every way that a method's replies are folded."""
    parts = parts or examples()
    out = [Row(a, b, clash(x, y) or "") for (a, x), (b, y) in itertools.product(parts.items(), repeat=2)]
    for (fold, reducer), (name, layer) in itertools.product(foldings().items(), parts.items()):
        try:
            layer.check(_Method(), {"local": reducer})
            out.append(Row(fold, name, ""))
        except CompositionError as error:
            out.append(Row(fold, name, str(error)))
    return out


def table(parts: Mapping[str, Layer] | None = None) -> str:
    """The pairs as Markdown: which run, and the sentence for each that is refused."""
    found = rows(parts)
    lines = ["| above | below | |", "|---|---|---|"]
    lines += [f"| {r.above} | {r.below} | {r.says or 'runs'} |" for r in found]
    return "\n".join(lines) + "\n"


def examples() -> dict[str, Layer]:
    """Every layer of this room and of the wire, in each form that composes in its own way."""
    from fedllm.privacy.dp_fedavg import DPFedAvg
    from fedllm.privacy.dp_ftrl import DPFTRL
    from fedllm.privacy.dp_sgd import DPSGD
    from fedllm.privacy.fedml_he import FedMLHE
    from fedllm.privacy.he_ckks import HECKKS
    from fedllm.privacy.secagg import SecAgg
    from fedllm.privacy.secagg_plus import SecAggPlus
    from fedllm.privacy.thgs_secagg import THGSSecAgg
    from fedllm.wire.codec_powersgd import CodecPowerSGD
    from fedllm.wire.codec_quant import CodecQuant
    from fedllm.wire.codec_topk_ef import CodecTopKEF
    from fedllm.wire.fedrdma import FedRDMA
    from fedllm.wire.ring_all_reduce import RingAllReduce
    from fedllm.wire.server_tree import ServerTree

    return {
        "dp_fedavg": DPFedAvg(noise_multiplier=1.0), "dp_ftrl": DPFTRL(noise_multiplier=1.0),
        "dp_sgd": DPSGD(noise_multiplier=1.0), "secagg": SecAgg(), "secagg_plus": SecAggPlus(), "he_ckks": HECKKS(),
        "thgs_secagg": THGSSecAgg(),
        "fedml_he": FedMLHE(),
        "codec_quant": CodecQuant(),
        "codec_quant (toward_zero)": CodecQuant(mode="toward_zero"), "codec_topk_ef": CodecTopKEF(),
        "codec_topk_ef (no feedback)": CodecTopKEF(error_feedback=False), "codec_powersgd": CodecPowerSGD(),
        "server_tree": ServerTree(),
        "ring_all_reduce": RingAllReduce(), "fedrdma": FedRDMA()}


def foldings() -> dict[str, Any]:
    """How methods fold replies: means, sums of lifted replies, robust reducers, or not at all."""
    from fedllm.defenses.median import Median
    from fedllm.methods._factors import Products

    return {"method with Mean (fedavg)": Mean(), "method with Products (flexlora)": Products(),
            "method with Median": Median(), "method with single replies": None}


class _Method:
    """Stands for any method in the table."""
