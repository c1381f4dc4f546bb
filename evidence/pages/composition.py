"""docs/privacy.md's table: which layers may stand above which, read from what each declares."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.core.layer import Layer
from fedllm.core.reduce import Mean
from fedllm.privacy.composition import clash


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


def shared_table() -> str:
    """Under noise that clients share: what may stand above it, between it and the secure sum, and below that."""
    from fedllm.privacy.dp_ftrl import DPFTRL
    from fedllm.privacy.dp_sgd import DPSGD
    from fedllm.privacy.secagg import SecAgg

    forms = [DPSGD(noise_multiplier=1.0, noise="shared"), DPFTRL(noise_multiplier=1.0, unit="example")]
    lines = ["| layer | above it | between it and secagg | below secagg |", "|---|---|---|---|"]
    for name, x in examples().items():
        cells = []
        for at in range(3):
            said = {_stacked([*(stack := [form, SecAgg()])[:at], x, *stack[at:]]) for form in forms}
            cells.append(" / ".join(sorted(said)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _stacked(layers: Sequence[Layer]) -> str:
    """Whether they run, or why two of them do not fit together, without the way out."""
    why = next((w for a, b in itertools.combinations(layers, 2) if (w := clash(a, b))), ": runs")
    return (why.partition(": ")[2] or why.partition("do ")[2]).partition(";")[0]


def foldings() -> dict[str, Any]:
    """How methods fold replies: means, sums of lifted replies, robust reducers, or not at all."""
    from fedllm.defenses.median import Median
    from fedllm.methods._factors import Products

    return {"method with Mean (fedavg)": Mean(), "method with Products (flexlora)": Products(),
            "method with Median": Median(), "method with single replies": None}


class _Method:
    """Stands for any method in the table."""

    only_fits = True
