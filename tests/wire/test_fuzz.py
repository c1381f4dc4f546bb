"""Whatever arrives is a payload or a PayloadError, at little cost; a site's process answers it and never falls over."""

import contextlib
import json
import tracemalloc
from types import SimpleNamespace

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedllm.core.errors import PayloadError
from fedllm.engines.far.door import Door
from fedllm.engines.far.site import SiteHost
from fedllm.engines.far.sites import PROTOCOL
from fedllm.wire import codec

NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 0, float("inf")])
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.text(max_size=4) | st.sampled_from(["t", "v", "b64"]), inner, max_size=4), max_leaves=12)
ROWS = st.lists(st.tuples(st.text(max_size=4) | LEAVES, st.sampled_from(sorted(codec.DTYPES)) | LEAVES,
                          st.lists(NUMBERS, max_size=4) | LEAVES, NUMBERS | LEAVES) | JSON, max_size=4)
VALUES = st.lists(st.tuples(LEAVES, JSON) | JSON, max_size=4)
MANIFESTS = JSON | st.fixed_dictionaries({"t": ROWS, "v": VALUES})
PLACES = [2**70, 0]


def framed(manifest: object, tail: bytes = b"") -> bytes:
    text = json.dumps(manifest).encode()
    return codec.MAGIC + len(text).to_bytes(4, "little") + text + b" " * (-(codec.HEAD + len(text)) % 64) + tail


def taken(data: bytes) -> None:
    with contextlib.suppress(PayloadError):
        Door(1 << 20).enter({"theta/w": torch.zeros(2)}, data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@example(codec.MAGIC + (2**32 - 1).to_bytes(4, "little"))
@example(framed({}) + b"[" * 5000)
@example(codec.MAGIC + (100000).to_bytes(4, "little") + b"[" * 100000)
def test_any_bytes(data):
    taken(data)
    taken(codec.MAGIC + data)


@settings(max_examples=600, deadline=None)
@given(MANIFESTS, st.binary(max_size=64))
@example({"t": [["w", "float32", [0], float("inf")]], "v": []}, b"")
@example({"t": [["w", "float32", [2**70, 0], 0]], "v": []}, b"")
@example({"t": [["w", "float32", [2**62, 2**62], 0]], "v": []}, b"1234")
@example({"t": [["w", "bool", [3], 0]], "v": []}, b"\x07\xff\x02")
@example({"t": [], "v": [["n", {"b64": "é"}]]}, b"")
def test_any_manifest(manifest, tail):
    taken(framed(manifest, tail))


@settings(max_examples=100, deadline=None)
@given(MANIFESTS)
def test_memory_follows_what_arrived_and_not_what_it_claims(manifest):
    data = framed(manifest)
    tracemalloc.start()
    try:
        taken(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


KEYS = ["op", "protocol", "round", "visit", "phase", "attempt", "stack", "settled", "size"]
HEADS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), JSON, max_size=9)


@settings(max_examples=200, deadline=None)
@given(HEADS, st.sampled_from(["ask", "open", "close", "echo", "probe", "x"]), st.binary(max_size=64))
def test_a_site_answers_any_message(head, op, body):
    host = SiteHost(lambda head: (SimpleNamespace(memory=None, ask=None), {}))
    said, out = host.answer({**head, "protocol": PROTOCOL, "op": op, "size": 0}, body)
    assert isinstance(said, dict) and not out
