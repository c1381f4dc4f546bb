"""Secure aggregation: exact sums, drop-outs in every phase, what the server sees, and those who do not play along."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, PayloadError, QuorumError, RecipeError, Withheld
from fedllm.core.layer import Facts
from fedllm.core.payload import pack
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.privacy import _ring, _shamir
from fedllm.privacy._secagg_server import ANOTHER
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.privacy.secagg import SecAgg
from fedllm.privacy.secagg_plus import SecAggPlus
from fedllm.spaces.lora import factors
from fedllm.wire._keys import make_identity

LAYERS = {"secagg": SecAgg(), "secagg_plus": SecAggPlus(degree=12)}


class Ship:
    """Every client sends its own vector, by its own weight."""

    def round(self, state, clients):
        return (yield Ask(self.local, {c: {} for c in clients}))

    @on_client(reduce=Mean())
    def local(self, msg, client):
        return pack(delta={"x": client.x, "y": client.x[:3].double() * 7}, n=client.n, loss=1.5 * client.n)

    @on_client()
    def each(self, msg, client):
        return {"x": client.x}


def run(layer, clients, loop, silent=None, spoil=None, states=None):
    engine = loop((Ship(), layer), clients, silent, spoil)
    return drive(Ship().round(None, clients), engine, [layer], states), engine


def assert_sum(out, clients, layer, asked):
    """The mean of those who answered, to half a quantum for each of them."""
    n = sum(clients[c].n for c in out.answered)
    mean = sum(clients[c].x.double() * clients[c].n for c in out.answered) / n
    bound = len(out.answered) * 2.0 ** -layer.fraction(asked) / 2 / n
    assert float((out.value["delta/x"].double() - mean).abs().max()) <= bound + 2e-7
    assert float((out.value["delta/y"] - mean[:3] * 7).abs().max()) <= bound + 2e-6
    assert out.value["n"] == n
    assert out.value["loss"] == pytest.approx(sum(1.5 * clients[c].n ** 2 for c in out.answered) / n)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("silent", [
    {}, {"advertise": [0, 1, 2, 3, 4, 5]}, {"share": [0, 4, 7, 8, 15, 19]}, {"local": [2, 3, 9, 11, 14, 17]},
    {"consent": [1, 6, 7, 12]}, {"unmask": [5, 9, 10, 13]},
    {"advertise": [0], "share": [3], "local": [6, 16], "consent": [9], "unmask": [12]}], ids=str)
def test_the_sum_is_the_survivors_sum(name, silent, loop, people):
    """None, and 30 % lost before their part is in; those lost after it still count."""
    clients, layer = people(20), LAYERS[name]
    ids = list(clients)
    out, _ = run(layer, clients, loop, {phase: [ids[i] for i in who] for phase, who in silent.items()})
    gone = {ids[i] for phase in ("advertise", "share", "local") for i in silent.get(phase, ())}
    assert set(out.answered) == set(ids) - gone and set(out.missing) == gone
    assert_sum(out, clients, layer, 20)


@pytest.mark.parametrize("phase, says", [
    ("advertise", "3 answered|3 of 9|needed"), ("share", "needed"), ("local", "phase 'masked input'"),
    ("consent", "needed"), ("unmask", "needed")])
def test_below_the_threshold_the_round_is_given_up(phase, says, loop, people):
    clients = people(9)
    with pytest.raises(QuorumError, match=says):
        run(SecAgg(), clients, loop, {phase: list(clients)[:4]})


def test_survivors_that_fall_apart_are_not_opened(loop, people):
    """A ring of degree 2 that breaks in two places leaves two sums, each of which would stand open."""
    clients, layer = people(12), SecAggPlus(degree=2, threshold=0.5)
    ids = list(clients)
    for i in range(12):
        pair = [ids[i], ids[(i + 5) % 12]]
        try:
            out, _ = run(layer, clients, loop, {"local": pair})
            assert_sum(out, clients, layer, 12)
        except QuorumError as error:
            assert "parts" in str(error) or "needed" in str(error)


def test_the_level_of_a_sparse_graph_is_stated_and_refused_where_it_is_none():
    from scipy.stats import hypergeom

    layer = SecAggPlus()
    facts = Facts({f"c{i}": 1 for i in range(1000)}, 1000, 1)
    # k = 60 of 999 others, t = 31, 200 collude: a union bound over 1000 clients
    want = -math.log2(1000 * hypergeom.sf(30, 999, 200, 60))
    assert layer.bits(1000) == pytest.approx(want) == pytest.approx(16, abs=0.05)
    assert layer.bind(facts).statement({})["security_bits"] == 16.0
    with pytest.raises(CompositionError, match=r"degree = 60 among 1000 clients promises nothing where a share"):
        SecAggPlus(corrupt=1 / 3).bind(facts)
    assert SecAggPlus(corrupt=1 / 3, degree=200).bits(1000) > 16
    assert SecAggPlus().bits(8) == math.inf  # a whole graph: 1 of 8 never holds 5 shares


def plain_ring(layer, client, count):
    lifted = Mean().lift(pack(delta={"x": client.x, "y": client.x[:3].double() * 7}, n=client.n, loss=1.5 * client.n))
    return _ring.encode(lifted, layer.fraction(count), layer.clip, "")[0]


@pytest.mark.parametrize("name", LAYERS)
def test_the_server_s_transcript_holds_no_update(name, loop, people):
    """Search: no vector that came is a client's own, nor is the difference of any two, nor does one come unmasked.
    Statistics: bytes of what came are uniform by chi-square, while the same vectors without masks are not."""
    clients, layer = people(10, size=3000), LAYERS[name]
    _, engine = run(layer, clients, loop, {"local": ["c03"]})
    rings = {c: r["ring"] for phase, c, r in engine.seen if "ring" in r}
    own = {c: plain_ring(layer, clients[c], 10) for c in clients}
    assert len(rings) == 9
    for c, ring in rings.items():
        assert all((ring == plain).float().mean() < 0.01 for plain in own.values())
        for d, other in rings.items():
            assert c == d or ((ring - other) == (own[c] - own[d])).float().mean() < 0.01
    words = torch.cat(list(rings.values()))
    bound = 1 + 4 * (2 / 255) ** 0.5  # four deviations of a chi-square per degree of freedom, 255 of them
    assert _ring.chi_square(words) < bound
    assert _ring.chi_square(torch.cat(list(own.values()))) > 2 * bound
    said = [r for _, _, r in engine.seen if "ring" not in r]
    assert not any(isinstance(v, torch.Tensor | float) for r in said for v in r.values())


def test_masks_are_uniform_whatever_they_hide(loop, people):
    """The distinguisher at 1 % over 100 sessions of constant updates: it finds nothing, and bare vectors always."""
    high = bare = 0
    for seed in range(100):
        clients = people(3, size=600, seed=seed)
        for c in clients.values():
            c.x = torch.zeros(600)
        _, engine = run(LAYERS["secagg"], clients, loop)
        ring = next(r["ring"] for _, c, r in engine.seen if "ring" in r and c == "c01")
        high += _ring.chi_square(ring) > 1 + 2.6 * (2 / 255) ** 0.5
        bare += _ring.chi_square(plain_ring(LAYERS["secagg"], clients["c01"], 3)) > 2
    assert high <= 5 and bare == 100


def test_shares_below_the_threshold_say_nothing():
    secret = bytes(range(32))
    shares = dict(enumerate(_shamir.split(secret, 4, 7), start=1))
    assert _shamir.combine({x: shares[x] for x in (2, 3, 5, 7)}) == secret
    assert _shamir.combine({x: shares[x] for x in (2, 3, 5)}) != secret
    # for three shares and any other secret there is a fourth share that makes it so
    other = (10**9).to_bytes(32, "big")
    fit = fourth({x: shares[x] for x in (2, 3, 5)}, 7, other)
    assert _shamir.combine({**{x: shares[x] for x in (2, 3, 5)}, 7: fit}) == other
    assert pow(3, _shamir.PRIME - 1, _shamir.PRIME) == pow(7, _shamir.PRIME - 1, _shamir.PRIME) == 1


def fourth(shares, x, secret):
    """The share at x for which `shares` and it give this secret."""
    p = _shamir.PRIME
    weights = dict(zip((*sorted(shares), x), _shamir._weights((*sorted(shares), x)), strict=True))
    known = sum(weights[i] * int.from_bytes(s, "big") for i, s in shares.items())
    y = (int.from_bytes(secret, "big") - known) * pow(weights[x], -1, p) % p
    return y.to_bytes(_shamir.SIZE, "big")


def test_a_wrong_share_is_passed_over_and_its_sender_named(loop, people):
    clients, layer = people(9), SecAgg()

    def spoil(phase, cid, reply):
        bad = "shares" in reply and cid == "c02"
        return {**reply, "shares": [bytes(33) for _ in reply["shares"]]} if bad else reply

    states = [layer.init()]
    out, _ = run(layer, clients, loop, {"local": ["c08"]}, spoil, states)
    assert_sum(out, clients, layer, 9)
    assert states[0]["suspects"] == ["c02"] and layer.statement(states[0])["wrong_shares"] == ["c02"]


def test_who_deals_what_it_did_not_commit_to_costs_one_round_and_stays_out(loop, people):
    """Its masks cannot be taken off; twice as many rounds go on without it each time that it comes back."""
    def spoil(phase, cid, reply):
        return {**reply, "commit": bytes(32)} if cid == "c04" and "commit" in reply else reply

    clients, layer = people(8), SecAgg()
    states, kept = [layer.init()], []
    for _ in range(10):
        try:
            out, _ = run(layer, clients, loop, spoil=spoil, states=states)
            assert_sum(out, clients, layer, 8)
            kept.append("c04" in out.missing and out.missing["c04"].startswith("broke a sum"))
        except QuorumError as error:
            assert "'c04'" in str(error)
            kept.append(None)
    assert kept == [None, True, None, True, True, None, True, True, True, True]
    assert set(states[0]["broke"]) == {"c04"}


def test_a_key_that_does_not_verify_costs_its_client_the_round(loop, people):
    clients, layer = people(9), SecAgg()

    def spoil(phase, cid, reply):
        if "advert" in reply and cid == "c04":
            return {"advert": [reply["advert"][0], bytes(32), *reply["advert"][2:]]}
        return {**reply, "signature": b"x"} if "signature" in reply and cid == "c05" else reply

    out, _ = run(layer, clients, loop, spoil=spoil)
    assert "c04" not in out.answered and out.missing["c04"] == "its key does not verify"
    assert_sum(out, clients, layer, 9)


def test_an_identity_that_changes_is_refused(loop, people):
    clients, layer = people(5), SecAgg()
    states = [layer.init()]
    run(layer, clients, loop, states=states)
    layer.__dict__["_seats"]["c01"] = type(layer._seat("c00"))(layer._seat("x").identity)
    out, _ = run(layer, clients, loop, states=states)
    assert out.missing == {"c01": ANOTHER}
    assert "as of a client that was started again: stop the run and `fedllm resume` it, and give clients" in ANOTHER
    again = SecAgg()  # as after a resume: all meet anew
    again.__dict__["_seats"]["c01"] = type(layer._seat("c00"))(layer._seat("x").identity)
    assert len(run(again, clients, loop, states=states)[0].answered) == 5


def test_a_client_that_was_started_again_is_known_by_its_folder(loop, people, tmp_path):
    clients, layer = people(5), SecAgg(keys=str(tmp_path))
    for c in clients:
        make_identity(tmp_path, c)
    run(layer, clients, loop)
    del layer.__dict__["_seats"]["c01"]
    assert len(run(layer, clients, loop)[0].answered) == 5


def test_identities_from_a_folder(loop, people, tmp_path):
    clients = people(4)
    for c in clients:
        make_identity(tmp_path, c)
    out, _ = run(SecAgg(keys=str(tmp_path)), clients, loop)
    assert len(out.answered) == 4
    (tmp_path / "c02.pub").write_text("00" * 32)
    out, _ = run(SecAgg(keys=str(tmp_path)), clients, loop)
    assert out.missing == {"c02": f"its identity key is not the one in keys = {tmp_path}"}
    (tmp_path / "c01.key").unlink()
    with pytest.raises(RecipeError, match=r"c01.key holds no identity key of client 'c01'"):
        run(SecAgg(keys=str(tmp_path)), clients, loop)


def test_clients_refuse_a_server_that_lies(loop, people):
    clients, layer = people(5), SecAgg()
    _, engine = run(layer, clients, loop)
    sid = next(m["sid"] for p, c, m in engine.told if p.endswith("advertise"))
    one = clients["c00"]
    with pytest.raises(PayloadError, match=r"seen .replayed"):
        layer.advertise({"sid": sid}, one)
    with pytest.raises(PayloadError, match="another session"):
        layer.unmask({"sid": sid, "signers": [], "signatures": []}, one)

    fresh = list(clients.values())
    adverts = {c.id: layer.advertise({"sid": "s"}, c)["advert"] for c in fresh}
    forged = {**adverts, "c01": [adverts["c02"][0], *adverts["c01"][1:]]}
    peers = ["c01", "c02", "c03", "c04"]
    with pytest.raises(PayloadError, match="key of 'c01' does not verify"):
        layer.share({"sid": "s", "peers": peers, "adverts": [forged[p] for p in peers]}, one)
    mail = {c.id: layer.share({"sid": "s", "peers": (near := [p for p in adverts if p != c.id]),
                               "adverts": [adverts[p] for p in near]}, c) for c in fresh}
    told = {"_secagg/sid": "s", "_secagg/count": 5, "_secagg/lift": True, "_secagg/from": peers,
            "_secagg/mail": [mail[p]["mail"][mail[p]["to"].index("c00")] for p in peers]}
    layer.client(Ship().local, told, one, lambda m: Ship().local(m, one))
    with pytest.raises(Withheld, match="below the threshold"):
        layer.consent({"sid": "s", "alive": ["c00", "c01"]}, one)
    layer.consent({"sid": "s", "alive": ["c00", "c01", "c02", "c03"]}, one)
    with pytest.raises(PayloadError, match="two sets of survivors"):  # the road to both kinds of share of one client
        layer.consent({"sid": "s", "alive": ["c00", "c02", "c03", "c04"]}, one)
    with pytest.raises(PayloadError, match="only 1 signed its set"):
        layer.unmask({"sid": "s", "signers": ["c01"], "signatures": [b"no"]}, one)


def test_a_client_hides_among_three_whatever_the_server_says(loop, people):
    """A session of one client and a made-up peer would open what it sends."""
    clients, layer = people(5), SecAgg(threshold=0.5)
    adverts = {c.id: layer.advertise({"sid": "s"}, c)["advert"] for c in clients.values()}
    with pytest.raises(PayloadError, match="hide among 2 clients"):
        layer.share({"sid": "s", "peers": ["c01"], "adverts": [adverts["c01"]]}, clients["c00"])


@pytest.mark.parametrize("make, says", [
    (lambda: SecAgg(quantum=1e-6).bind(Facts(dict.fromkeys("abcdefghij", 1), 10)), "overflow the ring.*finest quantum"),
    (lambda: SecAgg().bind(Facts({"a": 1, "b": 1}, 2, 1)), "at least 3 and 2 take part"),
    (lambda: SecAgg().check(Ship(), {"each": None}), r"secagg.*'Ship.each' needs every single reply.*fedavg")])
def test_what_cannot_hold_is_refused_before_the_run(make, says):
    with pytest.raises(CompositionError, match=says):
        make()


@pytest.mark.parametrize("knobs", [{"clip": 0}, {"threshold": 0.4}, {"threshold": 1.0}, {"quantum": -1.0}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(RecipeError, match=next(iter(knobs))):
        SecAgg(**knobs)


def test_entries_beyond_the_clip_and_nans_are_refused_and_named(loop, people):
    clients = people(4)
    clients["c02"].x[5] = 400.0
    with pytest.raises(PayloadError, match=r"client 'c02': 'delta/x' holds 1200 and clip = 1024"):
        run(SecAgg(), clients, loop)
    clients["c02"].x[5] = float("nan")
    with pytest.raises(PayloadError, match="holds nan"):
        run(SecAgg(), clients, loop)


def test_secrets_are_in_no_repr_no_recipe_no_state_and_no_memory(loop, people):
    clients, layer = people(4), SecAgg()
    states = [layer.init()]
    seats = {}

    def spoil(phase, cid, reply):
        s = layer._seat(cid).session
        if s:
            seats.setdefault(cid, []).extend([s.seed, s.mask_key.private_bytes_raw(), s.mail_key.private_bytes_raw()])
        return reply

    _, engine = run(layer, clients, loop, spoil=spoil, states=states)
    text = " ".join([repr(layer), repr(layer.__dict__), json.dumps(asdict(layer)), repr(states), repr(replace(layer)),
                     repr([c.memory for c in clients.values()]), repr(engine.seen), repr(engine.told)])
    for secret in (s for all_of_one in seats.values() for s in all_of_one):
        assert repr(secret) not in text and secret.hex() not in text
    assert all(layer._seat(c).session is None for c in clients)


@pytest.mark.parametrize("method", ["fedavg", "fedit", "fedprox", "fedadam", "scaffold", "ffa_lora", "flexlora",
                                    "fedex_lora"])
def test_methods_end_where_they_end_without_it(method, tiny):
    """Adding a layer that loses nothing beyond its quantum changes no method's result."""
    ends = []
    for layers in ((), (SecAgg(clip=64.0),)):
        engine, m, state, world = tiny(method, layers, k=4, ranks=(4, 2, 4, 3) if method == "flexlora" else (),
                                       loopback=True)
        states = [x.init() for x in layers]
        for r in range(2):
            engine.begin(r)
            state = drive(m.round(state, world.infos()), engine, layers, states)
            engine.commit()
        ends.append(m.served(state)[0] if method != "flexlora" else state)
    a, b = ends
    if method == "flexlora":
        assert_equal_products(a, b)
        return
    for name in a:
        torch.testing.assert_close(b[name], a[name], atol=2e-4 if method == "fedadam" else 2e-5, rtol=1e-4)


def assert_equal_products(a, b):
    """FlexLoRA's factors are unique up to signs; the products are what it means."""
    for path, (bb, aa) in factors(a["theta"]).items():
        other_b, other_a = factors(b["theta"])[path]
        torch.testing.assert_close(other_b @ other_a, bb @ aa, atol=2e-5, rtol=1e-3)


def test_noise_on_the_sum_and_masks_below_it(loop, people):
    """dp_fedavg above secagg: clipped at home, summed in the dark, noised at the server."""
    clients, dp, sa = people(5), DPFedAvg(noise_multiplier=0, clip_norm=0.5, clip_lr=0.2, seed=1), SecAgg(clip=1.0)
    results = []
    for layers in ([dp], [dp, sa]):
        states = [x.init() for x in layers]
        out = drive(Ship().round(None, clients), loop((Ship(), *layers), clients), layers, states)
        results.append((out.value["delta/x"], states[0]["clip"]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-7, rtol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1])
