"""A target for atheris: `make fuzz`. Any exception but PayloadError, and any large allocation, ends it with a finding.

Each input is taken as a message, as a manifest with a right frame, and as choices from which a manifest is made: the
parser of JSON is C code, through which the fuzzer cannot see its way.
"""

import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedllm.wire.codec", "fedllm.core.payload", "fedllm.engines.far.door"]):
    import torch

    from fedllm.core.errors import PayloadError
    from fedllm.core.payload import digest
    from fedllm.engines.far.door import Door
    from fedllm.wire import codec

DOOR, SENT = Door(1 << 20), {"theta/w": torch.zeros(2)}
KNOWN = ["w", "theta/w", "theta/v", "n", "", *codec.DTYPES, "b64", 0, 1, 2, -1, 2**31, 2**63, 1e400, None, True, [], {}]
SEEDS = [{"theta/w": torch.ones(2), "n": 3}, {"x": torch.zeros(2, 0, 3), "s": "text", "b": b"bytes", "l": [1, [2.5]]},
         {name: torch.zeros(3).to(d) for name, d in codec.DTYPES.items()}, {}]


def framed(manifest: bytes, tail: bytes) -> bytes:
    return codec.MAGIC + len(manifest).to_bytes(4, "little") + manifest + bytes(-(8 + len(manifest)) % 64) + tail


def value(pick: atheris.FuzzedDataProvider, depth: int = 0) -> object:
    kind = pick.ConsumeIntInRange(0, 7)
    if kind < 4 or depth > 3:
        return pick.PickValueInList(KNOWN)
    if kind == 4:
        return pick.ConsumeInt(8)
    if kind == 5:
        return pick.ConsumeUnicodeNoSurrogates(6)
    items = [value(pick, depth + 1) for _ in range(pick.ConsumeIntInRange(0, 4))]
    return items if kind == 6 else {str(x): x for x in items}


def made_up(data: bytes) -> bytes:
    pick = atheris.FuzzedDataProvider(data)
    rows = [[value(pick), pick.PickValueInList(list(codec.DTYPES)), [pick.ConsumeIntInRange(0, 3) for _ in range(2)],
             16 * pick.ConsumeIntInRange(0, 4)] for _ in range(pick.ConsumeIntInRange(0, 4))]
    for row in rows:
        if pick.ConsumeBool():
            row[pick.ConsumeIntInRange(0, 3)] = value(pick)
    doc = {"t": rows, "v": [[value(pick), value(pick)] for _ in range(pick.ConsumeIntInRange(0, 3))]}
    if pick.ConsumeIntInRange(0, 9) == 9:
        doc[pick.PickValueInList(["t", "v"])] = value(pick)
    return framed(json.dumps(doc).encode(), pick.ConsumeBytes(128))


def one_input(data: bytes) -> None:
    for body in (data, framed(data[:-16], data[-16:]), made_up(data)):
        try:
            got = DOOR.enter(SENT, body)
        except PayloadError:
            continue
        if body:  # what is let in can be counted, read and sent on
            codec.size(got)
            digest(codec.decode(codec.encode(got)))


def main() -> None:
    corpus = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
    for i, seed in enumerate(SEEDS if corpus else ()):
        (corpus / f"seed-{i}").write_bytes(codec.encode(seed))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
