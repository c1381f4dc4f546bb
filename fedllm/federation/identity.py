"""What a site trains on and with, as digests: base weights, tokenizer, packages, and rows (which stay)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedllm.engines.far.reasons import Refused
from fedllm.models.endpoint import Endpoint
from fedllm.models.known_by import base_digest
from fedllm.models.sealed import opened
from fedllm.runs.resolved import versions
from fedllm.runs.store import read_json, write_atomic

IDENTITY = "identity.json"
TOLD = ("weights", "tokenizer")
"""What the coordinator is told, and compares with its own."""
DIFFERS = {"weights": "weights_differ", "tokenizer": "tokenizer_differs", "rows": "rows_differ",
           "packages": "packages_differ"}


def identity_of(model: Any, rows: Iterable[Any] | None = None) -> dict[str, str]:
    """The digests of a loaded model, of the packages here, and of rows if there are any."""
    asked = isinstance(model, Endpoint)  # nobody sees more of it than where it is
    weights = _sha(json.dumps([model.url, model.model])) if asked else base_digest(opened(model))
    out = {"weights": weights, "tokenizer": tokenizer_digest(None if asked else model.tokenizer),
           "packages": _sha(json.dumps(versions(), sort_keys=True))}
    if rows is not None:
        h = hashlib.sha256()
        for row in rows:
            h.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        out["rows"] = h.hexdigest()
    return out


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of a tokenizer's vocabulary, rules, special tokens and chat template; of how it pads now nothing."""
    if tokenizer is None:
        return _sha("none")
    rules: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        rules = {k: v for k, v in json.loads(tokenizer.backend_tokenizer.to_str()).items()
                 if k not in ("truncation", "padding")}
    said = [rules, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}, str(tokenizer.chat_template)]
    return _sha(json.dumps(said, sort_keys=True))


def keep_identity(folder: Path, found: Mapping[str, str]) -> None:
    """Keep these digests in a run's folder, or compare with those that it began with; `Refused` names what differs."""
    path = folder / IDENTITY
    if not path.exists():
        write_atomic(path, json.dumps(dict(found), indent=1).encode())
        return
    if differ := [name for name, was in read_json(path).items() if found.get(name) != was]:
        raise Refused(DIFFERS[differ[0]], f"{', '.join(differ)} of this run changed since it began; {path} holds what "
                                          "they were")


def differing(mine: Mapping[str, str], said: Mapping[str, Any]) -> list[str]:
    """What of `TOLD` is another there."""
    return [name for name in TOLD if said.get(name) != mine[name]]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
