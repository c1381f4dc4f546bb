"""The codec gives back what it was given, counts bytes without encoding, and refuses garbage with an error of ours."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import PayloadError
from fedllm.wire import codec

PAYLOAD = {
    "theta/a.lora_A.weight": torch.randn(3, 5),
    "half": torch.randn(7).to(torch.bfloat16),
    "q": torch.arange(-4, 4, dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "n": 12,
    "loss": 0.25,
    "on": "global",
    "raw": b"\x00\xff",
    "list": [1, "two", 3.5, b"4", [None, True]],
}


def test_round_trip_is_exact():
    data = codec.encode(PAYLOAD)
    got = codec.decode(bytes(data))
    assert list(got) == list(PAYLOAD) or set(got) == set(PAYLOAD)
    for key, want in PAYLOAD.items():
        if isinstance(want, torch.Tensor):
            assert got[key].dtype == want.dtype and got[key].shape == want.shape and torch.equal(got[key], want), key
        else:
            assert got[key] == want and type(got[key]) is type(want), key


def test_size_is_the_encoded_length_to_the_byte():
    assert codec.size(PAYLOAD) == len(codec.encode(PAYLOAD))
    assert codec.size({}) == len(codec.encode({}))


def test_non_contiguous_tensors_cross():
    x = torch.arange(12.0).view(3, 4).T
    assert torch.equal(codec.decode(codec.encode({"x": x}))["x"], x)


@pytest.mark.parametrize(
    "data", [b"", b"FLM1", b"PK\x03\x04aaaaaaaa", b"FLM1\x10\x00\x00\x00" + b"x" * 40, b"FLM1\xff\xff\xff\xff{}"]
)
def test_garbage_is_refused(data):
    with pytest.raises(PayloadError):
        codec.decode(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(0, 255))
def test_a_damaged_byte_never_escapes_as_another_error(place, value):
    data = codec.encode(PAYLOAD)
    data[place % len(data)] = value
    with contextlib.suppress(PayloadError):
        codec.decode(data)


def test_truncated_tensors_are_refused():
    data = codec.encode({"x": torch.randn(1000)})
    with pytest.raises(PayloadError, match="'x' reaches beyond"):
        codec.decode(data[:-100])


def test_what_cannot_cross_is_named():
    with pytest.raises(PayloadError, match="set"):
        codec.encode({"x": {1, 2}})
    with pytest.raises(PayloadError, match="complex"):
        codec.encode({"x": torch.zeros(2, dtype=torch.complex64)})
