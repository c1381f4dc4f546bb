"""What crosses Flower: an envelope and a body in one message, by flwr's public classes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.core.errors import FedLLMError, PayloadError

if TYPE_CHECKING:  # what `join` imports loads no model code
    from fedllm.engines.far.line import Head

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Environment of every Flower process: it tells nobody that it runs."""
KIND, HEAD, BODY, BUFFER = "query", "head", "body", "buffer"
def to_record(head: Head, body: bytes | bytearray | memoryview) -> Any:
    """A message's content: only an `Array` is cut into chunks, so a body is one. Do not change it until it is sent."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    record = RecordDict({HEAD: ConfigRecord({"json": json.dumps(dict(head))})})
    if len(body):
        array = Array(dtype="uint8", shape=(len(body),), stype="fedllm.bytes", data=b"")
        array.data = memoryview(body)  # type: ignore[assignment] (the constructor insists on bytes, which is a copy)
        record[BODY] = ArrayRecord()
        record[BODY][BUFFER] = array
    return record


def from_record(record: Any) -> tuple[dict[str, Any], Any]:
    """Envelope and body; PayloadError when the content is none of ours."""
    try:
        head = json.loads(str(record[HEAD]["json"]))
        body = record[BODY][BUFFER].data if BODY in record else b""
    except (KeyError, TypeError, ValueError) as error:
        raise PayloadError(f"a message that is none of ours: {type(error).__name__}: {error}") from None
    if not isinstance(head, dict):
        raise PayloadError("a message whose envelope is no mapping")
    return head, body


def read(path: Path) -> bytes:
    """A file of a kit."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FedLLMError(f"{path} cannot be read: {error.strerror}") from None
