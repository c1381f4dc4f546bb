"""Values on disk: nested state as JSON, its tensors as blobs named by their content, all of it written atomically."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fedllm.core.errors import FedLLMError, RunError
from fedllm.wire import codec


def private_folder(path: Path) -> Path:
    """The folder, made if need be, that only its owner may open."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def only_mine(path: str, flags: int) -> int:
    """Opens a file that only its owner may read, for `open(..., opener=only_mine)`."""
    return os.open(path, flags, 0o600)


def write_atomic(path: Path, data: bytes | bytearray) -> None:
    """The file holds `data` or what it held before, whatever happens on the way; an OSError leaves nothing behind.

    Only its owner may read it."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb", opener=only_mine) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder last through a power cut; of a file, its content."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Make what lies in this folder last through a power cut, before a rename says that it is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_folder(path)
    sync_folder(folder)


class Blobs:
    """Tensors in files named by the sha256 of their bytes: equal tensors are kept once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, tensor: Tensor) -> str:
        """Store a tensor (once) and give its name."""
        data = codec.encode({"t": tensor.detach().cpu()})
        name = hashlib.sha256(data).hexdigest()
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
        return name

    def get(self, name: str) -> Tensor:
        """The tensor of this name; a RunError when it is gone or damaged."""
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise RunError(f"{self.folder / name} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != name:
            raise RunError(f"{self.folder / name} is damaged: its content does not match its name")
        return codec.decode(data)["t"].clone()

    def keep(self, names: set[str]) -> None:
        """Delete every other blob, and what an interrupted write left."""
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if path.name not in names:
                with contextlib.suppress(OSError):
                    path.unlink()


@dataclass(frozen=True)
class Frozen:
    """A value that was frozen before and has not changed since."""

    doc: Any


def freeze(value: Any, blobs: Blobs, path: str = "state") -> Any:
    """A JSON value that `thaw` turns back into `value`, types included; tensors and arrays go to the blobs."""
    if isinstance(value, Frozen):
        return value.doc
    if value is None or isinstance(value, str | bool | int | float):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, Tensor):
        return {"$tensor": blobs.put(value)}
    if isinstance(value, np.ndarray):
        return {"$array": blobs.put(torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape))}
    if isinstance(value, np.generic):
        return freeze(value.item(), blobs, path)
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {"$map": [[freeze(k, blobs, path), freeze(v, blobs, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(n for t, n in SEQUENCES.items() if isinstance(value, t))
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return {f"${kind}": [freeze(v, blobs, f"{path}.{i}") for i, v in enumerate(items)]}
    raise RunError(f"{path} holds a {type(value).__name__}, which a checkpoint cannot keep; use tensors, arrays, "
                   "numbers, text, bytes, lists, tuples, sets and mappings")


SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", frozenset: "frozenset", set: "set"}


def thaw(doc: Any, blobs: Blobs) -> Any:
    """The value that `freeze` was given."""
    if not isinstance(doc, dict):
        return doc
    inner: Any
    tag, inner = next(iter(doc.items()), ("", None))
    known = ("$tensor", "$array", "$bytes", "$map", *(f"${n}" for n in SEQUENCES.values()))
    if len(doc) != 1 or tag not in known:
        raise RunError(f"{blobs.folder.parent} holds {str(doc)[:60]!r}, which this version of fedllm has not written")
    if tag == "$tensor":
        return blobs.get(inner)
    if tag == "$array":
        return blobs.get(inner).numpy()
    if tag == "$bytes":
        return base64.b64decode(inner)
    if tag == "$map":
        return {thaw(k, blobs): thaw(v, blobs) for k, v in inner}
    make = next(t for t, n in SEQUENCES.items() if f"${n}" == tag)
    return make(thaw(v, blobs) for v in inner)


def blobs_in(doc: Any) -> Iterator[str]:
    """Names of all blobs that a frozen value needs."""
    if isinstance(doc, dict):
        for tag, inner in doc.items():
            if tag in ("$tensor", "$array"):
                yield inner
            else:
                yield from blobs_in(inner)
    elif isinstance(doc, list):
        for item in doc:
            yield from blobs_in(item)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A record that is not as a run writes it (it was changed, or cut) is a RunError, whatever in it that is."""
    try:
        yield
    except FedLLMError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise RunError(f"{path} cannot be read: {error.filename} is not there as a run leaves it ({error.strerror}); "
                       "bring it back from a copy, or run the recipe again") from None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError,
            ValueError, yaml.YAMLError) as error:
        raise RunError(f"{path} is damaged: something in it is not as a run writes it ({type(error).__name__}: "
                       f"{str(error)[:200]})") from error


def read_json(path: Path) -> Any:
    """A JSON file of a run folder; a RunError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
