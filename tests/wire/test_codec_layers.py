"""The codecs that are layers: error bounds, exact bytes, residues, lost replies, and two-question sums."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, PayloadError, RecipeError
from fedllm.core.payload import pack
from fedllm.core.program import Fold, drive, serve
from fedllm.core.reduce import Mean
from fedllm.core.rng import numpy_stream
from fedllm.privacy.secagg import SecAgg
from fedllm.wire.codec import decode, encode
from fedllm.wire.codec_powersgd import CodecPowerSGD
from fedllm.wire.codec_quant import CodecQuant, dequantized, packed, unpacked
from fedllm.wire.codec_topk_ef import CodecTopKEF, index_code, index_decode


class Loop:
    """Every message is turned into bytes and back; `up` counts what clients sent. `silent` by phase's end."""

    def __init__(self, stack, clients, silent=None):
        self.stack, self.clients, self.silent, self.up = tuple(stack), clients, silent or {}, 0

    def send(self, asks):
        folds = [Fold(ask) for ask in asks]
        for fold in folds:
            for cid, msg in fold.ask.msgs.items():
                reply = encode(serve(self.stack, fold.ask.phase, decode(encode(msg)), self.clients[cid]))
                self.up += len(reply)
                if cid in self.silent.get(fold.ask.phase.rpartition(".")[-1], ()):
                    fold.miss(cid, "silent")
                else:
                    fold.take(cid, decode(reply))
        return [fold.done() for fold in folds]


class Ship:
    """Clients send their own matrix and a vector."""

    def round(self, state, clients):
        return (yield Ask(self.local, {c: {} for c in clients}))

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(delta={"w": client.w, "b": client.w[0, :5].clone()}, n=client.n, loss=0.5)


class Weights(Ship):
    """Clients answer with what they were told, moved by their matrix."""

    def round(self, state, clients):
        return (yield Ask(self.local, {c: pack(theta={"w": state}) for c in clients}))

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(theta={"w": msg["theta/w"] + client.w}, n=client.n)


class Apart(Ship):
    """Replies are kept one by one."""

    @on_client()
    def local(self, msg, client):
        return pack(delta={"w": client.w}, n=client.n)


def people(count=4, shape=(60, 50), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {f"c{i}": SimpleNamespace(id=f"c{i}", n=i + 1, memory={}, w=torch.randn(*shape, generator=g, dtype=dtype),
                                     rng=lambda owner, i=i: numpy_stream(i, owner)) for i in range(count)}


def run(method, layers, clients, silent=None, states=None, start=None):
    engine = Loop((method, *layers), clients, silent)
    return drive(method.round(start, clients), engine, layers, states), engine


def mean(clients, names=None):
    who = [clients[c] for c in names or clients]
    return sum(c.w * c.n for c in who) / sum(c.n for c in who)


@pytest.mark.parametrize("bits, ratio", [(8, 3.8), (4, 7.0), (2, 12.0)])
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "toward_zero"])
def test_quantized_values_stay_within_a_step_and_bytes_are_counted(bits, ratio, mode):
    codec, x = CodecQuant(bits=bits, mode=mode), torch.randn(100, 997) * 1e-5
    client = people(1)["c0"]
    reply = codec.quantized({"delta/x": x, "small": torch.ones(3), "n": 4}, client)
    back = dequantized(decode(encode(reply)))
    assert back["n"] == 4 and back["small"].equal(torch.ones(3)) and back["delta/x"].shape == x.shape
    top = 2 ** (bits - 1) - 1
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % 128)).view(-1, 128)
    step = (flat.abs().amax(1, keepdim=True) / top * 1.013).expand_as(flat).reshape(-1)[: x.numel()].view_as(x)
    error = (back["delta/x"] - x).abs()
    assert bool((error <= step * (0.5 if mode == "nearest" else 1.0) + 1e-12).all())
    if mode == "toward_zero":
        assert bool((back["delta/x"].abs() <= x.abs()).all())
    assert len(encode({"delta/x": x})) / len(encode(reply)) >= ratio


