"""Which layers may stand above which: read from what each declares, refused before anything runs.

`check_stack` is asked when a recipe is built. `rows` is the same rules as a table for the docs; a test runs every pair
that it calls sound and compares it with the plain form.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.core.layer import Layer, name_of
from fedllm.core.reduce import Sum

HIDES = ("secagg", "he")
"""Kinds of layers whose messages look random."""


def check_stack(method: Any, layers: Sequence[Layer], reducers: Mapping[str, Any]) -> None:
    """Raise CompositionError for the first two parts of a run that do not fit together."""
    for layer in layers:
        layer.check(method, reducers)
        if why := bent(layer, method, reducers):
            raise CompositionError(why)
    for i, layer in enumerate(layers):
        if layer.algebra.shares and not any(x.algebra.ring for x in layers[i + 1 :]):
            raise CompositionError(f"layer '{name_of(layer)}' has each client add a share of the noise only, so "
                                   "that the server may see sums alone, and no layer below hides what clients send; "
                                   "list secagg or secagg_plus below it, or let each client add all of it (noise: "
                                   "local)")
    for i, j in itertools.combinations(range(len(layers)), 2):
        if why := clash(layers[i], layers[j]):
            raise CompositionError(why)


def bent(layer: Layer, method: Any, reducers: Mapping[str, Any]) -> str | None:
    """Why this layer would spoil a sum of the method's of which one part divides another; None when it does not."""
    a = layer.algebra
    inexact = a.kind in ("robust", "codec") or a.compresses or (a.kind == "dp" and a.needs == "sum")
    fn = next((name for name, r in reducers.items() if isinstance(r, Sum) and r.divides), None)
    if fn is None or not inexact:
        return None
    return (f"layer '{name_of(layer)}' and method '{name_of(method)}' do not fit together: '{fn}' divides "
            "what is summed by the weight of who had it, which must come as it is; use secagg, he_ckks or dp_sgd")


def clash(above: Layer, below: Layer) -> str | None:
    """One sentence on why these two do not fit together in this order; None when they do."""
    a, b = above.algebra, below.algebra
    up, down = f"layer '{name_of(above)}'", f"layer '{name_of(below)}'"
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
    if a.whole and b.kind in HIDES and not b.ring:
        return (f"{up} above {down}: whole numbers must add up to the last bit where nobody reads a single one; use "
                "secagg or secagg_plus")
    if a.kind == "attack" and b.whole:
        return f"{up} above {down}: what is sent is the clipped sum of gradients, whatever an attacker would say"
    if a.whole and b.kind == "codec":
        return f"{up} above {down}: whole numbers must arrive to the last bit; leave {down} out"
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
            or (a.kind == b.kind == "robust") or (above.by_example and below.by_example)
            or (a.kind == b.kind == "dp" and a.needs == b.needs == "sum"))
