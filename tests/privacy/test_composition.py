"""Every pair of the table: those that it calls sound run and equal the plain form, others name both and a way out."""

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evidence.pages.composition import examples, foldings, rows, shared_table, table
from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError
from fedllm.core.layer import name_of
from fedllm.core.payload import pack
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.core.rng import numpy_stream
from fedllm.defenses.median import Median
from fedllm.methods._factors import Products
from fedllm.methods.registry import make_method
from fedllm.privacy.composition import check_stack, clash
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

QUIET = {"noise_multiplier": 0, "clip_norm": 1e3, "clip_lr": 0}
LIVE = {
    "dp_fedavg": DPFedAvg(**QUIET), "dp_ftrl": DPFTRL(noise_multiplier=0, clip_norm=1e3, restart_every=1),
    "dp_sgd": DPSGD(noise_multiplier=1.0), "secagg": SecAgg(),
    "secagg_plus": SecAggPlus(), "thgs_secagg": THGSSecAgg(density=1.0), "he_ckks": HECKKS(),
    "fedml_he": FedMLHE(mask="random", encrypt_ratio=0.3),
    "codec_quant": CodecQuant(),
    "codec_quant (toward_zero)": CodecQuant(mode="toward_zero"),
    "codec_topk_ef": CodecTopKEF(density=1.0), "codec_topk_ef (no feedback)": CodecTopKEF(1.0, error_feedback=False),
    "codec_powersgd": CodecPowerSGD(rank=4),
    "server_tree": ServerTree(tree=((("c0", "c1", "c2", "c3", "c4"),), ())), "ring_all_reduce": RingAllReduce(),
    "fedrdma": FedRDMA(chunk_bytes=4096)}
ERROR = {"codec_quant": 0.03, "codec_quant (toward_zero)": 0.06, "secagg": 2e-5, "secagg_plus": 2e-5,
         "thgs_secagg": 2e-5, "he_ckks": 1e-5,
         "fedml_he": 1e-5}
"""What each loses on entries of about 1; the others are exact at these settings."""


class Ship:
    """Clients send a matrix of rank 2, folded as the class says."""

    only_fits = True

    def round(self, state, clients):
        return (yield Ask(self.local, {c: {"theta/w": torch.zeros(48, 40)} for c in clients}))

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(delta={"w": client.b @ client.a}, n=3)


class Factors(Ship):
    @on_client(reduce=Products())
    def local(self, msg, client):
        name = "base_model.model.w"
        return pack(theta={f"{name}.lora_A.weight": client.a, f"{name}.lora_B.weight": client.b}, n=3, scale=1.0)


class Middle(Ship):
    @on_client(reduce=Median())
    def local(self, msg, client):
        return pack(delta={"w": client.b @ client.a}, n=3)


class Apart(Ship):
    @on_client()
    def local(self, msg, client):
        return pack(delta={"w": client.b @ client.a}, n=3)


METHODS = dict(zip(foldings(), (Ship(), Factors(), Middle(), Apart()), strict=True))


def people():
    g = torch.Generator().manual_seed(1)
    b = torch.randn(48, 2, generator=g)
    return {f"c{i}": SimpleNamespace(id=f"c{i}", n=3, memory={},
                                     spend=lambda release, count=1: None,
                                     b=b, a=torch.randn(2, 40, generator=g) / 2,
                                     rng=lambda owner, i=i: numpy_stream(i, owner),
                                     through=lambda change, closed="": contextlib.nullcontext()) for i in range(5)}


def result(method, layers, loop):
    clients = people()
    out = drive(method.round(None, clients), loop((method, *layers), clients), layers)
    if out.value is None:
        return torch.stack([r["delta/w"] for r in out.values()])
    v = out.value
    return v["delta/w"] if "delta/w" in v else v["product/w"] if "product/w" in v else v["B/w"] @ v["A/w"]


