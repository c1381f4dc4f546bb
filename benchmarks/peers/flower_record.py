"""Flower's way of a state dictionary over the wire: ArrayRecord, its protobuf message, bytes, and back."""

from __future__ import annotations

from collections import OrderedDict

from flwr.app import ArrayRecord
from flwr.common.serde import array_record_from_proto, array_record_to_proto
from flwr.proto.recorddict_pb2 import ArrayRecord as Message
from torch import Tensor


def encode(state: dict[str, Tensor]) -> bytes:
    """Bytes of the record of this state."""
    return array_record_to_proto(ArrayRecord.from_torch_state_dict(OrderedDict(state))).SerializeToString()


def decode(data: bytes) -> dict[str, Tensor]:
    """The state in those bytes."""
    return array_record_from_proto(Message.FromString(data)).to_torch_state_dict()