def test_stochastic_rounding_is_unbiased():
    codec, client = CodecQuant(bits=4, mode="stochastic", skip_below=1), people(1)["c0"]
    stream = numpy_stream(7)
    client.rng = lambda owner: stream
    x = torch.linspace(-1, 1, 128)
    many = torch.stack([dequantized(codec.quantized({"x": x}, client))["x"] for _ in range(2000)])
    assert float(((many.mean(0) - x) / (many.std(0) / 2000**0.5 + 1e-4)).abs().max()) < 4.5


def test_bits_pack_and_unpack():
    for bits in (2, 4, 8):
        q = torch.randint(2**bits, (64,), dtype=torch.uint8)
        assert unpacked(packed(q, bits), bits).equal(q) and len(packed(q, bits)) == 64 * bits // 8


def test_odd_input_of_the_quantizer():
    client, codec = people(1)["c0"], CodecQuant(skip_below=1)
    assert dequantized(codec.quantized({"x": torch.zeros(300)}, client))["x"].equal(torch.zeros(300))
    assert dequantized(codec.quantized({"x": torch.ones(9, dtype=torch.bfloat16)}, client))["x"].dtype == torch.bfloat16
    with pytest.raises(PayloadError, match="'x' holds NaN"):
        codec.quantized({"x": torch.tensor([1.0, float("nan")])}, client)
    with pytest.raises(PayloadError, match="malformed"):
        dequantized({**codec.quantized({"x": torch.ones(9)}, client), "codec_quant/form": [3, 128]})
    with pytest.raises(RecipeError, match="bits = 3"):
        CodecQuant(bits=3)


@pytest.mark.parametrize("method", [Ship(), Apart()])
@pytest.mark.parametrize("codec", [CodecQuant(), CodecTopKEF(density=1.0)])
def test_codecs_serve_sums_and_single_replies(method, codec):
    clients = people()
    out, _ = run(method, [codec], clients)
    if isinstance(method, Apart):
        for c, reply in out.items():
            torch.testing.assert_close(reply["delta/w"], clients[c].w, atol=0.02, rtol=0)
    else:
        torch.testing.assert_close(out.value["delta/w"], mean(clients), atol=0.02, rtol=0)
        assert out.value["n"] == 10 and out.value["loss"] == pytest.approx(0.5)


@pytest.mark.parametrize("scope", ["global", "per_tensor"])
@pytest.mark.parametrize("values", ["float32", "bfloat16"])
def test_what_is_sent_and_what_stays_are_all(scope, values):
    """decode(encode(u)) + e' = u, bit for bit."""
    clients, codec = people(1), CodecTopKEF(density=0.05, scope=scope, values=values)
    out, _ = run(Ship(), [codec], clients)
    sent = torch.cat([out.value["delta/w"].reshape(-1), out.value["delta/b"]])
    kept = clients["c0"].memory["codec_topk_ef/Ship.local"]["rest"]
    u = torch.cat([clients["c0"].w.reshape(-1), clients["c0"].w[0, :5]])
    assert (sent + kept).equal(u) if values == "float32" else torch.allclose(sent + kept, u, atol=1e-7)
    assert int((sent != 0).sum()) in (151, 150 + 1)


@pytest.mark.parametrize("count", [0, 1, 40, 3000, 60000, 99999])
def test_positions_take_their_shortest_form(count):
    at = torch.randperm(100_000)[:count].sort().values
    code = index_code(at, 100_000)
    assert index_decode(code, 100_000).equal(at)
    assert sum(t.numel() * t.element_size() for t in code.values()) <= min(4 * count, 12_500)


def test_one_percent_is_less_than_two_and_a_half_percent_of_the_bytes():
    clients = people(1, (400, 400))
    _, engine = run(Ship(), [CodecTopKEF(density=0.01)], clients)
    assert engine.up <= 0.025 * len(encode({"w": clients["c0"].w}))