def test_the_table_covers_every_pair():
    n = len(examples())
    assert examples().keys() == LIVE.keys() and len(rows()) == n * n + 4 * n
    assert table().count("\n") == n * n + 4 * n + 2
    docs = Path(__file__).parents[2] / "docs" / "privacy.md"
    assert table() in docs.read_text(), "docs/privacy.md holds another table than evidence.pages.composition.table()"
    assert shared_table() in docs.read_text(), "docs/privacy.md holds another table than shared_table()"


@pytest.mark.parametrize("shared", [DPSGD(noise_multiplier=1.0, noise="shared"),
                                    DPFTRL(noise_multiplier=1.0, unit="example")])
def test_noise_that_clients_share_stands_above_a_secure_sum(shared):
    """What the table for it calls sound is what a stack is held to; rows are made private once."""
    method, reducers = make_method("fedavg"), {"local": Mean()}
    check_stack(method, [shared, SecAgg(), FedRDMA(chunk_bytes=4096)], reducers)
    check_stack(method, [shared, SecAggPlus(), LIVE["server_tree"]], reducers)
    for stack, why in (([shared], "no layer below hides"), ([shared, HECKKS()], "no layer below hides"),
                       ([DPSGD(noise_multiplier=1.0), shared, SecAgg()], "the same work twice"),
                       ([shared, DPSGD(noise_multiplier=1.0), SecAgg()], "the same work twice"),
                       ([shared, CodecQuant(), SecAgg()], "to the last bit")):
        with pytest.raises(CompositionError, match=why):
            check_stack(method, stack, reducers)


@pytest.mark.parametrize("row", rows(), ids=lambda r: f"{r.above} / {r.below}")
def test_each_pair_runs_as_the_plain_form_or_is_refused(row, loop):
    method, layers = METHODS.get(row.above, METHODS["method with Mean (fedavg)"]), []
    if row.above in LIVE:
        layers.append(LIVE[row.above])
    layers.append(LIVE[row.below])
    reducers = {"local": type(method).local.__dict__["reduce"]}
    if row.says:
        with pytest.raises(CompositionError) as caught:
            check_stack(method, layers, reducers)
        text = str(caught.value)
        assert all(f"layer '{name_of(x)}'" in text for x in layers) or type(method).__name__ in text
        assert text.count(". ") == 0 and ("; " in text)  # one sentence, with a way out
        return
    check_stack(method, layers, reducers)
    plain = result(method, [], loop)
    error = sum(ERROR.get(name, 1e-5) for name in (row.above, row.below))
    if isinstance(method, Factors) and row.below.startswith("codec_quant"):
        error *= 8  # both factors are rounded
    torch.testing.assert_close(result(method, layers, loop), plain, atol=error, rtol=1e-4)


@pytest.mark.parametrize("above, below, says", [
    (SecAgg(), CodecQuant(), "cannot be compressed; list codec_powersgd above"),
    (CodecQuant(), SecAgg(), "do not add up .* secagg's own quantum"),
    (CodecTopKEF(), SecAgg(), "codec_powersgd, whose messages add up"),
    (SecAgg(), DPFedAvg(**QUIET), "list layer 'dp_fedavg' first"),
    (DPFedAvg(**QUIET), CodecTopKEF(), "longer than the clip.*error_feedback: false"),
    (DPFedAvg(**QUIET), CodecQuant(), "longer than the clip"),
    (SecAgg(), SecAggPlus(), "the same work twice")])
def test_refusals_say_what_to_do(above, below, says):
    assert re.search(says, clash(above, below) or "")


def test_three_layers_together(loop):
    """Clip at home, factors of the clipped sum refused, but masks below a clip and DP-SGD above both."""
    layers = [DPSGD(noise_multiplier=1.0), DPFedAvg(**QUIET), SecAgg()]
    check_stack(Ship(), layers, {"local": Mean()})
    torch.testing.assert_close(result(Ship(), layers, loop), result(Ship(), [], loop), atol=1e-4, rtol=1e-4)