def test_the_residue_arrives_in_time_and_lost_replies_come_back():
    """Over many rounds all that clients wanted to send is sent, also when some replies are lost on the way."""
    clients, codec = people(3), CodecTopKEF(density=0.2)
    states, total, rounds = [codec.init()], torch.zeros(60, 50), 40
    for r in range(rounds):
        lost = ["c1"] if r % 4 == 1 else []
        for c in clients.values():
            c.n = 1
        out, _ = run(Ship(), [codec], clients, {"local": lost}, states)
        total += out.value["delta/w"] * len(out.answered)
    wanted = sum(c.w for c in clients.values()) * rounds
    assert float((total - wanted).norm() / wanted.norm()) < 0.12
    without = CodecTopKEF(density=0.2, error_feedback=False)
    poor = sum(run(Ship(), [without], clients)[0].value["delta/w"] for _ in range(3)) * rounds
    assert float((poor - wanted).norm() / wanted.norm()) > 0.3


def test_weights_travel_as_their_change():
    clients, start = people(), torch.full((60, 50), 50.0)
    out, _ = run(Weights(), [CodecTopKEF(density=0.3)], clients, start=start)
    assert float((out.value["theta/w"] - start).abs().max()) < 5
    assert 0.2 < float((out.value["theta/w"] != 50).float().mean()) < 0.9


def low_rank(clients, r, g=None):
    g = torch.Generator().manual_seed(3)
    basis = torch.randn(60, r, generator=g, dtype=torch.float64)
    for c in clients.values():
        c.w = basis @ torch.randn(r, 50, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("below", [(), (SecAgg(quantum=2.0**-16),)], ids=["plain", "secagg"])
def test_a_low_rank_sum_is_recovered(below):
    """Rank 3 with r = 4, to rounding; under secure aggregation to its quantum, since both questions are sums."""
    clients = people(4, dtype=torch.float64)
    low_rank(clients, 3)
    out, _ = run(Ship(), [CodecPowerSGD(rank=4), *below], clients)
    tol = 1e-10 if not below else 2e-3
    torch.testing.assert_close(out.value["delta/w"], mean(clients), atol=tol, rtol=0)
    torch.testing.assert_close(out.value["delta/b"], mean(clients)[0, :5], atol=max(tol, 1e-12), rtol=0)
    assert out.value["n"] == 10


def test_warm_start_closes_in_on_the_best_rank():
    clients = people(3, dtype=torch.float64)
    decay = torch.diag(0.7 ** torch.arange(50, dtype=torch.float64))
    g = torch.Generator().manual_seed(5)
    u, v = (torch.linalg.qr(torch.randn(n, 50, generator=g, dtype=torch.float64))[0] for n in (60, 50))
    for c in clients.values():
        c.w = u @ decay @ v
    codec, best = CodecPowerSGD(rank=4, error_feedback=False), float(torch.diag(decay)[4:].norm())
    states, errors = [codec.init()], []
    for _ in range(8):
        out, engine = run(Ship(), [codec], clients, states=states)
        errors.append(float((out.value["delta/w"] - clients["c0"].w).norm()) / best)
    # how fast hangs on the random start: of six, the second round was at 1.02 to 1.42, the sixth at 1.00 to 1.01
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors)) and errors[-1] <= 1.02
    assert engine.up < 0.45 * 3 * 60 * 50 * 8


def test_a_client_lost_between_the_questions_keeps_its_residue():
    clients, codec = people(4, dtype=torch.float64), CodecPowerSGD(rank=2)
    states = [codec.init()]
    run(Ship(), [codec], clients, states=states)
    before = clients["c2"].memory["codec_powersgd"]["Ship.local"]["e"]["delta/w"].clone()
    clients["c2"].memory = {"codec_powersgd": {"Ship.local": {"e": {"delta/w": before.clone()}}}}
    real = codec.second

    class Gone(Loop):
        def send(self, asks):
            for a in asks:
                if a.phase.endswith("second"):
                    gone = {c: m for c, m in a.msgs.items() if c != "c2"}
                    return super().send([Ask(real, gone)])
            return super().send(asks)

    out = drive(Ship().round(None, clients), Gone((Ship(), codec), clients), [codec], states)
    assert clients["c2"].memory["codec_powersgd"]["Ship.local"]["e"]["delta/w"].equal(before)
    assert out.value["n"] == 7 and out.answered == ("c0", "c1", "c3")


def test_powersgd_needs_sums():
    with pytest.raises(CompositionError, match=r"codec_powersgd.*'Apart.local' needs every single reply.*codec_quant"):
        CodecPowerSGD().check(Apart(), {"local": None})
